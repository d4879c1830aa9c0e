"""Products in 16 bit on a processor, of one training's tokens at a time.

The library rounds by the number of rows that it is given. Its kernels for tiles (AMX) add up a row's products in pieces
whose size they pick by that number, so a row among 256 may differ in its last digit from the same row among 64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def rounds_by_rows(device: torch.device, kind: torch.dtype) -> bool:
    """Whether products of this type may depend there on how many rows are multiplied."""
    return device.type == "cpu" and kind in (torch.bfloat16, torch.float16)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lengths: Sequence[int]) -> torch.Tensor:
    """x W^T + bias of shape (tokens, outputs); `weight` is (outputs, inputs), `lengths` are each training's tokens."""
    answer = x.new_empty(len(x), len(weight))
    for own, to in zip(x.split(lengths), answer.split(lengths), strict=True):
        if bias is None:
            torch.mm(own, weight.T, out=to)
        else:
            torch.addmm(bias, own, weight.T, out=to)
    return answer


def input_gradient(given: torch.Tensor, weight: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """given W, of shape (tokens, inputs)."""
    back = given.new_empty(len(given), weight.shape[1])
    for own, to in zip(given.split(lengths), back.split(lengths), strict=True):
        torch.mm(own, weight, out=to)
    return back


def each(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """What a layer of any kind answers to each training's tokens of `x`, of shape (..., tokens, width)."""
    return torch.cat([layer(own) for own in x.split(lengths, dim=-2)], dim=-2)
