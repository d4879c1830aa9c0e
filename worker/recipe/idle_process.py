"""A trainer that waits for its job: imports at low priority, without a device, then is marked as that job's."""

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
"""How much lower the priority of the imports is than the process's own."""

START_THREADS = ("numpy", "scipy.linalg")
"""Libraries that start threads when loaded. These threads keep the priority of the loading thread for good."""

JOB_VARIABLE = "LORACTL_JOB"
RUN_VARIABLE = "LORACTL_RUN"


def prepare(device: str, load: Callable[[], None]) -> None:
    """Import all that a job needs. Ends the process if a library has initialized CUDA: a spare holds no device.

    A process may not raise its priority again, but the priority of a thread ends with the thread.
    """
    for name in START_THREADS:
        with contextlib.suppress(ImportError):  # a dependency of other libraries
            importlib.import_module(name)
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
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        sys.exit("a spare trainer must hold no device, and an import has brought up CUDA")


class Marks:
    """The places of a spare's marks in the memory that `/proc/PID/environ` shows. Create it before any import.

    The search for an attempt's processes reads that memory, and the kernel shows its current content.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_void_p
        self._run: int | None = libc.getenv(RUN_VARIABLE.encode())
        self._run_size = len(os.environ.get(RUN_VARIABLE, ""))
        self._job, self._job_size = _room_for_job(libc.getenv)

    @property
    def fit(self) -> bool:
        """Whether there is a place for marks, so that this process can change whose it is."""
        return self._run is not None and self._job is not None

    def become(self, name: str, mark: str, line: str) -> None:
        """Mark this process and its children as the attempt's, with the job's name, or as a host's; print `line`.

        Raises ValueError if a mark does not fit: then the node starts another trainer.
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
    """Where LORACTL_JOB is or may be written, and how much room there is: to the end of the placeholder, the last
    variable. None if the variables are laid out otherwise, as in a process forked with other variables."""
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
    """bitsandbytes asks torch for the card's capability at its import, and torch initializes CUDA for the answer.

    NVML gives it without that. Raises pynvml.NVMLError if it does not: there every trainer starts cold.
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
