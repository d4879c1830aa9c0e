"""A member's optimizer next to the library's own."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import optimizer as library
from transformers import TrainingArguments

from loractl.worker.engine.optimizer import ScaledOptimizer, make_optimizer


@pytest.mark.long
@pytest.mark.parametrize(("name", "waits"), [("adamw_8bit", 0), ("paged_adamw_8bit", 3)])
def test_state_of_8_bit_is_updated_without_a_wait_for_each_tensor(
    name: str, waits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors; paged state is waited for after each, and at the end."""
    waited: list[torch.Tensor] = []
    monkeypatch.setattr(library, "sync_gpu", waited.append)
    layer, other = (torch.nn.Linear(64, 96) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, learning_rate=0.1, use_cpu=True)
    ours = ScaledOptimizer(make_optimizer(layer, args))
    theirs = bitsandbytes.optim.AdamW8bit(other.parameters(), 0.1, weight_decay=0.0)
    for step in range(3):
        for linear in (layer, other):
            linear(torch.ones(2, 64) + step).pow(2).sum().backward()
        ours.step()
        assert len(waited) == waits
        theirs.step()
        waited.clear()
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
