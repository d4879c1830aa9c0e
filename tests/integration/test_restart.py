"""Another trainer of an attempt starts only once the one before is gone with all its processes: real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.file import load_spec
from loractl.common.job.status import Status
from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.scheduler.submit.data import store_data
from loractl.scheduler.submit.need import own_devices, plan_job
from loractl.worker.attempt.attempt import begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace

from ..models import write_job
from ..unit.factories import node_state

FULL = """
import sys
import torch
from loractl.worker.engine.loop import TrainingLoop
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.recipe import trainer

def run(order, stop, tell):
    learn, train, calls = LeanPass.learn, TrainingLoop.run, []
    TrainingLoop.run = lambda loop: (calls.clear(), train(loop))  # after the comparison of the passes
    def full(self, *of):
        calls.append(1)
        if order.adjustment.micro_batch is None and len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(self, *of)
    LeanPass.learn = full
    return trainer._run(order, stop, tell)

if __name__ == "__main__":
    sys.exit(trainer.main(run))
"""


@pytest.mark.cold
def test_a_training_whose_memory_runs_out_goes_on_in_another_process_from_its_last_step(
    quick_place: Callable[[str], Workplace], tiny_model: Path, tmp_path: Path
) -> None:
    """The real recipe: what fails is one pass."""
    place = quick_place(FULL)
    place.store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB))
    file = write_job(tmp_path, tiny_model)
    asked = load_spec(
        file, ["training.max_steps=6", "training.save_steps=100", "training.gradient_checkpointing=false"]
    )
    data = store_data(asked, ArtifactStore(place.settings.artifacts_url))
    place.store.jobs.submit(plan_job(asked, "ada", data, place.store, own_devices(place.settings)))
    claim = place.store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    assert supervise(place, begin(claim, place.settings.work_dir)) is Status.SUCCEEDED
    (only,) = place.store.attempts.of_job(claim.job_id)
    job = place.store.jobs.get(claim.job_id)
    assert only.resumed_from_step == 5 and only.base_bytes
    assert Adjustment(**(job.adjustment or {})) == Adjustment(micro_batch=2, accumulation=2)
    losses = place.store.jobs.metrics(claim.job_id, "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6]
