"""Memory that runs out in mid-training: what the trainer leaves, and how another process of the attempt goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.status import Reason
from loractl.worker.engine.optimizer import ScaledOptimizer
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.protocol.messages import Again, Ended, Note, Planned, Saved, Start, Stepped, Told
from loractl.worker.recipe.orders import StopOrder
from loractl.worker.recipe.trainer import _trained

KEYS: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "evaluation": {"samples": 0, "metrics": ["loss"]}}


def trained(order: Start) -> tuple[Ended | Again, list[Told]]:
    told: list[Told] = []
    return _trained(order, StopOrder(), told.append), told


def losses(told: list[Told]) -> dict[int, float]:
    return {m.step: m.metrics["loss"] for m in told if isinstance(m, Stepped) and "loss" in m.metrics}


def failing(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, at: int) -> None:
    """The call of this number has no memory, once what it does is done."""
    own, calls = getattr(kind, name), list[int]()

    def call(self: Any, *of: Any) -> Any:
        answer = own(self, *of)
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer

    monkeypatch.setattr(kind, name, call)


@pytest.mark.long
def test_the_window_is_dropped_and_the_last_step_is_stored(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, of_whole = trained(start("whole", **KEYS))
    assert isinstance(whole, Ended) and whole.reason is Reason.OK
    assert [m.base for m in of_whole if isinstance(m, Planned) and m.base], "what its base takes was told"
    with monkeypatch.context() as patch:
        failing(patch, LeanPass, "learn", at=4)
        again, told = trained(order := start("full", **KEYS))
    assert isinstance(again, Again) and again.adjustment == Adjustment(micro_batch=2, accumulation=2)
    assert again.change.startswith("out of memory at step 3 with 4 rows at once: restarts with 2")
    assert [m.step for m in told if isinstance(m, Saved)] == [2, 3], "not only the second, which it had"
    ended, rest = trained(order.model_copy(update={"adjustment": again.adjustment, "changes": [again.change]}))
    assert isinstance(ended, Ended) and ended.reason is Reason.OK
    assert [m.resumed_from_step for m in rest if isinstance(m, Note) and m.kind == "resumed"] == [3]
    assert losses(told) | losses(rest) == pytest.approx(losses(of_whole), rel=1e-3)


@pytest.mark.long
def test_a_failed_step_of_the_optimizer_stores_nothing(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, ScaledOptimizer, "step", at=4)
    again, told = trained(start("full", **KEYS))
    assert isinstance(again, Again) and "at step 3" in again.change
    assert [m.step for m in told if isinstance(m, Saved)] == [2]


@pytest.mark.long
def test_a_held_out_row_that_does_not_fit_before_the_first_step_ends_the_attempt(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process would load the base once more, and have no more room for that row."""
    failing(monkeypatch, LeanPass, "scores", at=1)
    keys = KEYS | {"evaluation": {**KEYS["evaluation"], "per_device_eval_batch_size": 1}}
    ended, _ = trained(start("full", **keys).model_copy(update={"memory_limit": 8 * 2**30}))
    assert isinstance(ended, Ended) and ended.reason is Reason.OUT_OF_MEMORY


def test_one_row_that_does_not_fit_ends_the_attempt(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KEYS | {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    trained(start("whole", **keys))  # from then on the box knows that the pass is right, and the loop alone calls it
    failing(monkeypatch, LeanPass, "learn", at=2)
    ended, _ = trained(start("full", **keys))
    assert isinstance(ended, Ended) and ended.reason is Reason.OUT_OF_MEMORY
