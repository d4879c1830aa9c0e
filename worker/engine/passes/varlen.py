"""Attention of rows of any lengths in one kernel, on cards that have it (FlashAttention 2, arXiv:2307.08691).

Row by row a layer starts kernels for each row, and a step of many short rows waits for their starts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Sequence

import torch

from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.base.shared_heads import kind_of
from loractl.worker.base.source import first_line

KERNEL = "torch.nn.attention.varlen"

PLACES = ("cuda",)
"""Kinds of devices that have this kernel."""

AMPERE = (8, 0)
"""The compute capability that the kernel needs."""

WITHIN = 0.03
"""Share of the largest number by which answers and gradients in 16 bit may differ from those in fp32."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of concatenated rows. `borders`: where each row begins, and where the last one ends, as int32
    (rows + 1). `window`: the number of tokens that a token sees, including itself; None: all before it.

    Shapes: query (1, heads, tokens, width), key and value (1, groups, tokens, width), output (1, tokens, heads, width).
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (_as_autocast(states).squeeze(0).transpose(0, 1) for states in (query, key, value))
    before = -1 if window is None or window >= longest else window - 1
    sides = {"window_size": (before, 0), "enable_gqa": True}
    answer = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scaling, **sides)
    assert isinstance(answer, torch.Tensor)  # only the output was requested
    return answer[None]


def borders_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _as_autocast(states: torch.Tensor) -> torch.Tensor:
    return states.to(kind_of(states))


@functools.cache
def why_not(device: torch.device, kind: torch.dtype, width: int, windowed: bool) -> str | None:
    """Why rows with heads of this width do not go through one kernel there. None: the kernel exists, and computes a few
    rows like plain products, forwards and backwards."""
    if importlib.util.find_spec(KERNEL) is None:
        return f"torch {torch.__version__} has no kernel for rows of any lengths"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        return "cards before Ampere have no kernel for rows of any lengths"
    try:
        right = _is_right(device, kind, width, 3 if windowed else None)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"the kernel for rows of any lengths does not take these ({first_line(error)})"
    return None if right else "the kernel for rows of any lengths computes something else"


def _is_right(device: torch.device, kind: torch.dtype, width: int, window: int | None) -> bool:
    lengths, random = (5, 1, 9), torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), width) for heads in (4, 2, 2)]
    states = [torch.randn(shape, generator=random).to(device, kind) for shape in shapes]
    given = torch.randn((1, sum(lengths), 4, width), generator=random).to(device, kind)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), _kept_as_it_is():
        q, k, v = ours = [one.clone().requires_grad_() for one in states]
        answer = attend(q, k, v, borders_of(lengths, device), max(lengths), None, window)
        q, k, v = theirs = [one.float().requires_grad_() for one in states]
        expected = _by_products(q, k, v, lengths, window)
        pairs = [(answer.detach(), expected.detach())]
        pairs += zip(
            torch.autograd.grad(answer, ours, given), torch.autograd.grad(expected, theirs, given.float()), strict=True
        )
    return all(bool((a.float() - b).abs().max() <= WITHIN * b.abs().max()) for a, b in pairs)


def _kept_as_it_is() -> contextlib.AbstractContextManager[None]:
    """Keeps what a backward pass needs as it is: a block that will be recomputed may ask first, and checkpointing would
    take these tensors for the block's own."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], window: int | None
) -> torch.Tensor:
    rows = []
    for q, k, v in zip(*(states[0].split(lengths, dim=1) for states in (query, key, value)), strict=True):
        shared = len(q) // len(k)
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)[None]
