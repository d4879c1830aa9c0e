"""RMS norms of a frozen base: on a card in one kernel, on a CPU with their own backward pass.

Step by step, a norm's gradient takes three times as long as the norm itself, in tensors of fp32. On a CPU the forward
bits are the model's own; a card's kernel rounds once where the model rounds twice.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from .card_kernels import is_on_card


def take_over_norms(model: Any) -> None:
    """The layers in a view of a frozen base that compute exactly what `RowNorm` does."""
    for module in model.modules():
        if _is_row_norm(module):
            module.forward = functools.partial(_normed, module.weight, module.variance_epsilon)


def _is_row_norm(module: Any) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return False
    if len(list(module.parameters())) > 1 or len(inspect.signature(module.forward).parameters) != 1:
        return False
    draw = torch.Generator().manual_seed(0)
    # tried with other numbers: its own may all be one, and may be on a card
    other = torch.randn(len(weight), generator=draw).to(weight.dtype)
    some = torch.randn(3, len(weight), generator=draw).to(weight.dtype)
    with torch.no_grad():
        return all(
            torch.equal(torch.func.functional_call(module, {"weight": other}, x), RowNorm.apply(x, other, epsilon))
            for x in (some, some.float())
        )


def _normed(weight: torch.Tensor, epsilon: float, hidden_states: torch.Tensor) -> torch.Tensor:
    if is_on_card(hidden_states) and hidden_states.dtype == weight.dtype:
        with torch.autocast(hidden_states.device.type, enabled=False):  # which would widen both
            return F.rms_norm(hidden_states, weight.shape, weight, epsilon)
    found: torch.Tensor = RowNorm.apply(hidden_states, weight, epsilon)
    return found


class RowNorm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + epsilon), in fp32 until `w` (arXiv:1910.07467). Shapes: x (..., width), w (width)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, inverse)
        ctx.weight = weight
        even = wide * inverse if wide is x else wide.mul_(inverse)
        return weight * even.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        x, inverse = ctx.saved_tensors
        wide, slope, weight = x.float(), given.float(), ctx.weight.float()
        slope = slope * weight if slope is given else slope.mul_(weight)
        along = (slope * wide).sum(-1, keepdim=True) * inverse.pow(3) / -wide.shape[-1]
        return slope.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None
