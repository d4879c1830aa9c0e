"""Rotary positions (RoFormer, arXiv:2104.09864) on a card, in fewer kernels than a model's own code."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .card_kernels import is_on_card

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
