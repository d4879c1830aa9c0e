"""Attention of some rows, forwards and backwards, by one kernel for all and row by row.

    python -m tests.gpu.attention DEVICE SHAPE [SHAPE ...]

A SHAPE like 16x128 is 16 rows of 65 to 128 tokens. Heads are those of an 8B Llama: 32 of 128 numbers, and 8 keys.
Prints a line of JSON a shape: milliseconds, by what share of the largest number the two differ, and where there is no
such kernel, why.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from loractl.worker.engine.passes import varlen
from loractl.worker.engine.passes.rows import RowAttention

HEADS, GROUPS, WIDTH = 32, 8, 128

TIMES = 7


def main() -> None:
    device, *shapes = sys.argv[1:]
    for shape in shapes:
        count, length = map(int, shape.split("x"))
        print(json.dumps({"shape": shape, **compare(torch.device(device), count, length)}), flush=True)


def compare(device: torch.device, count: int, length: int) -> dict[str, Any]:
    """Both ways on the same rows."""
    lengths = [length - number % (length // 2) for number in range(count)]
    random = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    states = [torch.randn(shape, generator=random).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    by_row = _attention(states, lengths)
    why = varlen.why_not(device, torch.bfloat16, WIDTH, False)
    if why is not None:
        return {"why": why, "by row": by_row[0]}
    at_once = _attention(states, lengths, once=True)
    pairs = zip(at_once[1], by_row[1], strict=True)
    apart = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
    return {"by row": by_row[0], "at once": at_once[0], "apart": apart}


def _attention(
    states: list[torch.Tensor], lengths: list[int], *, once: bool = False
) -> tuple[float, list[torch.Tensor]]:
    """The median of some times, in milliseconds; the answer and the gradients."""
    attention = RowAttention("sdpa")
    attention._at_once = lambda *_: once  # type: ignore[method-assign]
    attention.lengths = lengths
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    took, found = [], list[torch.Tensor]()
    for _ in range(TIMES):
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
