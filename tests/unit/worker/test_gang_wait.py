"""A job on two cards of a box in a held lab: what it waits for as a person sees it, and what waits for it.

A real training on two cards: tests/acceptance/test_gang_losses.py.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from typing import Any

from loractl.common.job.status import Reason, Stage, Status
from loractl.common.store.tables import Job
from loractl.common.units import GIB
from loractl.worker.protocol.messages import Ended, StageChanged, Start, Stepped
from loractl.worker.recipe.orders import StopOrder

from ...held_lab import LEASE_S, HeldLab
from ...quick_trainer import Sleep, Tell

LARGE = ("--set=dataset.max_length=131072", "--set=training.per_device_train_batch_size=66")
"""About 40 GiB by the plan that submit makes, for rows of max_length."""

TWO_CARDS = "sim:24GiB,24GiB"


def test_a_job_for_two_cards_says_what_it_waits_for_and_is_not_passed_for_ever(held: HeldLab) -> None:
    held.start(LORACTL_DEVICES=TWO_CARDS)
    small = list[int]()

    def began() -> list[int]:
        return [job_id for job_id in small if held.store.jobs.get(job_id).started_at is not None]

    def stream(until: Callable[[], object], seconds: float = 60) -> None:
        """Keep one small job waiting. Each would fit at once."""
        deadline = held.clock.now() + seconds
        while not until():
            assert held.clock.now() < deadline, held.cli("status", "-a")
            if not any(held.store.jobs.get(job_id).status is Status.QUEUED for job_id in small[-1:]):
                small.append(held.submit(name="small", user=f"user{len(small) % 3}"))
            held.clock.sleep(0.2)

    busy = held.submit(name="busy", steps=15000, user="bob")
    held.until(busy, lambda job: job.eta_seconds)
    large = held.submit(*LARGE, name="large", steps=100)
    assert 39 * GIB < (held.store.jobs.get(large).vram_lora or 0) < 41 * GIB
    lacks = f"waits for a second card of 20.7 GiB on heron when job {busy} ends"
    assert _why(held, large)["sentence"] == lacks
    assert lacks in _answers(held, "status", "job_id")[large]["message"]

    # small jobs may pass it for some days, and the sentence stays true
    stream(lambda: len(began()) >= 3)
    pairs = [pair for job_id in small for pair in ((busy, job_id), (job_id, busy))]  # by their expected ends
    both = (f"waits for 2 cards of 20.7 GiB on heron when jobs {one} and {other} end" for one, other in pairs)
    assert _why(held, large)["sentence"] in {lacks, *both}
    submitted = held.store.jobs.get(large).submitted_at
    held.change(large, submitted_at=submitted - dt.timedelta(days=20))

    # now the card that gets free is kept for it
    for job_id in small:
        held.until(job_id, lambda job: job.status is Status.SUCCEEDED or _kept_from(job, large, held))
    passed, later = len(began()), held.clock.now() + 20
    stream(lambda: held.clock.now() > later)
    assert len(began()) == passed
    assert _why(held, large)["sentence"] == f"{lacks} (kept for it)"
    (idle,) = [node for node, seen in _answers(held, "gpus", "node").items() if not seen["jobs"]]
    waiting = _why(held, small[-1])
    assert waiting["word"] == "kept"
    assert f"{idle} is kept for job {large}" in waiting["sentence"]

    # the busy one ends, and both cards are its
    held.cli("cancel", busy)
    job = held.until(large, lambda job: job.status is Status.RUNNING)
    ended = held.store.jobs.get(busy).ended_at
    assert ended is not None and job.started_at is not None and ended <= job.started_at
    assert len(began()) == passed
    cards = _answers(held, "gpus", "node")
    assert [[j["job_id"] for j in seen["jobs"]] for seen in cards.values()] == [[large], [large]]
    held.until(large, lambda job: job.status is Status.SUCCEEDED)
    held.until(small[-1], lambda job: job.status is Status.SUCCEEDED)


def test_a_drain_of_either_card_gives_the_job_back_with_a_checkpoint(held: HeldLab) -> None:
    held.start(LORACTL_DEVICES=TWO_CARDS)
    job_id = held.submit(*LARGE, "--set=training.save_steps=100000", steps=100000)
    for attempt, card in enumerate(("heron:0", "heron:1"), start=1):
        held.until(job_id, lambda job, now=attempt: job.attempt == now and (job.step or 0) > 2)
        held.cli("drain", card, "--now", "--reason", "a fan")
        held.until(job_id, lambda job: job.status is Status.QUEUED)
        held.cli("undrain", card)
    held.until(job_id, lambda job: job.attempt == 3 and (job.step or 0) > 0)
    attempts = held.store.attempts.of_job(job_id)
    assert [attempt.reason for attempt in attempts[:2]] == [Reason.DRAINED, Reason.DRAINED]
    assert all(attempt.resumed_from_step for attempt in attempts[1:])


def saves_late(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
    """No step is done for a while after it was told to stop, and so no checkpoint saved."""
    tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
    tell(Stepped(job_id=order.job_id, step=1, total_steps=2))
    while not stop.came.is_set():
        sleep(0.1)
    sleep(2.5 * LEASE_S)
    return Ended(job_id=order.job_id, reason=Reason.DRAINED, message="stopped")


def test_a_box_that_stops_waits_with_every_node_for_the_job_on_two_cards(held: HeldLab) -> None:
    """Its second card's node has no job of its own: would it end at once, it would be missed like a lost one."""
    box = held.start(saves_late, LORACTL_DEVICES=TWO_CARDS)
    other = held.start_box("owl")  # goes round for the fleet meanwhile
    job_id = held.submit(*LARGE)
    held.until(job_id, lambda job: job.step)
    began = held.clock.now()
    held.stop(box)
    assert held.clock.now() - began > 2.5 * LEASE_S
    (attempt,) = held.store.attempts.of_job(job_id)
    assert (attempt.reason, attempt.message) == (Reason.DRAINED, "the worker is being stopped")
    assert held.alive == 0 and {row.node for row in held.store.cards.nodes()} == {place.node for place in other}


def _why(lab: HeldLab, job_id: int) -> dict[str, Any]:
    return dict(json.loads(lab.cli("why", job_id, "--json")))


def _answers(lab: HeldLab, command: str, key: str) -> dict[Any, Any]:
    return {row[key]: row for row in json.loads(lab.cli(command, "--json"))}


def _kept_from(job: Job, large: int, lab: HeldLab) -> bool:
    """Whether the job waits, and a card stands idle for the large one."""
    reserved = [d.reserved for d in lab.store.cards.fleet().decisions if d.reserved is not None]
    return job.status is Status.QUEUED and any(kept.job.job_id == large for kept in reserved)
