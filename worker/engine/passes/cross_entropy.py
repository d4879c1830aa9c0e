"""Cross-entropy whose gradient is made with it: the logits are read once, and one tensor of their size is held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from .scratch import Scratch


class SummedLosses(torch.autograd.Function):
    """The summed cross-entropy of each training's tokens, in nats, with smoothed labels (arXiv:1512.00567). All are
    learned from; trainings lie behind each other, `lengths` tokens each.

    Shapes: logits (tokens, words), targets (tokens), and of the answer (trainings). `scratch`: what is made of the
    logits lies there, over the logits themselves where they do. One backward pass alone: it uses the tensor up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        lengths: Sequence[int],
        smoothings: Sequence[float],
        scratch: Scratch | None,
    ) -> torch.Tensor:
        ctx.kind, ctx.lengths = logits.dtype, lengths
        over = scratch is not None and scratch.holds(logits)
        if logits.dtype is not torch.float32:
            logits, over = (logits.float() if scratch is None else scratch.take(*logits.shape).copy_(logits)), True
        expected, most = targets[:, None], logits.amax(-1)
        of_target = logits.gather(-1, expected)[:, 0]
        parts = [slice(end - length, end) for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)]
        of_all = [
            logits[part].mean(-1) if smoothing else None for part, smoothing in zip(parts, smoothings, strict=True)
        ]
        chances = torch.softmax(logits, -1, out=logits) if over else torch.softmax(logits, -1)
        spread = chances.amax(-1).log()  # the largest logit less what all of them sum up to
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
        ctx.save_for_backward(chances)
        return torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        for part, own in zip(gradient.split(ctx.lengths), given, strict=True):
            part.mul_(own)
        gradient = gradient.to(ctx.kind)
        return gradient, None, None, None, None
