"""The fork server: a process that has imported what trainers need, does nothing, and forks a trainer when asked to.

Such a trainer has what a new process would have: a session, its own pipes, its marks in `/proc/PID/environ`, and the
node as its parent. The server computes nothing, so it has one thread and no device; of an attempt it gets only the
job's number and the mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from loractl.worker.protocol.messages import PACKET, PLACEHOLDER, READY, ForkAnswer, ForkRequest

NICER = 10
"""How much lower the priority of the imports is than the process's own."""

JOB_VARIABLE = "LORACTL_JOB"
RUN_VARIABLE = "LORACTL_RUN"

ENDING_S = 1.0
"""A thread that has been joined may be listed for a moment longer."""

PACKAGES = ("/site-packages", "/dist-packages")

CARDS = ("/dev/nvidia", "/dev/dxg")
"""The drivers' files: CUDA keeps them open from its first question to the card. The second is WSL's."""

RECORDS = (".dist-info", ".egg-info", ".pth")
"""What an installation, an upgrade or a removal changes in a folder of packages."""


def serve(device: str, load: Callable[[], None]) -> bool:
    """Import everything with `load`, then fork a trainer for each request.

    True: this is such a trainer. False: this is the server, and its node is gone. Exits if it can't serve.
    """
    connection = socket.socket(fileno=0)
    block = EnvironmentBlock()
    packages = _packages()  # before the imports, so that an upgrade meanwhile shows
    import_all(device, load)
    if (unfit := _unfit()) is not None:
        sys.stderr.write(f"{unfit}\n")
        sys.stderr.flush()
        os._exit(1)  # a thread might keep the interpreter from ending
    sources = _sources()
    gc.collect()
    gc.freeze()  # a collection in a trainer would copy every page
    connection.send(READY)
    while True:
        packet, pipes, _, _ = socket.recv_fds(connection, PACKET, 3)
        if not packet:
            return False
        request = ForkRequest.model_validate_json(packet)

        def become(request: ForkRequest = request, pipes: list[int] = pipes) -> None:
            os.setsid()
            for number, pipe in enumerate(pipes):
                os.dup2(pipe, number)
            block.become(request)

        refusal = _unfit() or _changed(packages, sources)
        answer = _fork(become) if refusal is None else ForkAnswer(refusal=refusal)
        for pipe in pipes:
            os.close(pipe)
        if answer is None:
            connection.detach()  # its number is that of the trainer's standard input
            return True
        connection.send(answer.model_dump_json().encode())


def _fork(become: Callable[[], None]) -> ForkAnswer | None:
    """Fork a trainer by way of a child that ends at once, so that the node adopts it. None: this is the trainer."""
    told, tell = os.pipe()
    try:
        between = os.fork()
    except OSError as error:
        os.close(told)
        os.close(tell)
        return ForkAnswer(refusal=f"no process could be forked: {error.strerror}")
    if between == 0:
        try:
            if os.fork():
                os._exit(0)
            become()
            os.write(tell, str(os.getpid()).encode())
            os.close(told)
            os.close(tell)
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed()  # it does not notice a fork; Python's own generator does
        except BaseException:  # noqa: BLE001  neither of the two may go on as a second server
            traceback.print_exc()
            os._exit(1)
        return None
    os.close(tell)
    os.waitpid(between, 0)
    with os.fdopen(told) as heard:
        pid = heard.read()
    return ForkAnswer(pid=int(pid)) if pid else ForkAnswer(refusal="the forked process failed")


