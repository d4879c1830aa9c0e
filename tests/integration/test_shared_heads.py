"""Heads that share keys and values, where no fused kernel takes them: repeated, they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from loractl.worker.base import shared_heads
from loractl.worker.base.shared_heads import are_fused, repeat_where_needed


def test_a_processor_has_a_fused_kernel_for_them() -> None:
    assert are_fused(torch.device("cpu"), torch.float32, 64)


def test_repeated_keys_and_values_give_the_same_answers_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, asked = functional.scaled_dot_product_attention, list[bool]()

    def attention(*states: Any, enable_gqa: bool = False, **how: Any) -> torch.Tensor:
        asked.append(enable_gqa)
        return attend(*states, enable_gqa=enable_gqa, **how)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    repeat_where_needed()
    together = _passed()
    assert set(asked) == {True}, "torch takes them as they are"
    asked.clear()
    monkeypatch.setattr(shared_heads, "are_fused", lambda *_: False)
    apart = _passed()
    assert set(asked) == {False}
    for ours, theirs in zip(apart, together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _passed() -> list[torch.Tensor]:
    """A small model's answer, and its weights' gradients."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    answer = model(torch.arange(20)[None] % 32, use_cache=False).last_hidden_state
    answer.square().sum().backward()
    return [answer.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
