"""A frozen linear layer with an adapter: what its product costs and computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.method import Method
from loractl.worker.base.arithmetic import Precision
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.engine.loss import MicroBatch, learned_in
from loractl.worker.engine.passes import card_kernels, fused, wide
from loractl.worker.engine.passes.fused import FrozenProduct
from loractl.worker.engine.passes.lean import LeanPass

from .test_lean import BF16, FP32, adapted, spec_of
from .test_trainings import rows


@pytest.mark.parametrize(("every", "blocks"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_block_that_is_recomputed_does_not_make_its_last_product_again(
    tiny_model: Path, method: str, every: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the next block needs it, and that has had it."""
    base = load_base(str(tiny_model), Method(method), "cpu", BF16)
    forward = LeanPass(add_adapter(base, spec_of(method, lora={"lora_dropout": 0.1}), Method(method)), BF16)
    forward.model.train()
    forward.recompute_blocks(every)
    made: Counter[tuple[int, int]] = Counter()
    own = FrozenProduct.__call__

    def count(product: FrozenProduct, *args: Any, **how: Any) -> torch.Tensor:
        made[product.inputs, product.outputs] += 1
        return own(product, *args, **how)

    monkeypatch.setattr(FrozenProduct, "__call__", count)
    batch = MicroBatch(rows=(some := rows(2, 0)), learned=learned_in(some), pieces=1)
    forward.learn(batch, torch.autograd.backward)
    assert made[64, 128] == 2 * 2 + 2 * blocks, "gate and up of two blocks, forwards and again"
    assert made[128, 64] == 2, "down, forwards alone"


@pytest.mark.long
@pytest.mark.parametrize(("method", "unpacked"), [("lora", 0), ("qlora", 0), ("qlora", 10_000)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_card_s_way_learns_what_a_processor_s_does(
    tiny_model: Path, method: str, unpacked: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same masks, for rows of odd lengths, in fp32."""
    monkeypatch.setattr(fused, "UNPACKED", unpacked)
    theirs = gradients(tiny_model, method, dropout, FP32)
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",))
    ours = gradients(tiny_model, method, dropout, FP32)
    assert float(theirs.norm()) > 0 and float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.long
def test_it_is_as_near_to_fp32_in_bf16(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradients(tiny_model, "lora", 0.1, FP32)
    with wide.narrow():
        theirs = gradients(tiny_model, "lora", 0.1, BF16)
        monkeypatch.setattr(card_kernels, "PLACES", ("cpu",))
        ours = gradients(tiny_model, "lora", 0.1, BF16)
    assert 0 < float((ours - exact).norm()) < 1.2 * float((theirs - exact).norm())


def test_a_card_casts_factors_anew_for_each_pass(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where B is zero, A has no gradient."""
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",))
    with wide.narrow():
        forward, batch = training(tiny_model, "lora", 0.0, BF16)
        forward.learn(batch, torch.autograd.backward)
        named = [(name, p) for name, p in forward.model.named_parameters() if p.requires_grad]
        for name, p in named:
            p.data *= "lora_A" in name
            p.grad = None
        forward.learn(batch, torch.autograd.backward)
    assert all(p.grad is not None and bool(p.grad.any()) == ("lora_B" in name) for name, p in named)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj", "down_proj"]])
def test_between_passes_every_layer_is_its_own_again(tiny_model: Path, targets: Any) -> None:
    forward, batch = training(tiny_model, "lora", 0.1, FP32, targets)
    before = {name: dict(module.__dict__) for name, module in forward.model.named_modules()}
    forward.learn(batch, torch.autograd.backward)
    after = {name: dict(module.__dict__) for name, module in forward.model.named_modules()}
    assert not any("forward" in own for own in after.values()) and before.keys() == after.keys()


def gradients(folder: Path, method: str, dropout: float, precision: Precision) -> torch.Tensor:
    """With recomputation."""
    forward, batch = training(folder, method, dropout, precision)
    forward.recompute_blocks()
    forward.learn(batch, torch.autograd.backward)
    trained = [p for p in forward.model.parameters() if p.requires_grad]
    return torch.cat([p.grad.double().flatten() for p in trained if p.grad is not None])


def training(
    folder: Path, method: str, dropout: float, precision: Precision, targets: Any = "all-linear"
) -> tuple[LeanPass, MicroBatch]:
    spec = spec_of(method, lora={"lora_dropout": dropout, "target_modules": targets})
    torch.manual_seed(0)
    forward = LeanPass(adapted(load_base(str(folder), Method(method), "cpu", precision), spec, precision), precision)
    return forward, MicroBatch(rows=(some := rows(8, 0, lengths=range(5, 40))), learned=learned_in(some), pieces=1)