def import_all(device: str, load: Callable[[], None]) -> None:
    """Import all that a job needs, at low priority.

    A process may not raise its priority again, but the priority of a thread ends with the thread.
    """
    failed: list[BaseException] = []

    def work() -> None:
        with contextlib.suppress(OSError):  # the box forbids it: then at the usual priority
            lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICER)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lower)
        try:
            with _no_question_to_the_card() if device == "cuda" else contextlib.nullcontext():
                load()
        except BaseException as error:  # noqa: BLE001  raised again in the main thread
            failed.append(error)

    loader = threading.Thread(target=work, name="imports")
    loader.start()
    loader.join()
    if failed:
        raise failed[0]
    # OpenBLAS, in numpy and scipy, starts threads when it is loaded. A fork ends them, and the next product starts
    # others: in a trainer with its priority, and never in the server, which multiplies nothing.
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _unfit() -> str | None:
    """Why a forked trainer might differ from a new process; None: it would not."""
    deadline = time.monotonic() + ENDING_S
    while len(threads := list(Path("/proc/self/task").iterdir())) > 1:
        if time.monotonic() > deadline:
            names = ", ".join(sorted({(thread / "comm").read_text().strip() for thread in threads}))
            return f"an import left a thread: {names}"
        time.sleep(0.01)
    opened = next((file for file in _open_files() if file.startswith(CARDS)), None)
    return None if opened is None else f"an import has opened {opened}: CUDA does not survive a fork"


def _open_files() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the list's own
            yield str(descriptor.readlink())


def _changed(packages: dict[str, int], sources: dict[str, int]) -> str | None:
    """What was installed, removed or edited since the imports; None: nothing."""
    now = _packages() | {path: _changed_at(path) for path in sources}
    was = packages | sources
    path = next((path for path in sorted(was.keys() | now.keys()) if was.get(path) != now.get(path)), None)
    return None if path is None else f"{path} has changed since the imports"


def _packages() -> dict[str, int]:
    """When each package was installed, by its record."""
    folders = [Path(folder) for folder in sys.path if folder.endswith(PACKAGES) and Path(folder).is_dir()]
    records = [path for folder in folders for path in folder.iterdir() if path.suffix in RECORDS]
    return {str(path): _changed_at(str(path)) for path in records}


def _sources() -> dict[str, int]:
    """When each imported file was changed that belongs to no installed package, as in a clone."""
    installed = (sysconfig.get_path("stdlib"), *(folder for folder in sys.path if folder.endswith(PACKAGES)))
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return {file: _changed_at(file) for file in files if file and not file.startswith(installed)}


def _changed_at(path: str) -> int:
    """Nanoseconds; 0 if it is gone."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116  a thousand of them
    except OSError:
        return 0


class EnvironmentBlock:
    """The place of a trainer's marks in the memory that `/proc/PID/environ` shows. Create it before any import.

    The search for an attempt's processes reads that memory, and the kernel shows its current content.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_void_p
        self._run, waits = libc.getenv(RUN_VARIABLE.encode()), libc.getenv(PLACEHOLDER.encode())
        if self._run is None or waits is None:
            sys.exit(f"a node starts it, with a place for a trainer's marks: {RUN_VARIABLE} and {PLACEHOLDER}")
        self._run_size = len(os.environ[RUN_VARIABLE])
        self._job = waits - len(PLACEHOLDER) - 1  # the placeholder's name is overwritten, too
        self._job_size = len(PLACEHOLDER) + 1 + len(os.environ[PLACEHOLDER])

    def become(self, request: ForkRequest) -> None:
        """Mark this process and its children as the attempt's. Raises ValueError if a mark does not fit."""
        run, job = request.mark.encode(), f"{JOB_VARIABLE}={request.job_id}".encode()
        if len(run) != self._run_size or len(job) > self._job_size:
            raise ValueError(f"no room for {job.decode()} with mark {request.mark}")
        ctypes.memmove(self._run, run, len(run))
        ctypes.memmove(self._job, job.ljust(self._job_size, b"\0"), self._job_size)
        del os.environ[PLACEHOLDER]
        os.environ |= {RUN_VARIABLE: request.mark, JOB_VARIABLE: str(request.job_id)}


@contextlib.contextmanager
def _no_question_to_the_card() -> Iterator[None]:
    """Answer what imports ask of the card from NVML: torch initializes CUDA for it, which does not survive a fork.

    The environment shows one card. Raises pynvml.NVMLError if NVML does not answer: there every trainer starts fresh.
    """
    import pynvml
    import torch

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByUUID(os.environ["CUDA_VISIBLE_DEVICES"])
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(card))
    pynvml.nvmlShutdown()
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: capability,
    }
    asked = {name: getattr(torch.cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    try:
        yield
    finally:
        for name, function in asked.items():
            setattr(torch.cuda, name, function)
