"""Why a trainer ended: from its exit status, its last lines, and what the messages of CUDA's libraries mean (the card
is full, the card or its driver fails, or the program is wrong).

torch raises most of these as a plain RuntimeError, some libraries print them and end the process. So the messages are
all that both sides of the pipe have. They are those of torch 2.13 (c10/cuda, ATen/cuda/Exceptions.h), Triton's driver
and bitsandbytes 0.50 (csrc/common.cuh).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Any

from loractl.common.job.status import Reason

UNTOLD = "NVML_SUCCESS == r INTERNAL ASSERT"
"""torch's message instead of "out of memory" if the driver does not let it list a card's processes, as on a MIG slice:
it fails while it composes that error (c10/cuda/CUDACachingAllocator.cpp, reportProcessMemoryInfo)."""

_FROM_A_CARD = re.compile(
    r"CUDA error: |CUDA driver error: |Triton Error \[CUDA\]: |CUDA out of memory"
    r"|\bcu(?:DNN|solver|sparse|dss|FFT|rand)(?: Frontend)? error: |\b(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUDSS)_STATUS_"
    # bitsandbytes: the first is printed before exit(1), the others raise
    r"|^Error .+ at line \d+ in file |CUBLAS ERROR: Status|BLAS Lt API failed with status"
    r"|bitsandbytes native library functionality but it's not available"
    # no context can be created
    r"|NVIDIA driver on your system|No CUDA GPUs are available|CUDA driver initialization failed|CUDA unknown error"
    r"|Unexpected error from cudaGetDeviceCount|Torch not compiled with CUDA enabled|libcudart functions unavailable"
    rf"|cuda driver can't be loaded|{UNTOLD}"
)

_FULL = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|DEVICE_ALLOCATION_FAILED|insufficient resources when calling `cusparseCreate"
    rf"|{UNTOLD}"
)

_PROGRAM = re.compile(
    r"device-side assert triggered|no kernel image|invalid argument|invalid configuration argument"
    r"|invalid device function|too many resources requested|misaligned address|invalid resource handle"
    r"|operation not supported|_STATUS_(?:INVALID_VALUE|NOT_SUPPORTED|BAD_PARAM|ARCH_MISMATCH)"
)
"""The program's or the build's fault: another attempt, or another card of the kind, would have it again."""

_NO_HANDLE = re.compile(r"_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR)[^`]*`(?:cublas(?:Lt)?|cudnn|cusolverDn)Create\(")


def card_error(text: str) -> tuple[Reason, str] | None:
    """OUT_OF_MEMORY or GPU_ERROR, and the line that says so; None if there is none, and for a program's fault.

    Only that line counts: torch's advice below it mentions "device-side assertions" whatever happened.
    """
    line = next((line.strip() for line in text.splitlines() if _FROM_A_CARD.search(line)), None)
    if line is None or _PROGRAM.search(line):
        return None
    return Reason.OUT_OF_MEMORY if _FULL.search(line) else Reason.GPU_ERROR, line[:300]


def names_card(text: str) -> bool:
    """Whether it is an error of the card or its libraries, including a program's fault."""
    return _FROM_A_CARD.search(text) is not None


def may_be_full(text: str) -> bool:
    """Whether a library could not make its handle. It says the same of a full card and of a broken one."""
    return _NO_HANDLE.search(text) is not None


def last_card_error(lines: Sequence[str]) -> tuple[Reason, str] | None:
    """What the last printed line that names a card means, including a program's fault; None if there is none."""
    line = next((line.strip() for line in reversed(lines) if _FROM_A_CARD.search(line)), None)
    return None if line is None else card_error(line) or (Reason.TRAINER_ERROR, line[:300])


def exit_reason(
    code: int | None,
    printed: Sequence[str] = (),
    *,
    kernel_kills: int | None = None,
    limited: bool = False,
    on_card: bool = False,
) -> dict[str, Any]:
    """Reason and sentence (`reason`, `message`) for a trainer that ended without a message.

    `code`: None for a trainer that even SIGKILL does not end. `printed`: its last lines; some libraries end the process
    after a line on standard error. `kernel_kills`: how many processes the kernel killed for memory while it ran; None
    if that is unknown; a kill then counts as one of the kernel's. `limited`: its RAM was limited. Not every library
    checks its allocations; some crash where torch raises.
    """
    if code is None:
        reason, where = (Reason.GPU_ERROR, "the card's driver") if on_card else (Reason.TRAINER_ERROR, "a disk")
        return {"reason": reason, "message": f"the trainer can't be ended: it waits in the kernel, as for {where}"}
    if code == -signal.SIGKILL:
        if kernel_kills == 0:
            who = "by a person or a program: the kernel counted no kill for memory"
            return {"reason": Reason.KILLED, "message": f"the trainer was killed (SIGKILL) {who}"}
        who = "most likely by the box's out-of-memory killer"
        who += ", whose kills can't be read here" if kernel_kills is None else ""
        return {"reason": Reason.HOST_OUT_OF_MEMORY, "message": f"the trainer was killed (SIGKILL), {who}"}
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if (said := last_card_error(printed)) is not None:
        return {"reason": said[0], "message": f"the trainer ended ({how}) after it printed: {said[1]}"}
    if limited and code in (-signal.SIGSEGV, -signal.SIGABRT):
        name = signal.Signals(-code).name
        return {
            "reason": Reason.OUT_OF_MEMORY,
            "message": f"the trainer crashed ({name}), most likely at its limit of memory (LORACTL_TRAINER_RAM)",
        }
    return {"reason": Reason.TRAINER_ERROR, "message": f"the trainer ended without a result ({how})"}
