"""What the words of CUDA's libraries mean, and what a trainer's end means that said nothing: no card is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from loractl.common.job.status import Reason
from loractl.worker.attempt import trainer_process
from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.trainer_process import TrainerProcess, launch
from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.device.occupancy import RUN_VARIABLE
from loractl.worker.protocol.exit_reason import card_error, exit_reason
from loractl.worker.recipe import trainer
from loractl.worker.recipe.orders import StopOrder

from .test_out_of_memory import make_order

ADVICE = (  # torch prints it below every error of the runtime, whatever had happened
    "\nSearch for `cudaError...' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more"
    " information.\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below"
    " might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to"
    " enable device-side assertions.\n"
)
FULL, BROKEN, PROGRAM = Reason.OUT_OF_MEMORY, Reason.GPU_ERROR, None
BITSANDBYTES = "Error {} at line 389 in file /src/csrc/pythonInterface.cpp"

TEXTS = [
    # c10/cuda/CUDAException.cpp
    ("CUDA error: out of memory" + ADVICE, FULL),
    ("CUDA error: an illegal memory access was encountered" + ADVICE, BROKEN),
    ("CUDA error: uncorrectable ECC error encountered" + ADVICE, BROKEN),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable" + ADVICE, BROKEN),
    ("CUDA error: device-side assert triggered" + ADVICE, PROGRAM),
    ("CUDA error: no kernel image is available for execution on the device" + ADVICE, PROGRAM),
    ("CUDA error: invalid configuration argument" + ADVICE, PROGRAM),
    # ATen/cuda/Exceptions.h, c10/cuda/driver_api.h
    ("CUDA driver error: out of memory", FULL),
    ("CUDA driver error: device not ready", BROKEN),
    # c10/cuda/CUDACachingAllocator.cpp, where NVML lists no processes: torch words an out-of-memory then
    ('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1154, please', FULL),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", FULL),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", BROKEN),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`", BROKEN),
    ("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx( handle, opa, opb, m, n, k)`", PROGRAM),
    ("CUDA error: insufficient resources when calling `cusparseCreate(handle)`", FULL),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", FULL),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", FULL),
    ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", BROKEN),
    ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a", PROGRAM),
    ("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. If you keep", BROKEN),
    # triton's driver, alone and in what torch.compile wraps around it
    ("Triton Error [CUDA]: out of memory", FULL),
    ("backend='inductor' raised:\nRuntimeError: Triton Error [CUDA]: unspecified launch failure\n\nSet", BROKEN),
    # c10/cuda/CUDAFunctions.cpp and torch/cuda/__init__.py: no context comes up
    (
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"
        " by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
        BROKEN,
    ),
    ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver", BROKEN),
    ("No CUDA GPUs are available", BROKEN),
    ("CUDA driver initialization failed, you might not have a CUDA gpu.", BROKEN),
    ("CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable", BROKEN),
    ("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling", BROKEN),
    ("Torch not compiled with CUDA enabled", BROKEN),
    # bitsandbytes: csrc/common.cuh, cextension.py
    (BITSANDBYTES.format("out of memory"), FULL),
    (BITSANDBYTES.format("an illegal memory access was encountered"), BROKEN),
    (BITSANDBYTES.format("no kernel image is available for execution on the device"), PROGRAM),
    ("\nCUDA SETUP ERROR\nAttempted to use bitsandbytes native library functionality but it's not available.", BROKEN),
    # what names no card
    ("mat1 and mat2 shapes cannot be multiplied (4x8 and 16x2)", None),
    ("Error opening the tokenizer at line 3", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), TEXTS, ids=[text.strip().splitlines()[0][:60] for text, _ in TEXTS])
def test_a_library_s_words_have_a_reason(text: str, reason: Reason | None) -> None:
    said = card_error(text)
    assert (said and said[0]) is reason
    assert said is None or ("\n" not in said[1] and said[1] in text)
    assert is_out_of_memory(RuntimeError(text)) is (reason is FULL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CUDA driver error: out of memory", Reason.OUT_OF_MEMORY),
        ("CUDA error: an illegal memory access was encountered" + ADVICE, Reason.GPU_ERROR),
        ("No CUDA GPUs are available", Reason.GPU_ERROR),
        ("CUDA error: device-side assert triggered" + ADVICE, Reason.TRAINER_ERROR),
    ],
)
def test_a_trainer_that_meets_it_says_so(
    text: str, reason: Reason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own way from an error to the row; what raises stands in for a card that this machine lacks."""

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("loractl.worker.base.gauge.hold_to", fail)
    (tmp_path / "data.jsonl").write_text("")
    order = make_order(tmp_path, tmp_path, tmp_path / "data.jsonl")
    ended = trainer._run(order, StopOrder(), lambda _: None)
    assert (ended.reason, ended.message.endswith(text.splitlines()[0])) == (reason, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_a_box_without_the_card_that_its_order_names_is_a_gpu_error(tmp_path: Path) -> None:
    """As with a torch that is built for processors: nothing is stood in."""
    (tmp_path / "data.jsonl").write_text("")
    order = make_order(tmp_path, tmp_path, tmp_path / "data.jsonl")
    order = order.model_copy(update={"device": "cuda", "gpu": "GPU-a", "memory_limit": 2**30})
    ended = trainer._run(order, StopOrder(), lambda _: None)
    assert ended.reason is Reason.GPU_ERROR, ended.message


def test_a_process_that_a_library_ends_has_the_reason_of_its_last_words(tmp_path: Path) -> None:
    told = end_of(tmp_path, f"print({BITSANDBYTES.format('out of memory')!r}, file=sys.stderr); os._exit(1)")
    assert told == {
        "reason": Reason.OUT_OF_MEMORY,
        "message": f"the trainer ended (exit status 1) after it printed: {BITSANDBYTES.format('out of memory')}",
    }
    words = BITSANDBYTES.format("no kernel image is available for execution on the device")
    told = end_of(tmp_path, f"print({words!r}, file=sys.stderr); os._exit(1)")
    assert told["reason"] is Reason.TRAINER_ERROR and str(told["message"]).endswith(words)
    what = "terminate called after throwing an instance of 'c10::AcceleratorError'\n  what():  CUDA error: unspecified"
    assert end_of(tmp_path, f"print({what!r}, file=sys.stderr); os.abort()")["reason"] is Reason.GPU_ERROR
    assert end_of(tmp_path, "raise SystemExit('no such thing')")["reason"] is Reason.TRAINER_ERROR


def test_a_trainer_that_sigkill_does_not_end_does_not_hold_its_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in state D: its parent can't reap it. Here another process traces it, outside of its session and unmarked."""
    monkeypatch.setattr(trainer_process, "KILL_S", 0.3)
    body = "print('here', file=sys.stderr); time.sleep(60)"
    tracer: subprocess.Popen[str] | None = None
    began = time.monotonic()
    try:
        with trainer_of(tmp_path, body) as (child, book):
            while not book.end():
                time.sleep(0.02)
            tracer = subprocess.Popen([sys.executable, "-c", TRACER, str(child.pid)], stdout=subprocess.PIPE, text=True)
            assert tracer.stdout and tracer.stdout.readline() == "0\n", "ptrace is not allowed here"
        assert child.returncode is None
        assert time.monotonic() - began < 20
        told = exit_reason(child.returncode, book.end(), on_card=True)
        assert told["reason"] is Reason.GPU_ERROR and "can't be ended" in told["message"]
    finally:
        if tracer is not None:
            tracer.kill()
            tracer.wait()
    assert child.wait(timeout=5) == -signal.SIGKILL


TRACER = """
import ctypes, sys, time
print(ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)  # PTRACE_SEIZE
time.sleep(60)
"""


@contextmanager
def trainer_of(folder: Path, body: str) -> Iterator[tuple[subprocess.Popen[str], LogBook]]:
    """A trainer process with this body, as a supervisor runs one: the process and its log."""
    (folder / "body.py").write_text(f"import os, sys, time\n{body}\n")
    environment = {**os.environ, RUN_VARIABLE: "none-of-ours", "PYTHONPATH": str(folder)}
    book = LogBook()
    with (folder / "log.txt").open("w") as log:
        process = launch("body", environment)
        trainer = TrainerProcess(process, 1, "none-of-ours", log, book)
        try:
            yield process, book
        finally:
            trainer.end()


def end_of(folder: Path, body: str) -> dict[str, object]:
    with trainer_of(folder, body) as (child, book):
        child.wait(timeout=30)
    return exit_reason(child.returncode, book.end())


def test_a_card_s_own_allocator_is_out_of_memory_too() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
