"""Rotary positions in fewer kernels: the model's own numbers, where its code turns halves of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from loractl.worker.engine.loss import MicroBatch, learned_in
from loractl.worker.engine.passes import card_kernels
from loractl.worker.engine.passes.card_kernels import NAME, Rotary, Turned
from loractl.worker.engine.passes.lean import LeanPass

from .test_lean import FP32, adapted, base_of, spec_of
from .test_trainings import rows


@pytest.fixture(autouse=True)
def _on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",))


@pytest.mark.long
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "tokens", "width"), [(4, 2, 7, 8), (3, 1, 1, 6), (14, 2, 33, 64)])
def test_queries_and_keys_are_turned_as_near_to_the_exact_ones(
    kind: torch.dtype, heads: int, groups: int, tokens: int, width: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    # a projection's answer: heads of a token lie behind each other
    states = [torch.randn(1, tokens, n, width, generator=draw).to(kind).transpose(1, 2) for n in (heads, groups)]
    cos, sin = (torch.randn(1, tokens, width, generator=draw).to(kind) for _ in range(2))
    slopes = [torch.randn(one.shape, generator=draw).to(kind) for one in states]

    def found(turn: Any, to: torch.dtype, *angles: torch.Tensor) -> list[torch.Tensor]:
        leaves = [one.to(to).detach().requires_grad_() for one in states]
        turned = turn(*leaves, *(angle.to(to) for angle in angles))
        torch.autograd.backward(turned, [slope.to(to) for slope in slopes])
        return [*(one.detach() for one in turned), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    exact = found(modeling_llama.apply_rotary_pos_emb, torch.float64, cos, sin)
    theirs = found(modeling_llama.apply_rotary_pos_emb, kind, cos, sin)
    ours = found(Turned.apply, kind, cos[:, None], sin[:, None])
    assert all(mine.transpose(1, 2).is_contiguous() for mine in ours[:2]), "where the projections' answers lie so"
    for mine, its, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == kind and mine.shape == right.shape
        assert float((mine - right).norm()) <= max(1.2 * float((its - right).norm()), 1e-7 * float(right.norm()))


@pytest.mark.parametrize(
    ("family", "taken"), [("Llama", True), ("Qwen3", True), ("Mixtral", True), ("Cohere", False), ("GPT2", False)]
)
def test_a_family_s_own_function_is_replaced_where_it_turns_halves(family: str, taken: bool) -> None:
    """Cohere turns neighbours, GPT-2 nothing."""
    model = base_of(family)
    code = __import__(type(model).__module__, fromlist=[NAME])
    own = getattr(code, NAME, None)
    with Rotary(model).taken_over():
        assert (getattr(code, NAME, None) is not own) == taken
    assert getattr(code, NAME, None) is own


@pytest.mark.long
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Gemma3Text"])
def test_a_step_learns_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX turns a quarter of each head, and keeps its own way to. With recomputation."""
    found = []
    for places in ((), ("cpu",)):
        monkeypatch.setattr(card_kernels, "PLACES", places)
        forward = LeanPass(adapted(base_of(family), spec_of()), FP32)
        forward.recompute_blocks()
        batch = MicroBatch(rows=(some := rows(2, 0)), learned=learned_in(some), pieces=1)
        forward.learn(batch, torch.autograd.backward)
        trained = [p.grad.flatten() for p in forward.model.parameters() if p.grad is not None]
        found.append(torch.cat(trained))
    assert float(found[0].norm()) > 0
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-5
