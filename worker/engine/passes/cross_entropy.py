"""Cross-entropy computed together with its gradient: the logits are read once, and one tensor of their size is held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from .card_kernels import is_on_card
from .scratch import Scratch


def widened(logits: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
    """Logits in fp32. `scratch`: 16-bit logits are copied there."""
    if logits.dtype is torch.float32:
        return logits
    return logits.float() if scratch is None else scratch.take(*logits.shape).copy_(logits)


def summed_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lengths: Sequence[int],
    smoothings: Sequence[float],
    scratch: Scratch | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The summed cross-entropy of each training's tokens, in nats, with smoothed labels (arXiv:1512.00567), and the
    gradient of all sums with respect to the logits. All tokens are learned; trainings are concatenated, `lengths`
    tokens each.

    Shapes: logits and gradient (tokens, words) in fp32, targets (tokens). If the logits are in `scratch`, the gradient
    overwrites them.
    """
    expected, (most, where) = targets[:, None], _largest(logits)
    of_target = logits.gather(-1, expected)[:, 0]
    parts = [slice(end - length, end) for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
    of_all = [logits[part].mean(-1) if smoothing else None for part, smoothing in zip(parts, smoothings, strict=True)]
    over = scratch is not None and scratch.holds(logits)
    chances = torch.softmax(logits, -1, out=logits) if over else torch.softmax(logits, -1)
    # the largest logit minus their log-sum-exp
    spread = (chances.amax(-1) if where is None else chances.gather(-1, where)[:, 0]).log()
    losses, sums = most - of_target - spread, []
    for part, smoothing, mean in zip(parts, smoothings, of_all, strict=True):
        own = losses[part]
        if mean is not None:
            own = (1 - smoothing) * own + smoothing * (most[part] - mean - spread[part])
        lessened = torch.full_like(expected[part], smoothing - 1, dtype=chances.dtype)
        chances[part].scatter_add_(-1, expected[part], lessened)
        if smoothing:
            chances[part] -= smoothing / chances.shape[-1]
        sums.append(own.sum())
    return sums, chances


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest logit of each token; on a card also its index, so that the largest probability need not be
    searched."""
    if not is_on_card(logits):
        return logits.amax(-1), None
    most, where = logits.max(-1, keepdim=True)
    return most[:, 0], where


def scaled(
    gradient: torch.Tensor, lengths: Sequence[int], scales: Sequence[torch.Tensor], kind: torch.dtype
) -> torch.Tensor:
    """The gradient in the logits' own type, each training's times its scale. It consumes the gradient."""
    if is_on_card(gradient) and kind is not gradient.dtype:
        narrow = torch.empty_like(gradient, dtype=kind)
        for part, scale, to in zip(gradient.split(lengths), scales, narrow.split(lengths), strict=True):
            torch.mul(part, scale, out=to)
        return narrow
    for part, scale in zip(gradient.split(lengths), scales, strict=True):
        part.mul_(scale)
    return gradient.to(kind)


class LateGradient(torch.autograd.Function):
    """The start of a backward pass whose gradient is given later, in a list. Nothing else holds it then, so its memory
    is freed as soon as it has been used."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, gradient: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradient = gradient
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return ctx.gradient.pop(), None
