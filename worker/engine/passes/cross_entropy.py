"""Cross-entropy whose gradient is made with it: the logits are read once, and one tensor of their size is held."""

from __future__ import annotations

from typing import Any

import torch


class SummedLoss(torch.autograd.Function):
    """The summed cross-entropy of tokens, in nats, with smoothed labels (arXiv:1512.00567). All are learned from.

    Shapes: logits (tokens, words) in fp32, targets (tokens). One backward pass alone: it uses the tensor up.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        chances, expected, most = torch.softmax(logits, -1), targets[:, None], logits.amax(-1)
        spread = chances.amax(-1).log()  # the largest logit less what all of them sum up to
        losses = most - logits.gather(-1, expected)[:, 0] - spread
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (most - logits.mean(-1) - spread)
        chances.scatter_add_(-1, expected, torch.full_like(expected, smoothing - 1, dtype=chances.dtype))
        if smoothing:
            chances -= smoothing / chances.shape[-1]
        ctx.save_for_backward(chances)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(given), None, None
