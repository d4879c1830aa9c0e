"""Cross-entropy whose gradient is made with it: the logits are read once, and one tensor of their size is held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch


class SummedLosses(torch.autograd.Function):
    """The summed cross-entropy of each training's tokens, in nats, with smoothed labels (arXiv:1512.00567). All are
    learned from; trainings lie behind each other, `lengths` tokens each.

    Shapes: logits (tokens, words) in fp32, targets (tokens), and of the answer (trainings). `over`: the logits may be
    written over, since nothing else needs them. One backward pass alone: it uses the tensor up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        lengths: Sequence[int],
        smoothings: Sequence[float],
        over: bool,
    ) -> torch.Tensor:
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
        ctx.lengths = lengths
        return torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        for part, own in zip(gradient.split(ctx.lengths), given, strict=True):
            part.mul_(own)
        return gradient, None, None, None, None
