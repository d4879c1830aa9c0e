"""A card's kernels for RMS norms and rotary positions (RoFormer, arXiv:2104.09864): fewer of them, which move fewer
bytes, and round differently than a CPU's.

Step by step, a norm's gradient takes three times as long as the norm itself, in tensors of fp32: it has its own
backward pass, on a CPU too. There the forward bits are the model's own; a card's kernel rounds once where the model
rounds twice.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

PLACES = ("cuda",)
"""Kinds of devices that use them. A CPU's bits are promised, and it would gain nothing."""


def is_on_card(x: Any) -> bool:
    """Whether a tensor, or a model, is on such a device."""
    return x.device.type in PLACES


def row_norms(model: Any) -> Iterator[tuple[Any, Callable[[torch.Tensor], torch.Tensor]]]:
    """The frozen layers of a model that compute exactly what `RowNorm` does, and what may stand in for their
    forward()."""
    for module in model.modules():
        if _is_row_norm(module):
            yield module, functools.partial(_normed, module.weight, module.variance_epsilon)


def _is_row_norm(module: Any) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return False
    if weight.requires_grad or len(list(module.parameters())) > 1:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
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


NAME = "apply_rotary_pos_emb"
"""The name of the function in models' code."""

Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Rotary:
    """Puts `Turned` in place of a model's own function on a card, if it computes the same."""

    def __init__(self, model: Any) -> None:
        codes = {sys.modules[type(module).__module__] for module in model.modules()} if is_on_card(model) else set()
        found = {code: getattr(code, NAME, None) for code in codes}
        self._own = {code: own for code, own in found.items() if callable(own) and _turns_halves(own)}

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        before = {code: getattr(code, NAME) for code in self._own}
        for code, own in self._own.items():
            setattr(code, NAME, functools.partial(_turned, own))
        try:
            yield
        finally:
            for code, function in before.items():
                setattr(code, NAME, function)


@functools.cache
def _turns_halves(own: Turn) -> bool:
    """Whether a model's function rotates the first half of a head's numbers with the second half."""
    if list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8)]
    q, k, cos, sin = (torch.randn(shape, generator=draw) for shape in shapes)
    try:
        theirs = own(q, k, cos, sin)
    except RuntimeError:  # it takes other shapes
        return False
    ours = Turned.apply(q, k, cos[:, None], sin[:, None])
    return all(torch.allclose(mine, its, atol=1e-5) for mine, its in zip(ours, theirs, strict=True))


def _turned(
    own: Turn, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = q.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype
    if more or how or not whole or not is_on_card(q):
        return own(q, k, cos, sin, *more, **how)
    turned: tuple[torch.Tensor, torch.Tensor] = Turned.apply(q, k, cos[:, None], sin[:, None])
    return turned


class Turned(torch.autograd.Function):
    """x cos + (-x2, x1) sin of queries and keys, whose heads' halves are x1 and x2. Shapes: queries and keys (1, heads,
    tokens, width), cos and sin (1, 1, tokens, width)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turn(q, cos, first, second, 1), _turn(k, cos, first, second, 1)

    @staticmethod
    def backward(ctx: Any, of_q: torch.Tensor, of_k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        second, first = sin.chunk(2, dim=-1)  # each half comes from the other
        return _turn(of_q, cos, first, second, -1), _turn(of_k, cos, first, second, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, first: torch.Tensor, second: torch.Tensor, way: int) -> torch.Tensor:
    turned = x * cos
    (lower, upper), (before, behind) = turned.chunk(2, dim=-1), x.chunk(2, dim=-1)
    lower.addcmul_(behind, first, value=-way)
    upper.addcmul_(before, second, value=way)
    return turned
