"""A trainer's memory: held to its reservation, measured at its highest point, and given back after out-of-memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import os
import re
import resource
import traceback
import warnings
import weakref
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from loractl.common.job.status import Reason
from loractl.common.memory.context import CONTEXT_BYTES
from loractl.common.memory.plan import SEGMENT_BYTES, WORKSPACE_BYTES
from loractl.worker.protocol.exit_reason import UNTOLD, card_error, may_be_full
from loractl.worker.protocol.messages import Peaks

log = logging.getLogger("loractl.worker")

Answer = TypeVar("Answer")

LEAST_BYTES = WORKSPACE_BYTES + SEGMENT_BYTES
"""Any computation on a card takes this much of torch's allocator: figures learned from other jobs may not go below."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt's names, in glibc's malloc.h

_MMAP_BYTES, _TRIM_BYTES = 2**23, 2**24
"""Tensors of 8 MiB get their own mapping; of free memory at the heap's end 16 MiB are kept."""

_LOOK_S = 0.2
"""Seconds between two looks whether a thread is still there."""

HANDLE_BYTES = 128 * 2**20
"""Card memory that cuBLAS, cuDNN or cuSOLVER may take for a handle, from the driver and not from torch's allocator."""

_PROCESSOR_IS_FULL = re.compile(
    "can't allocate memory|std::bad_alloc|can't start new thread"
    "|could not create a memory|could not create a primitive(?! descriptor)"
)
"""Messages of torch, the C++ runtime and oneDNN when the process gets no more memory."""


class Gauge:
    """Watches the memory of this process on its device."""

    def __init__(self, device: Literal["cuda", "cpu"], gpu: str) -> None:
        self._device = device
        self._gpu = gpu
        self._process = 0

    @property
    def kind(self) -> str:
        """What the peak measures, for people."""
        return "CUDA memory reserved" if self._device == "cuda" else "resident set of the process"

    def look(self) -> Peaks:
        """The peak so far: on CUDA of the allocator, on a CPU of the process's resident set."""
        if self._device == "cpu":
            resident = _proc_status("VmHWM")  # not ru_maxrss: a process inherits it from its parent
            return Peaks(reserved=resident, process=resident)
        # NVML keeps no peak of a process: this is the highest value seen
        now = nvml_process(self._gpu).bytes
        self._process = max(self._process, now or 0)
        return Peaks(
            allocated=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            process=self._process or None,
            held=torch.cuda.memory_reserved() + CONTEXT_BYTES if now is None else now,
        )


def bytes_of_base(model: Any) -> int:
    """Bytes of the device that a base takes which was just loaded: on a card with the context."""
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated() + CONTEXT_BYTES
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.parameters()}
    return sum(storages.values())


def hold_to(limit: int | None, device: Literal["cuda", "cpu"], gpu: str) -> None:
    """Make allocations beyond `limit` bytes fail in this process; None leaves them alone. Call it after the imports.

    On CUDA the limit includes the context, which the allocator does not see (`allocator_room`). On a CPU the limit is
    what model and training may take in addition to the libraries: their tables are in writable memory as well.
    """
    if limit is None:
        return
    if device == "cuda":
        torch.ones(16, 16, device="cuda").mm(torch.ones(16, 16, device="cuda"))  # brings up the context and cuBLAS
    else:
        # oneDNN keeps what it compiled for 1,024 shapes, 50 MB for each batch length: it would grow into the limit.
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "32"
        # Else torch goes on in a slow loop, a step of 2 s then took over 30, for each kernel that got no memory.
        warnings.filterwarnings("error", message=".*could not create a primitive", category=UserWarning)
        start_threads()
        # A large tensor gets its own mapping, which is released when it is freed: glibc's heap does not return holes,
        # and the smaller batch would find no more room than the larger one. A small tensor does not: new pages for each
        # tensor of a step made it 1.45 times as slow.
        _libc_call("mallopt", _M_MMAP_THRESHOLD, _MMAP_BYTES)
        _libc_call("mallopt", _M_TRIM_THRESHOLD, _TRIM_BYTES)
    limit_to(limit, device, gpu)


def limit_to(limit: int | None, device: Literal["cuda", "cpu"], gpu: str) -> None:
    """Change the limit of a process that has one."""
    if limit is None:
        return
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        used = nvml_process(gpu).bytes
        context = None if used is None else max(0, used - torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(min(1.0, allocator_room(limit, context) / total))
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_bytes_of_libraries() + limit, hard))


def start_threads() -> None:
    """Start this thread's own OpenMP threads: OpenMP ends the process if it gets no stack for one later."""
    warm = torch.ones(512, 512, requires_grad=True)
    (warm @ warm).sum().backward()


@functools.cache
def _bytes_of_libraries() -> int:
    """Writable memory before this process loaded its base. What a thread of `in_own_thread` takes for itself does not
    count in the limit."""
    return _in_new_thread(data_bytes)


