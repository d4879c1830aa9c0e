"""Cross-entropy computed together with its gradient: the logits are read once, and one tensor of their size is held."""

from __future__ import annotations

from typing import Any

import torch

from .card_kernels import is_on_card
from .wide import Scratch


def widened(logits: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
    """Logits in fp32. `scratch`: 16-bit logits are copied there."""
    if logits.dtype is torch.float32:
        return logits
    return logits.float() if scratch is None else scratch.take(*logits.shape).copy_(logits)


def summed_losses(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, scratch: Scratch | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of learned tokens, in nats, with smoothed labels (arXiv:1512.00567), and its gradient
    with respect to the logits.

    Shapes: logits and gradient (tokens, words) in fp32, targets (tokens). If the logits are in `scratch`, the gradient
    overwrites them.
    """
    expected, (most, where) = targets[:, None], _largest(logits)
    of_target = logits.gather(-1, expected)[:, 0]
    mean = logits.mean(-1) if smoothing else None
    over = scratch is not None and scratch.holds(logits)
    chances = torch.softmax(logits, -1, out=logits) if over else torch.softmax(logits, -1)
    # the largest logit minus their log-sum-exp
    spread = (chances.amax(-1) if where is None else chances.gather(-1, where)[:, 0]).log()
    losses = most - of_target - spread
    if mean is not None:
        losses = (1 - smoothing) * losses + smoothing * (most - mean - spread)
    lessened = torch.full_like(expected, smoothing - 1, dtype=chances.dtype)
    chances.scatter_add_(-1, expected, lessened)
    if smoothing:
        chances -= smoothing / chances.shape[-1]
    return losses.sum(), chances


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The largest logit of each token; on a card also its index, so that the largest probability need not be
    searched."""
    if not is_on_card(logits):
        return logits.amax(-1), None
    most, where = logits.max(-1, keepdim=True)
    return most[:, 0], where


def scaled(gradient: torch.Tensor, scale: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The gradient times its scale, in the logits' own type. It consumes the gradient."""
    if is_on_card(gradient) and kind is not gradient.dtype:
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=kind))
    return gradient.mul_(scale).to(kind)


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
