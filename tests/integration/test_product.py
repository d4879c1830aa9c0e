"""A linear layer of a shared base: what its product and its adapters' factors cost and compute."""

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
from loractl.worker.engine.passes import card_kernels, product, wide
from loractl.worker.engine.passes.choice import shared_base
from loractl.worker.engine.passes.product import FrozenProduct
from loractl.worker.engine.passes.shared import Piece, SharedBase, SharedPass
from loractl.worker.engine.streams import RandomStreams

from .test_lean import BF16, FP32, adapted, spec_of
from .test_pack import rows


@pytest.mark.parametrize(("every", "blocks"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_block_that_is_recomputed_does_not_make_its_last_product_again(
    tiny_model: Path, method: str, every: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the next block needs it, and that has had it."""
    base = shared_base(load_base(str(tiny_model), Method(method), "cpu", BF16), BF16)
    assert base is not None
    forward = SharedPass(base, add_adapter(base.view(), spec_of(method, lora={"lora_dropout": 0.1}), Method(method)))
    forward.model.train()
    forward.recompute_blocks(every)
    made: Counter[tuple[int, int]] = Counter()
    own = FrozenProduct.__call__

    def count(product: FrozenProduct, *args: Any, **how: Any) -> torch.Tensor:
        made[product.shape.inputs, product.shape.outputs] += 1
        return own(product, *args, **how)

    monkeypatch.setattr(FrozenProduct, "__call__", count)
    batch = MicroBatch(rows=(some := rows(2, 0)), learned=learned_in(some), pieces=1)
    forward.learn(batch, torch.autograd.backward)
    assert made[64, 128] == 2 * 2 + 2 * blocks, "gate and up of two blocks, forwards and again"
    assert made[128, 64] == 2, "down, forwards alone"


@pytest.mark.parametrize(("method", "unpacked"), [("lora", 0), ("qlora", 0), ("qlora", 10_000)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_card_s_way_learns_what_a_processor_s_does(
    tiny_model: Path, method: str, unpacked: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same masks, for two trainings of odd lengths that adapt other layers, in fp32."""
    monkeypatch.setattr(product, "UNPACKED", unpacked)
    theirs = gradients(tiny_model, method, dropout, FP32)
    monkeypatch.setattr(card_kernels, "PLACES", ("cpu",))
    ours = gradients(tiny_model, method, dropout, FP32)
    assert float(theirs.norm()) > 0 and float((ours - theirs).norm() / theirs.norm()) < 1e-5


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
        base, pieces = trainings(tiny_model, "lora", 0.0, BF16)
        base.learn(pieces)
        named = [named for piece in pieces for named in piece.model.named_parameters() if named[1].requires_grad]
        for name, p in named:
            p.data *= "lora_A" in name
            p.grad = None
        base.learn(pieces)
    assert all(bool(p.grad.any()) == ("lora_B" in name) for name, p in named)


def gradients(folder: Path, method: str, dropout: float, precision: Precision) -> torch.Tensor:
    """Of two trainings that pass a base together, with recomputation."""
    base, pieces = trainings(folder, method, dropout, precision)
    base.learn(pieces, recomputes=1)
    trained = [p for piece in pieces for p in piece.model.parameters() if p.requires_grad]
    return torch.cat([p.grad.double().flatten() for p in trained if p.grad is not None])


def trainings(folder: Path, method: str, dropout: float, precision: Precision) -> tuple[SharedBase, list[Piece]]:
    base = shared_base(load_base(str(folder), Method(method), "cpu", precision), precision)
    assert base is not None
    pieces = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        targets = ["q_proj", "up_proj", "down_proj"] if seed else "all-linear"
        spec = spec_of(method, lora={"lora_dropout": dropout, "target_modules": targets})
        model = adapted(base.view(), spec, precision)
        forward = SharedPass(base, model, streams=RandomStreams(torch.device("cpu")))
        batch = MicroBatch(rows=(some := rows(8, seed, lengths=range(5, 40))), learned=learned_in(some), pieces=1)
        pieces.append(forward.piece(batch, torch.autograd.backward))
    return base, pieces
