"""Another trainer of an attempt starts only once the one before is gone with all its processes: real ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from loractl.common.job.status import Reason
from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.worker.attempt.attempt import begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch

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
