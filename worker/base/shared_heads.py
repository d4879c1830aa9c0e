"""Heads that share keys and values, on cards where torch has no fused kernel for them.

transformers leaves the sharing to torch on every card. Before Ampere, in fp32 and for wide heads torch 2.13 then takes
plain products, which hold the scores of each head: the square of a row. With keys and values for each head it takes its
efficient kernel, which holds none.
"""

from __future__ import annotations

import functools

import torch
from transformers.integrations import sdpa_attention

_LEAVES_IT = sdpa_attention.use_gqa_in_sdpa


def repeat_where_needed() -> None:
    """From now on, repeat keys and values if no fused kernel takes heads that share them."""
    sdpa_attention.use_gqa_in_sdpa = _leaves_it_to_torch


def kind_of(states: torch.Tensor) -> torch.dtype:
    """The type in which attention computes: autocast's, which a fused kernel of torch would get."""
    place = states.device.type
    return torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else states.dtype


@functools.cache
def are_fused(device: torch.device, kind: torch.dtype, width: int) -> bool:
    """Whether a fused kernel there takes heads of this width that share keys and values, and has a backward pass."""
    if device.type != "cuda":
        return True  # a CPU kernel does
    query, key = (torch.empty(1, heads, 16, width, dtype=kind, device=device, requires_grad=True) for heads in (2, 1))
    asked = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, True)
    ways = (torch.backends.cuda.can_use_flash_attention, torch.backends.cuda.can_use_efficient_attention)
    return any(takes(asked) for takes in ways)


def _leaves_it_to_torch(mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> bool:
    return _LEAVES_IT(mask, key, value) and are_fused(key.device, kind_of(key), key.shape[-1])
