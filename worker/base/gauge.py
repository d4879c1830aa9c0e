"""A trainer's memory: held to its reservation, measured at its highest point, and given back after out-of-memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import resource
from pathlib import Path
from typing import Literal

import torch

from loractl.worker.protocol.messages import Peaks

log = logging.getLogger("loractl.worker")

CONTEXT_BYTES = 500 * 2**20
"""A CUDA context with its libraries, where NVML does not tell: 0.15 to 0.5 GiB by card; the upper end."""

_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**17  # mallopt's name for it, in glibc's malloc.h

_CARD_IS_FULL = re.compile("CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
"""What the driver and cuBLAS say: torch does not raise their errors as its own OutOfMemoryError."""

_PROCESSOR_IS_FULL = re.compile(
    "can't allocate memory|std::bad_alloc|can't start new thread"
    "|could not create a memory|could not create a primitive(?! descriptor)"
)
"""What torch, the C++ runtime and oneDNN say when the process gets no more memory."""


class Gauge:
    """Watches the memory of this process on its device."""

    def __init__(self, device: Literal["cuda", "cpu"], gpu: str) -> None:
        self._device = device
        self._gpu = gpu
        self._process = 0

    @property
    def kind(self) -> str:
        """What the peak counts, for people."""
        return "CUDA memory reserved" if self._device == "cuda" else "resident set of the process"

    def look(self) -> Peaks:
        """The peak so far: on CUDA of the allocator, on a CPU of the process's resident set."""
        if self._device == "cpu":
            resident = _proc_status("VmHWM")  # not ru_maxrss: a process inherits it from its parent
            return Peaks(reserved=resident, process=resident)
        # NVML keeps no peak of a process: this is the highest value seen
        self._process = max(self._process, _nvml_process_bytes(self._gpu) or 0)
        return Peaks(
            allocated=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            process=self._process or None,
        )


def hold_to(limit: int | None, device: Literal["cuda", "cpu"], gpu: str) -> None:
    """Make allocations beyond `limit` bytes fail in this process; None leaves them alone. Call it after the imports.

    On CUDA the limit includes the context. The allocator does not see that, so it is subtracted. On a CPU the limit is
    what model and training may take beside the libraries: their tables lie in writable memory as well.
    """
    if limit is None:
        return
    if device == "cuda":
        torch.ones(16, 16, device="cuda").mm(torch.ones(16, 16, device="cuda"))  # brings up the context and cuBLAS
        total = torch.cuda.get_device_properties(0).total_memory
        used = _nvml_process_bytes(gpu)
        context = CONTEXT_BYTES if used is None else max(0, used - torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (limit - context) / total)))
        return
    # oneDNN keeps what it compiled for 1,024 shapes, 50 MB for each length of a batch: it would grow into the limit.
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "32"
    # Threads are started first: OpenMP ends the process when it gets no stack for one.
    warm = torch.ones(512, 512, requires_grad=True)
    (warm @ warm).sum().backward()
    # Every tensor gets its own mapping, which goes when it is freed: glibc's heap does not give holes back, and the
    # smaller batch would find no more room than the larger one.
    _libc_call("mallopt", _M_MMAP_THRESHOLD, _MMAP_BYTES)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + limit, hard))


def is_card_full(error: BaseException) -> bool:
    """Whether an allocation on the card failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CARD_IS_FULL.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the card or in the process's own memory."""
    if is_card_full(error) or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _PROCESSOR_IS_FULL.search(str(error)) is not None


def in_a_sentence(error: BaseException) -> str:
    """What an out-of-memory error asked for, without the library's line numbers."""
    if asked := re.search(r"tried to allocate (\d+) bytes", str(error)):
        return f"no room for {int(asked[1]) / 2**20:.1f} MiB more"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no room for more")


def release() -> None:
    """Give back memory that is no longer used. Call it where no traceback holds the tensors of the failure."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _libc_call("malloc_trim", 0)


def data_bytes(pid: int | Literal["self"] = "self") -> int:
    """Writable private memory of a process: RLIMIT_DATA counts that."""
    return _proc_status("VmData", pid)


def _proc_status(field: str, pid: int | Literal["self"] = "self") -> int:
    """Bytes of one field of /proc/PID/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def _libc_call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:  # not in every C library
        function(*arguments)


def _nvml_process_bytes(gpu: str) -> int | None:
    """Bytes of the card that this process holds, context included; None where NVML does not tell (in a container)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        used = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except pynvml.NVMLError as error:
        log.debug("NVML does not tell this process's memory: %s", error)
        return None
    return int(used[0]) if used and used[0] else None
