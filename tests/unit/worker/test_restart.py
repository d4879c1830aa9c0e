"""A trainer that runs out of memory in mid-training, in a held lab: another one of the attempt goes on with less."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.status import Reason, Status
from loractl.common.store.queries.endings import give_back
from loractl.worker.attempt import trainer_run
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.protocol.messages import (
    Adjusted,
    Again,
    Ended,
    Note,
    Stage,
    StageChanged,
    Start,
    Stepped,
    Stop,
    Told,
)
from loractl.worker.recipe.orders import StopOrder

from ...held_lab import HeldLab
from ...quick_trainer import Sleep, Tell, train

HALF = Adjustment(micro_batch=2, accumulation=2)
CHANGE = "out of memory at step 5 with 4 rows at once: restarts with 2, accumulating 2 (same effective batch)"


OPTIONS = ("--set=training.save_steps=100", "--set=training.gradient_checkpointing=false")  # it is given no room


def five_steps(order: Start, tell: Tell, sleep: Sleep) -> None:
    """With a checkpoint after the last."""
    stop = StopOrder()

    def heard(message: Told) -> None:
        tell(message)
        if isinstance(message, Stepped) and message.step == 5:
            stop.give(Stop(job_id=order.job_id, save=True))

    train(order, stop, heard, sleep)


def outgrows(
    meanwhile: Callable[[], object] = lambda: None,
) -> Callable[[Start, StopOrder, Tell, Sleep], Ended | Again]:
    """A trainer that has no memory for step 6 until it has less to do."""

    def run(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended | Again:
        if order.adjustment != Adjustment():
            assert (order.adjustment, order.changes) == (HALF, [CHANGE])
            return train(order, stop, tell, sleep)
        five_steps(order, tell, sleep)
        meanwhile()
        return Again(job_id=order.job_id, adjustment=HALF, change=CHANGE)

    return run


def says_it_itself(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended | Again:
    ended = outgrows()(order, stop, tell, sleep)
    if isinstance(ended, Again):
        tell(Adjusted(job_id=order.job_id, adjustment=HALF))
        tell(Note(job_id=order.job_id, kind="memory", text=CHANGE))
    return ended


def history(lab: HeldLab) -> list[str]:
    return [event["text"] for event in json.loads(lab.cli("status", 1, "--json"))["events"]]


@pytest.mark.parametrize("does", [outgrows(), says_it_itself])
def test_it_goes_on_from_its_last_checkpoint_and_its_history_says_so_once(
    held: HeldLab, does: Callable[..., Ended]
) -> None:
    held.start(does)
    held.submit(*OPTIONS)
    job = held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert held.starts == ["1.1", "1.1"], "no attempt is spent on it"
    assert (job.retries_used, Adjustment(**(job.adjustment or {}))) == (0, HALF)
    assert held.store.attempts.of_job(1)[0].resumed_from_step == 5
    assert history(held).count(CHANGE) == 1


def test_one_that_says_nothing_of_it_is_followed_by_one_with_half_the_rows(held: HeldLab) -> None:
    def dies(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
        if order.adjustment != Adjustment():
            return train(order, stop, tell, sleep)
        five_steps(order, tell, sleep)
        return Ended(job_id=order.job_id, reason=Reason.OUT_OF_MEMORY, message="as its exit status says")

    held.start(dies)
    held.submit(*OPTIONS)
    held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert (held.starts, history(held).count(CHANGE)) == (["1.1", "1.1"], 1)


def test_it_restarts_at_most_as_often_as_there_are_steps_down(held: HeldLab) -> None:
    def never_fits(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Again:
        tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
        sleep(1.0)
        return Again(job_id=order.job_id, adjustment=HALF, change=CHANGE)

    held.start(never_fits)
    held.submit(*OPTIONS, "--set=max_retries=0")
    held.until(1, lambda job: held.reasons(1)[:1] == [Reason.OUT_OF_MEMORY])
    assert held.starts.count("1.1") == 4, "4, 2 and 1 rows, then recomputing"
    first = held.store.attempts.of_job(1)[0]
    assert str(first.message).startswith("memory ran out again after each step down")


def lose_lease(lab: HeldLab, _: Workplace) -> None:
    with lab.store.begin(read_only=False) as tx:
        give_back(tx, "heron:0")


STOPS = {
    "a cancel": (lambda lab, place: lab.store.jobs.cancel(1, "ada"), Reason.CANCELLED),
    "a stop of the worker": (lambda lab, place: place.drain.ask("checkpoint"), Reason.DRAINED),
    "a second stop": (lambda lab, place: place.drain.ask("now"), Reason.DRAINED),
    "a lost lease": (lose_lease, Reason.WORKER_LOST),
}


@pytest.mark.parametrize("stop", STOPS)
def test_what_stops_a_job_stops_it_between_two_trainers_too(held: HeldLab, stop: str) -> None:
    places, asked = list[Workplace](), list[str]()
    asks, reason = STOPS[stop]

    def ask() -> None:
        if not asked:
            asks(held, places[0])
            asked.append(stop)

    places += held.start(outgrows(ask), LORACTL_LEASE="60s")
    held.submit(*OPTIONS)
    held.until(1, lambda job: held.reasons(1)[:1] == [reason], seconds=30)
    held.stop(how="now")
    assert held.starts.count("1.1") == 1


def test_a_time_limit_counts_from_the_first_trainer_on(held: HeldLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the first one stays on the card for a while."""
    began = held.clock.now()
    monkeypatch.setattr(trainer_run, "end_leftovers", lambda run: [4711] if held.clock.now() < began + 15 else [])
    held.start(outgrows(), LORACTL_LEASE="60s")
    held.submit(*OPTIONS, "--set=resources.time_limit=5s")
    held.until(1, lambda job: held.reasons(1) == [Reason.TIMED_OUT], seconds=30)
    assert held.starts == ["1.1"]


@pytest.mark.parametrize("seconds", [10, 60])
def test_nothing_starts_before_what_the_first_one_left_is_gone(
    held: HeldLab, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    ended = list[float]()
    stays = [4711]
    monkeypatch.setattr(
        trainer_run, "end_leftovers", lambda run: stays if ended and held.clock.now() < ended[0] + seconds else []
    )
    resumed = list[float]()
    run = outgrows(lambda: ended.append(held.clock.now()))

    def noted(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended | Again:
        if ended:
            resumed.append(held.clock.now())
        return run(order, stop, tell, sleep)

    held.start(noted, LORACTL_LEASE="60s")
    held.submit(*OPTIONS, "--set=max_retries=0")
    job = held.until(1, lambda job: job.status.is_terminal, seconds=120)
    if seconds < trainer_run.LEFT_S:
        assert job.status is Status.SUCCEEDED and resumed[0] - ended[0] >= seconds
        return
    assert resumed == [] and held.reasons(1)[0] is Reason.TRAINER_ERROR
    assert str(job.message).endswith("its ended trainer left process 4711 behind")
    held.clock.sleep(trainer_run.LEFT_S + 2)
    assert "left process 4711 behind" in held.store.cards.drains()["heron:0"].reason