def allocator_room(limit: int, context: int | None) -> int:
    """Bytes that torch's allocator may take of a process's `limit`, with its measured CUDA context (None: not
    measured).

    A context larger than planned must not eat into the plan for tensors: on a large card it would leave a tiny job
    nothing. The process then exceeds its limit by the difference, about 0.1 GiB.
    """
    return max(LEAST_BYTES, limit - min(CONTEXT_BYTES, CONTEXT_BYTES if context is None else context))


def is_card_full(error: BaseException) -> bool:
    """Whether an allocation on the card failed. torch raises those of CUDA's libraries and of the driver as other
    errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = card_error(str(error))
    return (said is not None and said[0] is Reason.OUT_OF_MEMORY) or (may_be_full(str(error)) and _no_room_for_handle())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the card or in the process's own memory."""
    if is_card_full(error) or isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, UserWarning)) and _PROCESSOR_IS_FULL.search(str(error)) is not None


def memory_or_card(lines: Iterable[str]) -> str | None:
    """The first printed line that says that memory ran out, or that the card failed."""
    return next((x for x in lines if card_error(x) is not None or _PROCESSOR_IS_FULL.search(x)), None)


def in_a_sentence(error: BaseException) -> str:
    """What an out-of-memory error asked for, without the library's line numbers."""
    if asked := re.search(r"tried to allocate (\d+) bytes", str(error)):
        return f"no room for {int(asked[1]) / 2**20:.1f} MiB more"
    if UNTOLD in str(error):
        return "no room for more on the card"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no room for more")


def _no_room_for_handle() -> bool:
    try:
        free, _ = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):  # no context: lack of memory was not the cause
        return False
    return free < HANDLE_BYTES


def in_own_thread(work: Callable[[], Answer]) -> Answer:
    """The result of work that this process tries again with less after out-of-memory.

    Once oneDNN gets no memory for a kernel, it compiles no more kernels in that thread, however much is free later: its
    assembler keeps the error ("could not create a primitive"; torch 2.13, bf16 on a CPU that has instructions for it).
    So a process with a limit works in a thread that ends with its failure.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == hard:
        return work()
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def likewise() -> Answer:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work()

    return _in_new_thread(likewise)


@dataclass(slots=True)
class _Outcome(Generic[Answer]):
    """What a thread leaves: one of them, or none if it had no memory to begin."""

    answer: list[Answer] | None = None
    error: BaseException | None = None


def _in_new_thread(work: Callable[[], Answer]) -> Answer:
    """The result of work in a thread that ends with it; MemoryError if there is no memory for the thread.

    Not by `threading` nor a pool: both wait for ever for a thread in which no Python function could be called, since
    the first call of each takes pages from the system.
    """
    outcome, ended = _Outcome[Answer](), allocate_lock()
    ended.acquire()

    def whole(_: object) -> None:
        try:
            start_threads()
            outcome.answer = [work()]
        except BaseException as error:  # noqa: BLE001  raised where the work is waited for
            outcome.error = error
        finally:
            ended.release()

    token = set[None]()
    held = weakref.ref(token)
    start_new_thread(whole, (token,))
    del token  # from now on the thread alone holds it, and drops it at its end
    while not ended.acquire(timeout=_LOOK_S) and held() is not None:
        pass
    if outcome.answer is not None:
        return outcome.answer[0]
    failure, outcome.error = outcome.error or MemoryError("no memory for a thread"), None
    try:
        raise failure
    finally:
        del failure  # it holds this frame


def freed(error: Exception) -> Exception:
    """The error with its frames as text: what they held is free once this is all that is left of it."""
    one: BaseException | None = error
    while one is not None and one.__traceback__ is not None:
        with contextlib.suppress(MemoryError):  # then the frames are left out
            one.add_note("".join(traceback.format_tb(one.__traceback__)))
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


def release() -> None:
    """Give back unused memory. Call it where no traceback holds the tensors of the failure."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _libc_call("malloc_trim", 0)


def in_batches(
    order: list[int],
    batch: int,
    work: Callable[[list[int]], None],
    run: Callable[[Callable[[], None]], None] = in_own_thread,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Do the work on `batch` items at a time; out of memory halves the batch, down to one. Returns the last size.

    A training must not be lost because its evaluation uses larger batches than the training did. `run` does a batch,
    and `done` is called after it.
    """
    start = 0
    while start < len(order):
        chosen = order[start : start + batch]
        try:
            run(functools.partial(work, chosen))
        except Exception as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            batch = len(chosen) // 2
        else:
            start += len(chosen)
            done(len(chosen))
            continue
        run(release)  # outside the handler: until it ends, the error's traceback holds the tensors
    return batch


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


@dataclass(frozen=True, kw_only=True)
class ListedProcess:
    """This process, as NVML shows it."""

    listed: bool  # False in a container with its own PIDs, and if the driver lists none
    bytes: int | None  # of the card, context included; None: NVML does not say


def nvml_process(gpu: str) -> ListedProcess:
    """What NVML shows of this process on the card with this UUID."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        used = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:  # the latter: an older driver
        log.debug("NVML does not tell this process's memory: %s", error)
        return ListedProcess(listed=False, bytes=None)
    return ListedProcess(listed=bool(used), bytes=int(used[0]) if used and used[0] else None)
