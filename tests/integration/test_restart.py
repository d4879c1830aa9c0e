"""Another trainer of an attempt starts only once the one before is gone with all its processes: real ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.file import load_spec
from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.scheduler.submit.data import store_data
from loractl.scheduler.submit.need import own_devices, plan_job
from loractl.worker.attempt.attempt import begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch

from ..models import write_job
from ..unit.factories import node_state, submission

STAYS = """
import os, subprocess, sys, time
from pathlib import Path
import psutil
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.messages import Again, Ended, StageChanged
from loractl.worker.recipe import trainer

def run(order, stop, tell):
    noted = Path(order.checkpoint_dir).with_name("pids")
    tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
    if noted.exists():
        alive = [pid for pid in map(int, noted.read_text().split()) if psutil.pid_exists(pid)]
        return Ended(job_id=order.job_id, reason=Reason.BAD_DATA, message=f"alive: {alive}")
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    noted.write_text(f"{os.getpid()} {child.pid}")
    tell(Again(job_id=order.job_id, adjustment=Adjustment(micro_batch=1, accumulation=4), change="less"))
    trainer.os._exit = lambda code: None  # it survives the end of its input, too
    time.sleep(600)

if __name__ == "__main__":
    sys.exit(trainer.main(run))
"""


@pytest.mark.long
def test_one_that_asks_for_another_and_does_not_end_is_killed_with_what_it_started(
    quick_place: Callable[[str], Workplace],
) -> None:
    place = quick_place(STAYS)
    place.store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB))
    watch = Watch(device=place.device, node_pid=os.getpid())
    place = replace(place, held=lambda job_id: watch.look().used.get(str(job_id), 0))
    place.store.jobs.submit(submission(lora=1, method="lora"))
    claim = place.store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    supervise(place, begin(claim, place.settings.work_dir))
    job = place.store.jobs.get(claim.job_id)
    assert (job.reason, job.message, job.attempt) == (Reason.BAD_DATA, "alive: []", 1)


DIES = """
import os
import signal
import sys
from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.messages import Ended, Planned, StageChanged
from loractl.worker.recipe import trainer

def run(order, stop, tell):
    tell(StageChanged(job_id=order.job_id, stage=Stage.PREPARING))
    tell(Planned(job_id=order.job_id, lora=None, qlora=None, base=1))
    if order.adjustment.micro_batch is None:
        os.kill(os.getpid(), signal.SIGSEGV)
    return Ended(job_id=order.job_id, reason=Reason.BAD_DATA, message=f"{order.adjustment.micro_batch} rows at once")

if __name__ == "__main__":
    sys.exit(trainer.main(run))
"""


@pytest.mark.long
def test_one_that_dies_while_it_tries_its_longest_batches_is_followed_by_one_with_less(
    quick_place: Callable[[str], Workplace],
) -> None:
    """oneDNN may end the process where it gets no memory."""
    place = quick_place(DIES)
    place = replace(place, settings=replace(place.settings, trainer_ram=4 * GIB))
    place.store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB))
    place.store.jobs.submit(submission(lora=1, method="lora"))
    claim = place.store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    supervise(place, begin(claim, place.settings.work_dir))
    job = place.store.jobs.get(claim.job_id)
    assert (job.reason, job.message, job.attempt) == (Reason.BAD_DATA, "2 rows at once", 1)


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
