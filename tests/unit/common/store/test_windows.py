"""Cards whose workers stop, in the store: their rows, and what an attempt teaches of the time to a checkpoint."""

from __future__ import annotations

import datetime as dt

import pytest
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason, Status
from loractl.common.placement.cards import TimeLeft
from loractl.common.store.queries.backlog import line_up
from loractl.common.store.records import Claim, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from ...factories import NOON, PLENTY, Clock, node_state, submission


@pytest.fixture
def timed(store: Store, clock: Clock) -> Store:
    return Store(store.engine, clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serve(store: Store, clock: Clock, minutes: float = 60) -> None:
    until = clock.now + dt.timedelta(minutes=minutes)
    store.cards.see(node_state(until=until, window_s=60.0 * minutes))


def claimed(store: Store) -> Claim:
    found = store.attempts.claim("box:0")
    assert isinstance(found, Claim)
    return found


def save(store: Store, claim: Claim, step: int) -> None:
    prefix = f"jobs/{claim.job_id}/checkpoints/{claim.attempt}-{step}"
    assert store.attempts.keep_checkpoint(claim, StoredCheckpoint(step=step, prefix=prefix))


def test_the_time_to_the_first_checkpoint_is_the_newest_attempts(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    serve(timed, clock)
    first = claimed(timed)
    clock.forward(300)
    save(timed, first, 50)
    clock.forward(40)
    save(timed, first, 100)
    assert timed.jobs.get(job_id).checkpoint_s == 300
    timed.attempts.finish(first, Reason.DRAINED, "stopped", Progress())
    serve(timed, clock)
    second = claimed(timed)
    clock.forward(200)
    save(timed, second, 150)
    assert timed.jobs.get(job_id).checkpoint_s == 200


def test_a_job_that_stored_nothing_before_the_card_went_needs_more_than_it_had(timed: Store, clock: Clock) -> None:
    """So it stops to try windows of that length, and why says so."""
    job_id = timed.jobs.submit(submission())
    serve(timed, clock, 10)
    mine = claimed(timed)
    clock.forward(600)
    timed.attempts.finish(mine, Reason.DRAINED, "stopped", Progress())
    assert timed.jobs.get(job_id).checkpoint_s == 750
    assert timed.jobs.get(job_id).retries_used == 0
    serve(timed, clock, 10)
    assert timed.attempts.claim("box:0") is None
    serve(timed, clock, 13)
    assert claimed(timed).attempt == 2


def test_a_stop_before_the_end_says_nothing_of_the_time(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    serve(timed, clock, 10)
    mine = claimed(timed)
    clock.forward(60)
    timed.attempts.finish(mine, Reason.DRAINED, "scancel", Progress())
    assert timed.jobs.get(job_id).checkpoint_s is None


def test_a_card_is_closed_from_its_end_on(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission())
    serve(timed, clock, 10)
    view = timed.cards.fleet()
    assert (view.cards["box:0"].left_s, view.cards["box:0"].window_s, view.cards["box:0"].open) == (600, 600, True)
    clock.now = NOON + dt.timedelta(minutes=10)
    assert not timed.cards.fleet().cards["box:0"].open
    assert timed.attempts.claim("box:0") is None


def test_no_job_is_left_for_a_worker_that_has_no_time_for_any(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission())
    job_id = timed.jobs.submit(submission(user="bob"))
    timed.jobs.cancel(1, "ada")

    def left(seconds: float, host: str = "box") -> bool:
        return timed.jobs.has_unfinished(PLENTY, {}, TimeLeft(host=host, seconds=seconds, window_s=4000))

    assert (left(2000), left(1999)) == (True, False), "half of the time, where nothing was measured"
    serve(timed, clock)
    mine = claimed(timed)
    assert (left(10), left(3000, "other")) == (True, False), "it runs there"
    clock.forward(300)
    save(timed, mine, 50)
    timed.attempts.finish(mine, Reason.DRAINED, "stopped", Progress())
    assert timed.jobs.get(job_id).status is Status.QUEUED
    assert (left(300), left(299), timed.jobs.has_unfinished(PLENTY, {})) == (True, False, True)


def test_a_short_job_starts_behind_any_number_that_no_card_stays_for(timed: Store, clock: Clock) -> None:
    """Of other users and of its own, also once those have waited a day. Few statements read past them."""
    long = [timed.jobs.submit(submission(lora=1, qlora=1, user="eve", name=f"j{n}")) for n in range(70)]
    with Session(timed.engine) as session, session.begin():
        for job in session.scalars(select(Job)):
            job.attempt, job.checkpoint_s = 1, 36_000.0
            line_up(job, {}, NOON)
    short = [timed.jobs.submit(submission(lora=1, qlora=1, user=user)) for user in ("eve", "ada")]
    statements = list[str]()
    event.listen(timed.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    for hours in (0, 30):
        clock.forward(hours * 3600)
        serve(timed, clock, 240)
        (decision,) = timed.cards.fleet().decisions
        statements.clear()
        claim = claimed(timed)
        assert len(statements) < 40
        assert decision.placed is not None and decision.placed.job.job_id == claim.job_id and claim.job_id in short
        timed.attempts.finish(claim, Reason.BAD_DATA, "no rows", Progress())
    assert timed.jobs.get(long[0]).status is Status.QUEUED
