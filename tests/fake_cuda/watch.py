"""Looks at every operator of a step: where its tensors lie, which types meet, what is started and moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ONE_TYPE = (
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm", "_varlen_attn", "_varlen_attn_backward",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_fused_rms_norm",
)  # fmt: skip
"""Operators whose CUDA kernels take one type alone, in their first three tensors."""

MOVES = ("_to_copy", "copy_")
"""Operators that may read a processor's tensor: they bring it to the card."""


class Watch(TorchDispatchMode):
    """Faults of the operators that run in it, also in autograd's thread, and how many there were of each."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.moved = 0  # tensors that came from the processor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = name_of(func)
        if name.startswith("prim.") or name == "lift_fresh":  # a number of Python's becomes a tensor
            return out
        given, made = list(tensors_of((args, kwargs))), list(tensors_of(out))
        self.operators[name] += 1
        self._look_at_places(name, given, made)
        kinds = {tensor.dtype for tensor in given[:3] if tensor.is_floating_point()}
        if name in ONE_TYPE and len(kinds) > 1:
            self.faults[f"{name} of mixed types: {', '.join(sorted(map(str, kinds)))}"] += 1
        return out

    def _look_at_places(self, name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        away = [t for t in given if _is_away(t)]
        if name in MOVES and all(tensor.device.type == "cuda" for tensor in made):
            self.moved += len(away)
        elif away or any(map(_is_away, made)):
            self.faults[f"{name} on a processor's tensor of shape {[tuple(t.shape) for t in (away or made)]}"] += 1


def name_of(func: Any) -> str:
    """An operator's name: without a namespace where it is torch's own, and without its overload."""
    namespace, _, name = func._schema.name.partition("::")
    return name if namespace in ("aten", "torch_attn") else f"{namespace}.{name}"


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _is_away(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not on the card; a processor's single number may meet a card's tensors."""
    return tensor.device.type != "cuda" and tensor.dim() > 0
