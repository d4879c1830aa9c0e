"""Norms with a backward pass of their own are the model's, forwards bit for bit on a processor."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loractl.worker.engine.passes import card_kernels
from loractl.worker.engine.passes.card_kernels import row_norms


def norm(kind: type[torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    made = kind(48).to(dtype)
    made.weight.data.normal_(mean=1.0, std=0.2, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


@pytest.mark.long
@pytest.mark.parametrize("on_card", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_models_own_and_its_gradient_as_near_to_the_exact_one(
    base: torch.dtype, given: torch.dtype, on_card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card it rounds once, so its answer is at least as near, too."""
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",) if on_card else ())
    torch.manual_seed(0)
    theirs, ours = norm(LlamaRMSNorm, base), norm(LlamaRMSNorm, base)
    ((taken, forward),) = row_norms(torch.nn.Sequential(ours))
    assert taken is ours
    x = 3 * torch.randn(1, 7, 48).to(given)
    slope = torch.randn_like(theirs(x))
    found, gradients = [], []
    for module in (theirs, forward):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(module(leaf))
        found[-1].backward(slope)
        gradients.append(leaf.grad)
    assert found[0].dtype == found[1].dtype
    exact = x.double().requires_grad_()
    answer = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6) * theirs.weight.double()
    answer.backward(slope.double())
    if not on_card:
        assert torch.equal(*found)
    for other, own, right in ((*found, answer.detach()), (*gradients, exact.grad)):
        distances = [float((one.detach().double() - right).norm()) for one in (other, own)]
        assert distances[1] <= max(1.05 * distances[0], 1e-6 * float(right.norm()))


def test_a_norm_of_another_kind_or_one_that_is_trained_stays_as_it_is() -> None:
    other = norm(GemmaRMSNorm, torch.float32)
    trained = norm(LlamaRMSNorm, torch.float32).requires_grad_()
    assert not list(row_norms(torch.nn.Sequential(other, torch.nn.LayerNorm(48), trained)))
