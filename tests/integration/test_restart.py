"""Another trainer of an attempt starts only once the one before is gone with all its processes: real ones."""

from __future__ import annotations

import sys
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

from .. import full_trainer, warm
from ..models import write_job
from ..unit.factories import node_state


def test_a_training_whose_memory_runs_out_goes_on_in_another_process_from_its_last_step(
    cpu_place: Callable[[str], Workplace],
    tiny_model: Path,
    warm_start: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real recipe."""
    for name, value in {**warm_start, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    forking = next(Path(warm_start[warm.SOCKET]).glob("python-*"))
    monkeypatch.setattr(sys, "executable", str(forking))
    place = cpu_place(full_trainer.__name__)
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
