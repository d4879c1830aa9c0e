"""The self-test's own arithmetic on a processor: what passes, and that each step can fail."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch

from loractl.worker.base import self_test
from loractl.worker.base.self_test import test as check


def test_a_processor_passes_all_steps_that_it_has() -> None:
    report = check("cpu", "cpu")
    assert (report.fault, report.torch) == (None, torch.__version__)
    assert report.seconds is not None and report.context is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA build")
def test_a_torch_without_cuda_is_named() -> None:
    fault = check("cuda", "GPU-aaaa").fault
    assert fault == f"torch {torch.__version__} on this box has no CUDA build: install one that has"


class Idle(torch.optim.SGD):
    """An optimizer of bitsandbytes that does nothing, as on a card whose kernels are skipped."""

    def step(self, closure: Any = None) -> None:
        return None


def test_a_card_that_computes_wrongly_is_noticed_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.optim, "AdamW8bit", Idle)
        assert "a step of the 8-bit optimizer comes out wrong, by 100%" in str(check("cpu", "cpu").fault)
    forward = bitsandbytes.nn.Linear4bit.forward
    for factor, words in ((1.1, "a layer in NF4 comes out wrong"), (torch.nan, "a layer in NF4 comes out wrong")):
        with monkeypatch.context() as patch:
            patch.setattr(
                bitsandbytes.nn.Linear4bit, "forward", lambda layer, x, factor=factor: forward(layer, x) * factor
            )
            assert words in str(check("cpu", "cpu").fault)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
            "the driver is older than this torch needs (CUDA 13.0): update the driver, or install a torch",
        ),
        ("Found no NVIDIA driver on your system. Please check that", "CUDA finds no driver though NVML does"),
        ("No CUDA GPUs are available", "CUDA sees no card though NVML does"),
        (
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be",
            "this torch has no code for a card of compute capability 6.1",
        ),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "another process has the card for itself"),
        ("CUDA error: system not yet initialized", "NVIDIA's fabric manager does not run"),
        ("CUDA error: uncorrectable ECC error encountered", "its memory is damaged"),
        ("CUDA error: out of memory", "there is no room for its self-test (CUDA error: out of memory)"),
        ("CUDA error: something new\nsecond line", "its self-test failed: CUDA error: something new"),
    ],
)
def test_what_cuda_says_becomes_a_sentence_with_a_next_step(said: str, fault: str) -> None:
    words = self_test._in_words(RuntimeError(said), {"torch": "2.13.0", "cuda": "13.0", "capability": "6.1"})
    assert words.startswith(fault)
