"""What a card would do in a step, counted: kernels, bytes that they move, and operations of matrix products.

Every tensor that an operator is given is read once, and every one that it makes is written once: caches, and kernels
that read twice, are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .watch import name_of, tensors_of

NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view")
"""Operators that start nothing, beside views."""

KERNELS = {
    "bitsandbytes.gemm_4bit": 4, "_varlen_attn_backward": 3, "_scaled_dot_product_flash_attention_backward": 3,
    "slice_backward": 2, "select_backward": 2,
}  # fmt: skip
"""Of operators that start several: NF4's scales, their offset, its weight and the product; attention's own; zeros, and
a gradient that is copied into them."""

ATTENTION = ("_varlen_attn", "_varlen_attn_backward", "_scaled_dot_product_flash_attention",
             "_scaled_dot_product_flash_attention_backward")  # fmt: skip
"""Of causal rows behind each other, or side by side."""

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
LOSS = ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "nll_loss_forward",
        "nll_loss_backward", "amax", "gather", "scatter_add_")  # fmt: skip

SEEN_TWICE = ("index", "embedding", "index_select", "gather")
"""Operators that read as much of their first tensor as they write."""

SOME_ALONE = ("scatter_add_",)
"""Operators that change some numbers of their first tensor, those that the others name."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a card reaches in real kernels: assumed, below its data sheet's."""

    bytes: float  # a second
    operations: float  # a second, of products in 16 bit
    least_s: float  # of a kernel


CARDS = {
    "4090": Rates(bytes=0.9e12, operations=150e12, least_s=3e-6),
    "H100": Rates(bytes=2.6e12, operations=600e12, least_s=2.5e-6),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of a step, or of a part of it."""

    kernels: float = 0
    bytes: float = 0
    operations: float = 0
    seconds: tuple[float, ...] = (0.0,) * len(CARDS)  # by card

    @classmethod
    def of(cls, kernels: float, moved: float, operations: float) -> Work:
        """One call of an operator. By the roofline: it takes as long as its bytes or its products."""
        seconds = [
            max(moved / rates.bytes, operations / rates.operations, kernels * rates.least_s) for rates in CARDS.values()
        ]
        return cls(kernels=kernels, bytes=moved, operations=operations, seconds=tuple(seconds))

    def plus(self, other: Work, times: float = 1) -> Work:
        return Work(
            kernels=self.kernels + times * other.kernels,
            bytes=self.bytes + times * other.bytes,
            operations=self.operations + times * other.operations,
            seconds=tuple(mine + times * its for mine, its in zip(self.seconds, other.seconds, strict=True)),
        )


class Count(TorchDispatchMode):
    """Counts the operators that run in it, also in autograd's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = name_of(func)
        if not (name.startswith("prim.") or name in NO_KERNEL or _is_view(func)):
            read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            given, made = list(tensors_of((args, read))), list(tensors_of(out))
            for work in _works(name, args, given, made):
                self.by_operator[name] = self.by_operator[name].plus(work)
        return out


def kind_of(name: str) -> str:
    """The part of a step that an operator belongs to."""
    if name in PRODUCTS or name.startswith("bitsandbytes."):
        return "products"
    return "attention" if name in ATTENTION else "loss" if name in LOSS else "elementwise"


def _is_view(func: Any) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _works(name: str, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> Iterator[Work]:
    """One call; of a product over NF4 two: the weight is unpacked into 16 bit, then read for the product."""
    kernels, moved, operations = KERNELS.get(name, 1), _moved(name, given, made), _operations(name, args, given, made)
    if name != "bitsandbytes.gemm_4bit":
        yield Work.of(kernels, moved, operations)
        return
    weight, multiplied = 2 * math.prod(args[2]), _size(args[0]) + sum(map(_size, made))
    yield Work.of(kernels - 1, moved - multiplied + weight, 0)
    yield Work.of(1, weight + multiplied, operations)


def _moved(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    if name in SEEN_TWICE:
        return 2 * sum(map(_size, made))
    if name in SOME_ALONE:
        return 2 * sum(map(_size, given[1:]))
    read = {id(tensor): _size(tensor) for tensor in given}
    return sum(read.values()) + sum(map(_size, made))


def _size(tensor: torch.Tensor) -> int:
    """What is read of a tensor: one number may stand for many of an expanded one."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _operations(name: str, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> float:
    if name in PRODUCTS:
        left = [tensor for tensor in given if tensor.dim() >= 2][-2]
        return 2.0 * left.shape[-1] * made[0].numel()
    if name == "bitsandbytes.gemm_4bit":
        return 2.0 * args[0].numel() * args[2][0]
    if name in ATTENTION:  # causal: half of the square; backwards five products for two
        query, times = given[1 if name.endswith("backward") else 0], 2.5 if name.endswith("backward") else 1
        longest = query.shape[2] if name.startswith("_scaled") else next(one for one in args if type(one) is int)
        return times * 2.0 * query.numel() * longest
    return 0.0
