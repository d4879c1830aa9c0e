"""Sweeps in the database: all members or none, who is stopped at a rung, and what a retry is spared."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from loractl.common.errors import LoractlError, SweepNotFound, WrongState
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.job.sweep import RUNGS, NewSweep
from loractl.common.store.records import HELD_OUT_LOSS, Beat, Claim, Progress
from loractl.common.store.store import Store

from ....databases import SQLITE_ALONE
from ...factories import RESULT, Clock, submission, take

RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def start(store: Store, rates: Sequence[float] = RATES, rungs: tuple[float, ...] | None = RUNGS) -> int:
    """A sweep over learning rates, of 32 steps a member."""
    members = [
        submission(name=f"triage-{n}", training={"learning_rate": rate, "max_steps": 32, "eval_steps": 0.25})
        for n, rate in enumerate(rates, 1)
    ]
    varied = {"training.learning_rate": ",".join(map(str, rates))}
    return store.sweeps.submit(NewSweep(name="triage", varied=varied, rungs=rungs), members)


def claims(store: Store, count: int = 4) -> list[Claim]:
    found = [take(store) for _ in range(count)]
    assert all(isinstance(claim, Claim) for claim in found)
    return found  # type: ignore[return-value]


def reach(store: Store, claim: Claim, step: int, loss: float) -> Beat:
    metrics = ((step, "eval_loss", loss),)
    return store.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=step, total_steps=32, metrics=metrics))


def succeed(store: Store, claim: Claim, loss: float) -> None:
    end = Progress(step=32, total_steps=32, metrics=((32, HELD_OUT_LOSS, loss),))
    assert store.attempts.finish(claim, Reason.OK, "better", end, RESULT) is Status.SUCCEEDED


def test_a_sweep_s_members_are_jobs_that_name_it(store: Store) -> None:
    alone = store.jobs.submit(submission())
    sweep_id = start(store)
    view = store.sweeps.get(sweep_id)
    assert (view.name, view.user, view.rungs, view.ended, view.best) == ("triage", "ada", (0.25, 0.5), False, None)
    assert [member.settings["training.learning_rate"] for member in view.members] == list(RATES)
    assert [job.sweep_id for job in store.jobs.matching(sweep_id=sweep_id)] == [sweep_id] * 4
    assert store.jobs.get(alone).sweep_id is None
    assert f"as a member of sweep {sweep_id}" in store.jobs.events(view.members[0].job_id)[0].text
    assert [found.sweep_id for found in store.sweeps.several([sweep_id, 99])] == [sweep_id]
    with pytest.raises(SweepNotFound, match="there is no sweep 99"):
        store.sweeps.get(99)


def test_all_members_are_queued_or_none(store: Store) -> None:
    good, bad = submission(name="a-1"), replace(submission(name="a-2"), data={"path": {"uri": object()}})  # no JSON
    with pytest.raises(LoractlError, match="the database refuses the value of data"):
        store.sweeps.submit(NewSweep(name="a", varied={}), [good, bad])
    assert store.jobs.matching() == [] and store.sweeps.several(range(10)) == []


@SQLITE_ALONE
def test_a_member_that_loses_at_a_rung_is_told_to_stop_and_why(store: Store) -> None:
    start(store)
    one, two, three, four = claims(store)
    assert one.rungs == RUNGS
    assert reach(store, one, 8, 2.0).pruned is None, "the first has nobody to lose to"
    assert reach(store, two, 8, 1.5).pruned is None
    told = reach(store, three, 8, 1.8).pruned
    assert told is not None
    assert told == (
        "stopped at 25 % of its steps (step 8): held-out loss 1.8000 is not the best of 3 there; "
        "1.5000 or less would have continued"
    )
    assert reach(store, four, 8, 1.8).pruned is None, "the second of four"
    assert reach(store, two, 12, 9.9).pruned is None, "no rung"
    assert reach(store, two, 16, 1.4).pruned is None, "the first at the second rung"
    assert reach(store, one, 16, 1.6).pruned is not None
    assert reach(store, one, 24, 9.9).pruned is None, "beyond the last rung"

    assert store.attempts.finish(three, Reason.PRUNED, told, Progress(step=9, total_steps=32)) is Status.CANCELLED
    job = store.jobs.get(three.job_id)
    assert (job.status, job.reason, job.message, job.step) == (Status.CANCELLED, Reason.PRUNED, told, 9)
    assert store.attempts.of_job(three.job_id)[0].reason is Reason.PRUNED


@SQLITE_ALONE
def test_the_view_names_the_best_so_far_and_the_steps_that_were_saved(store: Store) -> None:
    sweep_id = start(store)
    one, two, three, four = claims(store)
    reach(store, one, 8, 2.0)
    reach(store, two, 8, 1.5)
    assert store.sweeps.get(sweep_id).best.job_id == two.job_id  # type: ignore[union-attr]
    reach(store, one, 16, 1.9)
    assert store.sweeps.get(sweep_id).best.job_id == two.job_id, "it had less after fewer steps"  # type: ignore[union-attr]
    for lost in (three, four):
        reach(store, lost, 8, 3.0)
        store.attempts.finish(lost, Reason.PRUNED, "stopped", Progress(step=8, total_steps=32))
    succeed(store, one, 1.2)
    succeed(store, two, 1.3)
    view = store.sweeps.get(sweep_id)
    assert view.ended and view.best is not None
    assert (view.best.job_id, view.best.final_loss, view.saved_steps) == (one.job_id, 1.2, (48, 128))
    assert [(p.rung, p.step, p.loss) for p in view.members[0].rungs] == [(0.25, 8, 2.0), (0.5, 16, 1.9)]
    assert [member.pruned for member in view.members] == [False, False, True, True]


@SQLITE_ALONE
def test_a_resumed_member_is_compared_by_its_newest_attempt(timed: Store, clock: Clock) -> None:
    sweep_id = start(timed, RATES[:2])
    one, two = claims(timed, 2)
    reach(timed, one, 8, 9.0)
    clock.forward(600)
    assert timed.attempts.reap(), "both are lost"
    again = {claim.job_id: claim for claim in claims(timed, 2)}
    assert again[one.job_id].attempt == 2
    assert reach(timed, again[two.job_id], 8, 2.0).pruned is None
    assert reach(timed, again[one.job_id], 8, 1.0).pruned is None
    assert timed.sweeps.get(sweep_id).members[0].rungs[0].loss == 1.0
    assert reach(timed, again[one.job_id], 16, 1.0).pruned is None
    assert "1.0000 or less" in (reach(timed, again[two.job_id], 16, 1.1).pruned or "")


def test_an_attempt_that_goes_on_beyond_a_rung_is_not_taken_to_have_reached_it_later(
    timed: Store, clock: Clock
) -> None:
    """Its loss at a later step would be held against those of others at the rung."""
    sweep_id = start(timed, RATES[:1])
    (first,) = claims(timed, 1)
    reach(timed, first, 8, 2.0)
    clock.forward(600)
    timed.attempts.reap()
    (second,) = claims(timed, 1)
    reach(timed, second, 16, 1.0)
    assert [(p.step, p.loss) for p in timed.sweeps.get(sweep_id).members[0].rungs] == [(8, 2.0), (16, 1.0)]


def test_a_beat_that_is_repeated_after_a_lost_answer_gets_the_same_verdict(store: Store) -> None:
    start(store, RATES[:2])
    one, two = claims(store, 2)
    reach(store, one, 8, 1.0)
    first = reach(store, two, 8, 2.0).pruned
    assert first is not None and reach(store, two, 8, 2.0).pruned == first


@SQLITE_ALONE
def test_a_stopped_member_that_is_retried_runs_to_its_end(store: Store) -> None:
    sweep_id = start(store, RATES[:2])
    one, two = claims(store, 2)
    reach(store, one, 8, 1.0)
    store.attempts.finish(two, Reason.PRUNED, reach(store, two, 8, 2.0).pruned or "", Progress(step=8, total_steps=32))
    store.jobs.retry(two.job_id, "ada")
    (again,) = claims(store, 1)
    assert (again.job_id, again.rungs) == (two.job_id, ())
    assert reach(store, again, 8, 2.0).pruned is None
    assert reach(store, again, 16, 2.0).pruned is None
    succeed(store, again, 0.9)
    assert store.sweeps.get(sweep_id).best.job_id == two.job_id  # type: ignore[union-attr]


@SQLITE_ALONE
def test_a_sweep_without_rungs_stops_nobody(store: Store) -> None:
    sweep_id = start(store, rungs=None)
    assert store.sweeps.get(sweep_id).rungs == ()
    for claim in claims(store):
        assert claim.rungs == ()
        assert reach(store, claim, 8, 1.0 + claim.job_id).pruned is None


@pytest.mark.both
def test_of_members_that_reach_a_rung_at_the_same_moment_the_best_goes_on_and_both_count(store: Store) -> None:
    for _ in range(5):
        start(store, RATES[:2])
        pair, told = claims(store, 2), {}
        gate = threading.Barrier(2)

        def run(claim: Claim, loss: float, told: dict[int, Any] = told, gate: threading.Barrier = gate) -> None:
            gate.wait()
            told[claim.job_id] = reach(store, claim, 8, loss).pruned

        threads = [threading.Thread(target=run, args=(claim, 1.0 + n)) for n, claim in enumerate(pair)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told[pair[0].job_id] is None, "the best"
        reached = [m.rungs[0].loss for m in store.sweeps.get(store.jobs.get(pair[0].job_id).sweep_id or 0).members]
        assert reached == [1.0, 2.0]


def test_a_cancelled_sweep_s_unfinished_members_end(store: Store) -> None:
    sweep_id = start(store, RATES[:3])
    one, two = claims(store, 2)
    succeed(store, one, 1.0)
    cancelled = store.sweeps.cancel(sweep_id, "ada")
    assert [(job.status, job.cancel_requested) for job in cancelled] == [
        (Status.RUNNING, True),
        (Status.CANCELLED, False),
    ]
    assert store.attempts.finish(two, Reason.CANCELLED, "cancelled while it ran", Progress()) is Status.CANCELLED
    with pytest.raises(WrongState, match=f"all jobs of sweep {sweep_id} have ended"):
        store.sweeps.cancel(sweep_id, "ada")
    with pytest.raises(SweepNotFound):
        store.sweeps.cancel(99, "ada")
    assert store.jobs.get(one.job_id).status is Status.SUCCEEDED


@SQLITE_ALONE
def test_a_cancel_goes_before_a_lost_rung(store: Store) -> None:
    start(store, RATES[:1])
    (claim,) = claims(store, 1)
    store.jobs.cancel(claim.job_id, "ada")
    assert store.attempts.finish(claim, Reason.PRUNED, "stopped", Progress()) is Status.CANCELLED
    assert store.jobs.get(claim.job_id).reason is Reason.CANCELLED
