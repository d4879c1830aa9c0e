"""Products on a CPU whose bits do not depend on which other trainings share the pass.

A library's rounding may depend on the number of rows it gets. In 16 bit its kernels for tiles (AMX) add up a row's
products in pieces whose size depends on that number, so each training's tokens are multiplied separately. In fp32 MKL
can be set to add up in one order (base/processor.py). Whether it does, for products of a base's shapes and with this
number of threads, is tested on the machine itself (`unsteady`) before two trainings share them; if it does not, their
tokens are multiplied separately in fp32, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from . import wide

FEW = 32
"""For fewer rows a library uses other kernels, with other bits: on AMD's Zen 4 MKL did so below 4, whatever its
settings. A training with fewer tokens in a pass is multiplied separately on any machine."""

PASSES = (
    (32, 32), (33, 57), (40, 88, 64), (128, 128), (90, 167, 43), (60,) * 8, (256, 256), (45, 577, 100), (512, 512),
)  # fmt: skip
"""Tokens of trainings in the passes that `unsteady` compares. Depending on shape and number of threads, differences
appeared from 66 rows on, from 256, or only at 1,024."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The properties of a linear layer by which a library may pick a kernel."""

    outputs: int
    inputs: int
    biased: bool
    turned: bool  # its weight is in memory as (inputs, outputs)
    stored: torch.dtype  # of the weight; a 16-bit weight is widened

    def __str__(self) -> str:
        notes = " with a bias" * self.biased + ", turned" * self.turned
        return f"{self.inputs} to {self.outputs}{notes}, {str(self.stored).removeprefix('torch.')}"

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A weight of shape (outputs, inputs) and a bias."""
        sides = (self.inputs, self.outputs) if self.turned else (self.outputs, self.inputs)
        weight = torch.randn(*sides, generator=generator).to(self.stored)
        bias = torch.randn(self.outputs, generator=generator).to(self.stored) if self.biased else None
        return weight.T if self.turned else weight, bias


def pieces(lengths: Sequence[int], *, steady: bool) -> Sequence[int]:
    """How many rows are multiplied at a time: each training's own, or neighbours together if products are steady."""
    if not steady or len(lengths) < 2:
        return lengths
    found, joined = list[int](), False
    for length in lengths:
        if length >= FEW and joined:
            found[-1] += length
        else:
            found.append(length)
        joined = length >= FEW
    return found


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lengths: Sequence[int]) -> torch.Tensor:
    """x W^T + bias of shape (tokens, outputs); `weight` is (outputs, inputs). `lengths`: rows multiplied at a time."""
    answer = x.new_empty(len(x), len(weight))
    for own, to in zip(x.split(lengths), answer.split(lengths), strict=True):
        if bias is None:
            torch.mm(own, weight.T, out=to)
        else:
            torch.addmm(bias, own, weight.T, out=to)
    return answer


def input_gradient(given: torch.Tensor, weight: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """given W, of shape (tokens, inputs). `lengths`: rows multiplied at a time."""
    back = given.new_empty(len(given), weight.shape[1])
    for own, to in zip(given.split(lengths), back.split(lengths), strict=True):
        torch.mm(own, weight, out=to)
    return back


def each(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The output of a layer of any kind for each training's tokens of `x`, of shape (..., tokens, width)."""
    return torch.cat([layer(own) for own in x.split(lengths, dim=-2)], dim=-2)


def unsteady(shapes: Iterable[LayerShape]) -> str | None:
    """In words, the first of these layers whose fp32 products, forward or backward, have other bits among others' rows
    than alone; None if there is none. It takes about as long as a step of all `PASSES`."""
    draw = torch.Generator().manual_seed(0)
    for shape in shapes:
        weight, bias = shape.draw(draw)
        forward, backward = (product, input_gradient) if shape.stored is torch.float32 else _WIDE
        for lengths in PASSES:
            x, given = (torch.randn(sum(lengths), width, generator=draw) for width in (shape.inputs, shape.outputs))
            answers = (forward(x, weight, bias, parts) for parts in ([len(x)], lengths))
            gradients = (backward(given, weight, parts) for parts in ([len(x)], lengths))
            for what, (together, each) in (("answers", answers), ("gradients", gradients)):
                if not torch.equal(together, each):
                    return f"{shape}: {what} of {len(x)} rows have other bits than those of {lengths[0]} of them"
    return None


_WIDE = wide.product, wide.input_gradient
