"""What a card would answer, where a fake one cannot: its capability, its random numbers, and what a kernel computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import dora
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from loractl.worker.base import shared_heads
from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import LearnedTokens
from loractl.worker.engine.passes import attention, card_kernels
from loractl.worker.engine.passes.lean import RowsBehindEachOther

CARD = torch.device("cuda", 0)

BF16 = (8, 0)
"""The compute capability from which a card computes in bf16."""

FLASH = (torch.float16, torch.bfloat16)
"""Types that the kernel for rows of any lengths takes (pytorch, aten/src/ATen/native/transformers/cuda/flash_attn)."""

WIDEST = 256
"""Width of a head up to which it does."""

NARROWER = ((8, 6), (8, 9), (12, 0)), 192
"""Cards with less memory on their chips, and the width of a head up to which FlashAttention has a backward pass there
(aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""

OWN = ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
"""Operators with a kernel of their own on a card, which a torch without CUDA makes of others."""


@contextlib.contextmanager
def card(capability: tuple[int, int] = (8, 9)) -> Iterator[FakeTensorMode]:
    """Tensors that are made in this block are fake, and there is a card of this capability for them."""
    of: dict[Any, Any] = {kind: kind.of for kind in (RowsBehindEachOther, LearnedTokens)}

    def laid(cls: Any, rows: Sequence[TokenRow], device: torch.device) -> Any:
        """Laid out for real on the processor, whose tensors are then copied to the card."""
        with _disable_current_modes(), unset_fake_temporarily():
            made = of[cls](rows, torch.device("cpu"))
        tensors = {one.name: getattr(made, one.name) for one in fields(made)}
        moved = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        }
        return replace(made, **moved)

    def right(device: torch.device, kind: torch.dtype, width: int, window: int | None) -> bool:
        """As the kernel would find itself on a card that has it."""
        if kind not in FLASH or width > WIDEST:
            raise RuntimeError(f"FlashAttention takes no {kind} of width {width}")
        return True

    def takes_flash(params: Any, debug: bool = False) -> bool:
        """As that file has it, for tensors that want gradients."""
        (small, most), query = NARROWER, params.query
        widest = most if capability in small and query.requires_grad else WIDEST
        able = capability >= BF16 and query.dtype in FLASH and query.shape[-1] <= widest
        return able and params.attn_mask is None

    def takes_efficient(params: Any, debug: bool = False) -> bool:
        """Its fused kernel for older cards, fp32 and masks."""
        return not params.enable_gqa

    def tried(question: Any) -> Any:
        """Asked of numbers on the processor, which are no fake ones."""

        def ask(about: Any) -> bool:
            with _disable_current_modes(), unset_fake_temporarily():
                return bool(question(about))

        return ask

    _forget()
    said = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= BF16,
        "get_rng_state": lambda device="cuda": Dice.state,
        "set_rng_state": lambda state, device="cuda": None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in said.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for kind in of:
            stack.enter_context(patch.object(kind, "of", classmethod(laid)))
        stack.enter_context(patch.object(attention, "_is_right", right))
        stack.enter_context(patch.object(torch.backends.cuda, "can_use_flash_attention", takes_flash))
        stack.enter_context(patch.object(torch.backends.cuda, "can_use_efficient_attention", takes_efficient))
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", _attend))
        stack.enter_context(patch.object(card_kernels, "_is_row_norm", tried(card_kernels._is_row_norm)))
        stack.enter_context(patch.object(card_kernels, "_turns_halves", tried(card_kernels._turns_halves)))
        stack.enter_context(patch.object(torch.nn.Module, "to", _to))
        stack.enter_context(patch.object(dora, "dequantize_module_weight", _dequantized))
        kernels = stack.enter_context(torch.library._scoped_library("aten", "IMPL", "CUDA"))
        for name in OWN:
            kernels.impl(name, _no_kernel)
        # where there is a card it would bring up CUDA, and let torch.tensor write there
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", True))
        # peft copies layers, and a copied tensor brought a copy of its mode
        stack.enter_context(patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        yield stack.enter_context(FakeTensorMode())
    _forget()


def _forget() -> None:
    """What was found out of a card."""
    attention.why_no_kernel.cache_clear()
    shared_heads.are_fused.cache_clear()


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """By the kernel that torch would pick on a card: FlashAttention, else the efficient one, else plain products."""
    q, k, v = (one.to(shared_heads.kind_of(one)) for one in (query, key, value))
    params = torch.backends.cuda.SDPAParams(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
    if torch.backends.cuda.can_use_flash_attention(params):
        answer = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    elif torch.backends.cuda.can_use_efficient_attention(params):
        bias = None if attn_mask is None else _as_bias(attn_mask, q)
        learns = torch.is_grad_enabled()
        answer = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, learns, dropout_p, is_causal, scale=scale
        )[0]
    else:
        answer = PLAIN(q, k, v, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    found: torch.Tensor = answer
    return found


PLAIN = functional.scaled_dot_product_attention
"""Of a torch without CUDA: it has no fused kernel for a card's tensors."""


def _as_bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What is added to the scores, for each head: as torch makes it of a mask of truth values."""
    added = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return added.expand(query.shape[0], query.shape[1], query.shape[2], mask.shape[-1])


class Dice(torch.Generator):
    """A card's generator: a torch without CUDA makes none."""

    device = CARD
    state = "where it stands"

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> Any:
        assert state == self.state
        return self


def _no_kernel(*_: Any) -> Any:
    raise AssertionError("a tensor without content was computed")


def _to(module: torch.nn.Module, *where: Any, **how: Any) -> torch.nn.Module:
    """torch's own swaps the tensors of a parameter, which it refuses for fake ones."""
    device, kind, *_ = torch._C._nn._parse_to(*where, **how)
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def move(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in moved:
            as_before = kind is None or not old.is_floating_point()
            new = torch.empty(old.shape, dtype=old.dtype if as_before else kind, device=device or old.device)
            trained = isinstance(old, torch.nn.Parameter)
            moved[id(old)] = old, torch.nn.Parameter(new, requires_grad=old.requires_grad) if trained else new
        return moved[id(old)][1]

    for part in module.modules():
        part._parameters |= {name: p if p is None else move(p) for name, p in part._parameters.items()}
        part._buffers |= {name: b if b is None else move(b) for name, b in part._buffers.items()}
    return module


def _dequantized(module: Any) -> torch.Tensor:
    """peft knows weights in NF4 by their class, which a fake tensor can't have."""
    state = getattr(module.weight, "quant_state", None)
    whole: torch.Tensor = module.weight if state is None else dequantize_4bit(module.weight.data, state)
    return whole
