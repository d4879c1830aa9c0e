"""Attention of some rows, forwards and backwards, by one kernel for all and row by row; and what one row takes where
flash attention does not run.

    python -m tests.gpu.attention DEVICE SHAPE [SHAPE ...]

A SHAPE like 16x128 is 16 rows of 65 to 128 tokens; one like 4096/float16 is one row without flash attention, as a card
before Ampere has it. Heads are those of an 8B Llama: 32 of 128 numbers, and 8 keys. Prints a line of JSON a shape:
milliseconds, by what share of the largest number the two differ, and where there is no such kernel, why; or bytes.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from loractl.worker.base import shared_heads
from loractl.worker.engine.passes import attention
from loractl.worker.engine.passes.attention import RowAttention

HEADS, GROUPS, WIDTH = 32, 8, 128

TIMES = 7


def main() -> None:
    device, *shapes = sys.argv[1:]
    shared_heads.repeat_where_needed()  # as loading a base does
    for shape in shapes:
        if "/" in shape:
            tokens, kind = shape.split("/")
            found = weigh(torch.device(device), int(tokens), kind)
        else:
            found = compare(torch.device(device), *map(int, shape.split("x")))
        print(json.dumps({"shape": shape, **found}), flush=True)


def compare(device: torch.device, count: int, length: int) -> dict[str, Any]:
    """Both ways on the same rows."""
    lengths = [length - number % (length // 2) for number in range(count)]
    states = _states(device, sum(lengths), torch.bfloat16)
    by_row = _attention(states, lengths)
    why = attention.why_no_kernel(device, torch.bfloat16, WIDTH, False)
    if why is not None:
        return {"why": why, "by row": by_row[0]}
    at_once = _attention(states, lengths, once=True)
    pairs = zip(at_once[1], by_row[1], strict=True)
    apart = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
    return {"by row": by_row[0], "at once": at_once[0], "apart": apart}


def weigh(device: torch.device, tokens: int, kind: str) -> dict[str, Any]:
    """What one row takes at its peak beside its queries, keys and values, and what its scores would."""
    states = _states(device, tokens, getattr(torch, kind))
    with _without_flash():
        before = _held(device)
        _attention(states, [tokens], times=1)
        taken = _held(device, peak=True) - before
    return {"taken": taken, "scores": HEADS * tokens**2 * states[0].element_size()}


@contextlib.contextmanager
def _without_flash() -> Iterator[None]:
    flash, cudnn = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    shared_heads.are_fused.cache_clear()
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        shared_heads.are_fused.cache_clear()


def _held(device: torch.device, *, peak: bool = False) -> int:
    if device.type == "cpu":
        return 0
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _states(device: torch.device, tokens: int, kind: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values."""
    random = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=random).to(device, kind).requires_grad_() for shape in shapes]


def _attention(
    states: list[torch.Tensor], lengths: list[int], *, once: bool = False, times: int = TIMES
) -> tuple[float, list[torch.Tensor]]:
    """The median of some times, in milliseconds; the answer and the gradients."""
    attention = RowAttention("sdpa")
    attention._at_once = lambda *_: once  # type: ignore[method-assign]
    attention.begin(lengths)
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    took, found = [], list[torch.Tensor]()
    for _ in range(times):
        _wait(states[0].device)
        began = time.perf_counter()
        answer = attention(module, *states, scaling=WIDTH**-0.5)[0]
        found = [answer, *torch.autograd.grad(answer.float().pow(2).sum(), states)]
        _wait(states[0].device)
        took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took), found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
