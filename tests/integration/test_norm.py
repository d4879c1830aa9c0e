"""Norms with a backward pass of their own are the model's, forwards bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loractl.worker.engine.passes.norm import take_over_norms


def norm(kind: type[torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    made = kind(48).to(dtype)
    made.weight.data.normal_(mean=1.0, std=0.2, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_models_own_and_its_gradient_as_near_to_the_exact_one(
    base: torch.dtype, given: torch.dtype
) -> None:
    torch.manual_seed(0)
    theirs, ours = norm(LlamaRMSNorm, base), norm(LlamaRMSNorm, base)
    take_over_norms(torch.nn.Sequential(ours))
    x = 3 * torch.randn(1, 7, 48).to(given)
    slope = torch.randn_like(theirs(x))
    found, gradients = [], []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        found.append(module(leaf))
        found[-1].backward(slope)
        gradients.append(leaf.grad)
    assert torch.equal(*found) and "forward" in ours.__dict__
    exact = x.double().requires_grad_()
    (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6) * theirs.weight.double()).backward(slope.double())
    other, own = (float((gradient.double() - exact.grad).norm()) for gradient in gradients)
    assert own <= max(1.05 * other, 1e-6 * float(exact.grad.norm()))


def test_a_norm_of_another_kind_stays_as_it_is() -> None:
    other = norm(GemmaRMSNorm, torch.float32)
    take_over_norms(torch.nn.Sequential(other, torch.nn.LayerNorm(48)))
    assert "forward" not in other.__dict__
