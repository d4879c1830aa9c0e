"""What jobs on one card cost each other is measured by the jobs themselves, in a held lab."""

from __future__ import annotations

import json

import pytest

from loractl.worker.node.monitor import NodeOptions
from loractl.worker.protocol.messages import Again, Ended, Start
from loractl.worker.recipe.orders import StopOrder

from ... import quick_trainer
from ...held_lab import HeldLab
from ...quick_trainer import Sleep, Tell

CONTENTION = 0.6

RECOMPUTES = "--set=training.gradient_checkpointing=true"
"""Else a job that is alone when it starts takes other steps, where its card has the room."""


def test_a_worker_measures_how_much_jobs_on_its_card_slow_each_other_and_people_see_it(held: HeldLab) -> None:
    """Each job beside one makes its steps take 0.6 of their time longer."""

    def train(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended | Again:
        return quick_trainer.train(
            order, stop, tell, lambda seconds: sleep(seconds * (1 + CONTENTION * (held.alive - 1)))
        )

    def card() -> float | None:
        (shown,) = json.loads(held.cli("gpus", "--json"))
        found: float | None = shown["contention"]
        return found

    def run(*names: str) -> None:
        for number in [held.submit(RECOMPUTES, name=name, steps=30) for name in names]:
            held.until(number, lambda job: job.status.is_terminal)

    held.start(train, NodeOptions(max_jobs=2), LORACTL_DEVICES="sim:80GiB")
    for n in range(3):
        run(f"alone-{n}")
    assert card() is None and "(measured)" not in held.cli("gpus")
    for n in range(2):
        run(f"beside-{n}", f"next-{n}")
    assert card() == pytest.approx(CONTENTION, abs=0.05)
    assert "longer for each other (measured)" in held.cli("gpus")
    means = [attempt.neighbours or 0.0 for number in range(1, 8) for attempt in held.store.attempts.of_job(number)]
    assert means[:3] == [0, 0, 0] and all(0.9 < mean <= 1 for mean in means[3:]), means
    alone, *beside = (held.store.attempts.of_job(number)[0] for number in (1, 4, 5))
    assert all((one.trained_s or 0) > 1.5 * (alone.trained_s or 0) for one in beside)
    short = held.store.jobs.get(held.submit(RECOMPUTES, name="later", steps=30)).work_left_s
    took = (alone.ended_at - alone.started_at).total_seconds() if alone.ended_at else 0.0
    assert short == pytest.approx(took, rel=0.1), "what was measured next to another job is not taken for a time alone"
