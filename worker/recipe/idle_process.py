"""A trainer that waits for its job: imported at low priority, on no device, then marked as that job's."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from loractl.worker.protocol.idle_trainer import PLACEHOLDER

NICER = 10
"""By so much the priority of the imports is lower than the process's own."""

START_THREADS = ("numpy", "scipy.linalg")
"""Libraries that start threads when they are loaded. These keep the priority of who loaded them for good."""

JOB_VARIABLE = "LORACTL_JOB"
RUN_VARIABLE = "LORACTL_RUN"


def prepare(device: str, load: Callable[[], None]) -> None:
    """Import all that a job needs. Ends the process when a library has brought up CUDA: a spare holds no device.

    A process may not raise its priority again, but a thread that ends takes its own along.
    """
    for name in START_THREADS:
        with contextlib.suppress(ImportError):  # a library of other libraries
            importlib.import_module(name)
    failed: list[BaseException] = []

    def work() -> None:
        with contextlib.suppress(OSError):  # a box that forbids it: then at the usual priority
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
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        sys.exit("a spare trainer must hold no device, and an import has brought up CUDA")


class Marks:
    """The places of a spare's marks in the memory that `/proc/PID/environ` shows. Make it before anything is imported.

    Who looks for an attempt's processes reads that memory, and the kernel shows it as it is, not as it was.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_void_p
        self._run: int | None = libc.getenv(RUN_VARIABLE.encode())
        self._run_size = len(os.environ.get(RUN_VARIABLE, ""))
        self._job, self._job_size = _room_for_job(libc.getenv)

    @property
    def fit(self) -> bool:
        """Whether there is a place for marks: this process can say whose it is, again and again."""
        return self._run is not None and self._job is not None

    def become(self, name: str, mark: str, line: str) -> None:
        """Be the attempt's of the job of that name, or a host's, for this process and all that it starts; print `line`.

        Raises ValueError when a mark does not fit: then the node starts another trainer.
        """
        run, job = mark.encode(), f"{JOB_VARIABLE}={name}".encode()
        if self._run is None or self._job is None or len(run) != self._run_size or len(job) > self._job_size:
            raise ValueError("the environment of this spare trainer has no room for an attempt's marks")
        ctypes.memmove(self._run, run, len(run))
        ctypes.memmove(self._job, job.ljust(self._job_size, b"\0"), self._job_size)
        os.environ.pop(PLACEHOLDER, None)
        os.environ |= {RUN_VARIABLE: mark, JOB_VARIABLE: name}
        sys.stderr.write(line)
        sys.stderr.flush()


def _room_for_job(address: Callable[[bytes], int | None]) -> tuple[int | None, int]:
    """Where LORACTL_JOB stands or may be written, and how much room there is: to the end of the placeholder, the last
    variable. None where the variables do not lie so, as in a process that was forked with other ones."""
    waits, job = address(PLACEHOLDER.encode()), address(JOB_VARIABLE.encode())
    if waits is None:
        return None, 0
    end = waits + len(os.environ[PLACEHOLDER])
    first = waits - len(PLACEHOLDER) - 1  # its name is overwritten, too
    if job is None:
        return first, end - first
    begin = job - len(JOB_VARIABLE) - 1
    apart = first - (job + len(os.environ[JOB_VARIABLE]) + 1)
    return (begin, end - begin) if apart == 0 else (None, 0)


@contextlib.contextmanager
def _no_question_to_the_card() -> Iterator[None]:
    """bitsandbytes asks torch for the card's capability when it is imported, and torch brings up CUDA for the answer.

    NVML tells it without. Raises pynvml.NVMLError where it does not: there every trainer starts cold.
    """
    import pynvml
    import torch

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByUUID(os.environ["CUDA_VISIBLE_DEVICES"])
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
    pynvml.nvmlShutdown()
    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: (major, minor)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = asked
