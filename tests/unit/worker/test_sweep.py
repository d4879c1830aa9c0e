"""A sweep whose losers stop early, on two cards."""

from __future__ import annotations

import json

from loractl.common.job.status import Reason, Stage, Status
from loractl.worker.protocol.messages import Ended, StageChanged, Start, Stepped
from loractl.worker.recipe.orders import StopOrder

from ...held_lab import HeldLab
from ...models import write_job
from ...quick_trainer import Sleep, Tell, train

STEPS = 8
RATES = (3e-3, 1e-4, 3e-6, 1e-7)
"""The first learns best."""


def evaluated(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
    """A training that reports its held-out loss at each quarter of its steps, a step in a second."""

    def told(message: object) -> None:
        if isinstance(message, Stepped) and message.step % (STEPS // 4) == 0:
            loss = 1.0 + RATES.index(order.spec.training.learning_rate)
            message = Stepped(
                job_id=order.job_id, step=message.step, total_steps=STEPS, metrics={"eval_loss": loss}, eta_seconds=1.0
            )
        tell(message)  # type: ignore[arg-type]

    tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
    return train(order, stop, told, lambda _: sleep(1.0))


def test_losers_are_stopped_by_their_next_beat_and_the_best_trains_to_its_end(held: HeldLab) -> None:
    held.start(evaluated, LORACTL_DEVICES="sim:8GiB,8GiB")
    file = write_job(held.folder, held.folder)
    rates = ",".join(map(str, RATES))
    few = (f"training.max_steps={STEPS}", "training.save_steps=1000", "resources.max_vram=6GiB")
    asked = [word for setting in (*few, f"training.learning_rate={rates}") for word in ("--set", setting)]
    held.cli("sweep", file, *asked, "--early-stop")
    held.wake()
    for job_id in range(1, 5):
        held.until(job_id, lambda job: job.status.is_terminal, seconds=300)
    sweep = json.loads(held.cli("status", "--sweep", 1, "--json"))
    stopped = [member for member in sweep["members"] if member["reason"] == "pruned"]
    assert (sweep["ended"], sweep["best_job_id"], sweep["stopped"]) == (True, 1, len(stopped)) and len(stopped) >= 2
    assert all(member["status"] == "cancelled" and member["step"] < STEPS for member in stopped)
    assert all("or less would have continued" in member["message"] for member in stopped)
    assert sweep["saved_steps"] == sum(STEPS - member["step"] for member in stopped)
    assert held.store.jobs.get(1).status is Status.SUCCEEDED and held.reasons(1) == [Reason.OK]
    assert held.alive == 0
