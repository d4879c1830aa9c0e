"""A stop in the middle of a held-out evaluation: obeyed within a batch, and what was left out is done afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.status import Reason
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.protocol.messages import Saved, Stepped
from loractl.worker.recipe.progress import Teller

from .conftest import Recipe

KEYS: dict[str, Any] = {
    "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True,
    "evaluation": {"per_device_eval_batch_size": 1, "samples": 0, "metrics": ["loss"]}, "dataset": {"test_size": 0.5},
}  # fmt: skip


def report(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "result" / "report.json").read_text())
    return read


def weights(folder: Path) -> bytes:
    return (folder / "result" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [4, 8], ids=["in the middle", "after the last step"])
def test_a_stop_in_an_evaluation_is_obeyed_within_a_batch_and_costs_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    recipe("whole", **KEYS)
    scored: list[int] = []

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        scored.append(state.global_step)
        if state.global_step == step:
            self._run.stop.saves.set()
            self._run.stop.came.set()

    with monkeypatch.context() as patched:
        patched.setattr(Teller, "on_prediction_step", stop)
        ended, told = recipe("stopped", **KEYS)
    assert ended.reason is Reason.DRAINED
    assert scored.count(step) <= 2, "of as many batches as there are held-out rows"
    assert [message.step for message in told if isinstance(message, Saved)][-1] == step
    assert max(message.step for message in told if isinstance(message, Stepped)) == step
    ended, told = recipe("resumed", resume="stopped", **KEYS)
    assert ended.reason is Reason.OK
    whole, resumed = report(tmp_path / "whole"), report(tmp_path / "resumed")
    assert resumed["training"]["eval_losses"] == whole["training"]["eval_losses"]
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


@pytest.mark.long
def test_an_evaluation_in_mid_training_that_does_not_fit_takes_fewer_rows_at_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KEYS | {"evaluation": {"per_device_eval_batch_size": 8, "samples": 0}}
    recipe("roomy", **keys)
    held_out_loss, sizes = LeanPass.held_out_loss, list[int]()

    def tight(self: Any, rows: Any) -> float:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(rows))
        return held_out_loss(self, rows)

    monkeypatch.setattr(LeanPass, "held_out_loss", tight)
    ended, _ = recipe("tight", **keys)
    assert ended.reason is Reason.OK and max(sizes) == 2
    tight_report, roomy = report(tmp_path / "tight"), report(tmp_path / "roomy")
    measured = [dict(one["training"]["eval_losses"]) for one in (tight_report, roomy)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
