"""A trainer without torch that takes a step in a moment: loractl's own protocol and checkpoints, and a few bytes of
weights that name their attempt.

    LORACTL_TRAINER=tests.quick_trainer

As a process it writes JOB.ATTEMPT into the file that QUICK_STARTS names. In a test's process tests/held_lab.py runs it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.marker import close_checkpoint, newest_checkpoint, remove_marker
from loractl.worker.protocol.messages import Ended, Note, Saved, StageChanged, Start, Stepped, Told
from loractl.worker.recipe.orders import StopOrder

from .models import weights_of

STEP_S = 0.05

SLOW, TIMES = "says-it-is-slow", 10
"""A job with this label says that it takes TIMES times longer: it yields to short ones, and its test is short."""

Tell = Callable[[Told], None]
Sleep = Callable[[float], None]


def run(order: Start, stop: StopOrder, tell: Tell) -> Ended:
    """As a process."""
    with Path(os.environ["QUICK_STARTS"]).open("a") as starts:
        starts.write(f"{order.job_id}.{order.attempt}\n")
    tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
    return train(order, stop, tell, time.sleep)


def train(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
    """Go on from the newest checkpoint, a step each 50 ms; stop when asked to."""
    job, steps = order.job_id, order.spec.training.max_steps
    assert steps is not None
    tell(StageChanged(job_id=job, stage=Stage.TRAINING))

    def save(step: int) -> None:
        folder = Path(order.checkpoint_dir) / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer_state.json").write_text("{}")
        close_checkpoint(folder, step=step, finished=step == steps, belongs_to={"job": str(job)})
        tell(Saved(job_id=job, step=step, path=str(folder)))

    folders = [Path(order.checkpoint_dir), *map(Path, order.earlier_checkpoints)]
    found = newest_checkpoint(folders, {"job": str(job)})
    if found is not None and (found.path / "trainer_state.json").read_text() != "{}":
        remove_marker(found.path)
        why = f"the checkpoint of step {found.step} can't be read"
        return Ended(job_id=job, reason=Reason.TRAINER_ERROR, message=why, withdrawn=str(found.path))
    if found is not None:
        tell(Note(job_id=job, kind="resumed", text="resumed", resumed_from_step=found.step))
    for step in range(found.step + 1 if found else 1, steps + 1):
        sleep(STEP_S)
        left = (steps - step) * STEP_S * (TIMES if SLOW in order.spec.labels else 1)
        tell(Stepped(job_id=job, step=step, total_steps=steps, metrics={"loss": 1 / step}, eta_seconds=left))
        if step % order.spec.training.save_steps == 0:
            save(step)
        if not stop.came.is_set():
            continue
        if stop.saves.is_set():
            save(step)
        return Ended(job_id=job, reason=Reason.DRAINED, message="stopped")
    adapter = Path(order.output_dir) / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(weights_of(f"attempt {order.attempt}"))
    (adapter / "adapter_config.json").write_text("{}")
    (adapter.parent / "report.json").write_text("{}")
    return Ended(job_id=job, reason=Reason.OK, message="trained")


if __name__ == "__main__":
    from loractl.worker.recipe.trainer import main

    main(run)
