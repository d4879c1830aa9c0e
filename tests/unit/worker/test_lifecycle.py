"""What happens to a running job when people interfere, in a held lab. Signals: tests/acceptance/test_lifecycle.py."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.worker.attempt.attempt import begin
from loractl.worker.attempt.stops import DRAIN_GRACE_S, SILENCE_S, STOP_GRACE_S, is_silent
from loractl.worker.attempt.workplace import BEAT_S
from loractl.worker.protocol.messages import Ended, GoingOn, Planned, Stage, StageChanged, Start, Stepped
from loractl.worker.recipe.orders import StopOrder

from ...held_lab import HeldLab
from ...quick_trainer import Sleep, Tell, train
from ..factories import node_state

UNSAVED = "--set=training.save_steps=100000"


def deaf(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
    """A trainer that never looks for orders."""
    tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
    for step in range(1, 10**6):
        sleep(1.0)
        tell(Stepped(job_id=order.job_id, step=step, total_steps=10**6))
    raise AssertionError


def test_a_cancel_stops_a_running_trainer_within_ten_seconds(held: HeldLab) -> None:
    held.start(LORACTL_LEASE="60s")
    held.submit(steps=100000)
    held.until(1, lambda job: (job.step or 0) >= 5)
    assert held.alive == 1
    began = held.clock.now()
    said = held.cli("cancel", 1)
    assert "nothing of its training is kept, so loractl retry 1 would start again." in said
    held.until(1, lambda job: job.status == "cancelled", seconds=15)
    assert held.clock.now() - began < 10
    assert held.alive == 0
    assert "already been cancelled" in held.cli("cancel", 1, code=1)


def test_a_trainer_that_does_not_obey_is_killed_after_its_grace(held: HeldLab) -> None:
    held.start(deaf, LORACTL_LEASE="60s")
    held.submit(steps=100000)
    held.until(1, lambda job: (job.step or 0) >= 5)
    began = held.clock.now()
    held.cli("cancel", 1)
    held.until(1, lambda job: job.status == "cancelled")
    assert STOP_GRACE_S <= held.clock.now() - began < STOP_GRACE_S + 2 * BEAT_S
    assert (held.alive, held.reasons(1)) == (0, [Reason.CANCELLED])


def test_a_second_stop_does_not_wait_for_the_step_that_the_first_one_waits_for(held: HeldLab) -> None:
    (place,) = held.start(deaf, LORACTL_LEASE="60s")
    held.submit(steps=100000)
    held.until(1, lambda job: (job.step or 0) >= 5)
    place.drain.ask("checkpoint")
    held.clock.sleep(DRAIN_GRACE_S / 2)
    assert held.alive == 1
    place.drain.ask("now")
    held.until(1, lambda job: job.status is Status.QUEUED, seconds=5)
    assert (held.alive, held.reasons(1)) == (0, [Reason.DRAINED])


def test_a_training_that_ends_while_its_box_stops_is_stored(held: HeldLab) -> None:
    def finishes(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
        return train(order, StopOrder(), tell, sleep)  # it was in its last steps

    places = held.start(finishes)
    held.submit(steps=20)
    held.until(1, lambda job: (job.step or 0) >= 5)
    held.stop(places)
    assert (held.store.jobs.get(1).status, held.reasons(1)) == (Status.SUCCEEDED, [Reason.OK])


def test_a_cancel_that_comes_once_the_training_has_ended_costs_no_result(held: HeldLab) -> None:
    def finishes(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
        ended = train(order, stop, tell, sleep)
        held.store.jobs.cancel(order.job_id, "ada")  # read by the beats while the result is stored
        return ended

    held.start(finishes)
    held.submit()
    held.until(1, lambda job: job.status.is_terminal)
    assert (held.store.jobs.get(1).status, held.reasons(1)) == (Status.SUCCEEDED, [Reason.OK])
    held.cli("adapters", "pull", 1, held.folder / "pulled")


def test_a_trainer_that_trains_or_evaluates_reports_within_half_an_hour(held: HeldLab) -> None:
    """What it prepares may take longer, and so may what is stored after it."""
    (place,) = held.places()
    held.submit()
    held.store.cards.see(node_state("heron:0", kind="sim"))
    claim = held.store.attempts.claim("heron:0")
    assert isinstance(claim, Claim)
    state = begin(claim, place.settings.work_dir, held.clock)
    held.clock.sleep(SILENCE_S + 1)
    silent = []
    for stage in Stage:
        state.unwritten.pending = replace(state.unwritten.pending, stage=stage)
        silent += [stage] * is_silent(state)
    assert silent == [Stage.TRAINING, Stage.EVALUATING]


def test_a_trainer_that_has_said_nothing_for_half_an_hour_is_killed(
    held: HeldLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a twentieth of the time: half a minute of a processor goes into the beats of an hour."""
    silence_s = SILENCE_S / 20
    monkeypatch.setattr("loractl.worker.attempt.stops.SILENCE_S", silence_s)

    def silent(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
        tell(StageChanged(job_id=order.job_id, stage=Stage.TRAINING))
        for said_after in (silence_s - 60, 2 * silence_s):
            sleep(said_after)
            tell(GoingOn(job_id=order.job_id))
        raise AssertionError

    held.start(silent, LORACTL_LEASE="60s")
    held.submit("--set=max_retries=0")
    began = held.clock.now()
    held.until(1, lambda job: job.status == "failed", seconds=3 * silence_s)
    assert 2 * silence_s - 60 <= held.clock.now() - began < 2 * silence_s, "its words count"
    assert (held.alive, held.reasons(1)) == (0, [Reason.TRAINER_ERROR])
    assert held.store.jobs.get(1).message == "the trainer was silent for 2 min"


def test_a_job_over_its_time_limit_keeps_a_checkpoint_and_a_retry_with_more_goes_on_from_it(held: HeldLab) -> None:
    held.start()
    held.submit(UNSAVED, "--set=resources.time_limit=1h", steps=100000)
    held.until(1, lambda job: (job.step or 0) >= 5)
    told = held.cli("edit", 1, "--set=resources.time_limit=1s", "--set=labels.team=a")
    assert told == 'Job 1 is changed: resources.time_limit 60 min -> 1 s, labels {} -> {"team": "a"}.\n'
    held.until(1, lambda job: job.status == "failed", seconds=60)
    over = json.loads(held.cli("status", 1, "--json"))
    assert (over["reason"], over["labels"]) == ("timed_out", {"team": "a"})
    assert "loractl retry 1 --set resources.time_limit=2h continues" in held.cli("status", 1)
    refused = held.cli("retry", 1, "--set=training.learning_rate=0.1", code=2)
    assert "loractl submit --like 1 --set training.learning_rate=..." in refused

    held.cli("retry", 1, "--set=resources.time_limit=2h")
    held.until(1, lambda job: job.attempt == 2 and (job.step or 0) > over["step"], seconds=60)
    assert (held.store.attempts.of_job(1)[1].resumed_from_step or 0) >= over["step"], "no step was taken again"


def test_two_simulated_cards_run_two_jobs_at_once(held: HeldLab) -> None:
    held.start(LORACTL_DEVICES="sim:8GiB,24GiB")
    jobs = [held.submit(name=f"job-{n}", steps=200) for n in range(2)]
    held.until(jobs[1], lambda job: job.status is Status.RUNNING)
    assert held.store.jobs.get(jobs[0]).status is Status.RUNNING
    shown = [held.until(job_id, lambda job: job.status is Status.SUCCEEDED) for job_id in jobs]
    assert {job.gpu for job in shown} == {"SIM-0", "SIM-1"}


def test_what_the_loaded_base_takes_is_noted_with_the_attempt_and_changes_no_plan(held: HeldLab) -> None:
    def loads(order: Start, stop: StopOrder, tell: Tell, sleep: Sleep) -> Ended:
        tell(Planned(job_id=order.job_id, lora=2 * GIB, qlora=None))
        sleep(10.0)
        tell(Planned(job_id=order.job_id, base=GIB))
        return train(order, stop, tell, sleep)

    held.start(loads)
    held.submit()
    job = held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert held.store.attempts.of_job(1)[0].base_bytes == GIB
    assert job.planned["lora"] == 2 * GIB
