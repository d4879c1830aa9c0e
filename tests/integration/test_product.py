"""A linear layer of a shared base: what its product and its adapters' factors cost and compute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.method import Method
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.engine.loss import MicroBatch, learned_in
from loractl.worker.engine.passes.choice import shared_base
from loractl.worker.engine.passes.product import FrozenProduct
from loractl.worker.engine.passes.shared import SharedPass

from .test_lean import BF16, spec_of
from .test_pack import rows


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_block_that_is_recomputed_does_not_make_its_last_product_again(
    tiny_model: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the next block needs it, and that has had it."""
    base = shared_base(load_base(str(tiny_model), Method(method), "cpu", BF16), BF16)
    assert base is not None
    forward = SharedPass(base, add_adapter(base.view(), spec_of(method, lora={"lora_dropout": 0.1}), Method(method)))
    forward.model.train()
    forward.recompute_blocks()
    made: Counter[tuple[int, int]] = Counter()
    own = FrozenProduct.__call__

    def count(product: FrozenProduct, *args: Any, **how: Any) -> torch.Tensor:
        made[product.shape.inputs, product.shape.outputs] += 1
        return own(product, *args, **how)

    monkeypatch.setattr(FrozenProduct, "__call__", count)
    batch = MicroBatch(rows=(some := rows(2, 0)), learned=learned_in(some), pieces=1)
    forward.learn(batch, torch.autograd.backward)
    assert made[64, 128] == 2 * 2 * 2, "gate and up of two blocks, forwards and again"
    assert made[128, 64] == 2, "down, forwards alone"
