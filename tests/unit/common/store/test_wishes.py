"""What a person wishes of a job: held where it is, cancelled, queued again."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import Connection, event, update
from sqlalchemy.orm import Session

from loractl.common.errors import JobNotFound, NotYours, WrongState
from loractl.common.job.names import Reference
from loractl.common.job.status import Reason, Status
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from ...factories import PLENTY, RESULT, submission, take

pytestmark = pytest.mark.both


def test_a_held_job_is_not_claimed_and_says_who_holds_it_and_why(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    row = store.jobs.hold(job_id, "bob", "the data are wrong")
    assert (row.status, row.held, row.message) == (Status.QUEUED, True, "held by bob: the data are wrong")
    assert take(store) is None
    assert not store.jobs.has_unfinished(PLENTY, {})
    assert [e.text for e in store.jobs.events(job_id)] == ["queued by ada", "held by bob: the data are wrong"]

    released = store.jobs.release(job_id, "ada")
    assert (released.held, released.message) == (False, None)
    taken = take(store)
    assert isinstance(taken, Claim) and taken.job_id == job_id


@pytest.mark.parametrize("upgraded_url", ["postgresql"], indirect=True)
def test_a_job_that_is_held_while_a_claim_reads_it_is_not_started(store: Store) -> None:
    """The claim read it as ready, and asked of the locked row alone that it waits."""
    job_id, other = store.jobs.submit(submission()), Store(make_engine(str(store.engine.url.render_as_string(False))))

    def hold(_: Connection, __: object, statement: str, *rest: object) -> None:
        if "SKIP LOCKED" in statement and "FROM jobs" in statement:
            other.jobs.hold(job_id, "bob")

    event.listen(store.engine, "before_cursor_execute", hold)
    try:
        assert not isinstance(take(store), Claim)
    finally:
        event.remove(store.engine, "before_cursor_execute", hold)
        other.engine.dispose()
    assert store.jobs.get(job_id).status is Status.QUEUED and store.jobs.get(job_id).held


def test_a_reason_that_no_database_can_hold_is_kept_as_far_as_it_can_be(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    assert store.jobs.hold(job_id, "bob", "a\0b\ud800").message == "held by bob: a\ufffdb?"
    assert store.jobs.hold(job_id, "ada").message == "held by ada", "the last word counts"


def test_only_a_waiting_job_can_be_held(store: Store) -> None:
    with pytest.raises(JobNotFound):
        store.jobs.hold(1, "bob")
    job_id = store.jobs.submit(submission())
    taken = take(store)
    assert isinstance(taken, Claim)
    with pytest.raises(WrongState, match=f"job {job_id} is running: only a waiting job can be held") as refused:
        store.jobs.hold(job_id, "bob")
    gives = "--now --reason ... requeues it with a checkpoint"
    assert refused.value.hint == f"loractl drain {store.jobs.get(job_id).node} {gives}"
    store.attempts.finish(taken, Reason.OK, "done", Progress(), RESULT)
    with pytest.raises(WrongState, match="has succeeded"):
        store.jobs.hold(job_id, "bob")
    assert not store.jobs.get(job_id).held


def test_a_held_job_that_is_cancelled_is_cancelled_and_not_held(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    store.jobs.hold(job_id, "bob")
    over = store.jobs.cancel(job_id, "ada")
    assert (over.status, over.held, over.reason) == (Status.CANCELLED, False, Reason.CANCELLED)
    assert over.ended_at is not None


def test_a_cancel_that_meets_the_end_of_an_attempt_is_true(upgraded_url: str) -> None:
    """The attempt gives its job back while the cancel comes: it then holds for the job that waits."""
    engine = make_engine(upgraded_url)
    store = Store(engine)
    job_id = store.jobs.submit(submission())
    assert isinstance(take(store), Claim)
    done: list[Job | Exception] = []

    def wish_it() -> None:
        try:
            done.append(store.jobs.cancel(job_id, "ada"))
        except WrongState as error:
            done.append(error)

    thread = threading.Thread(target=wish_it)
    with Session(engine) as attempt, attempt.begin():
        given = update(Job).where(Job.job_id == job_id)
        attempt.execute(given.values(status=Status.QUEUED, token=None, lease_expires_at=None))
        thread.start()
        if engine.dialect.name == "postgresql":
            thread.join(timeout=30)  # it waits for nobody's row
            assert done
        else:
            time.sleep(0.1)  # BEGIN IMMEDIATE lets no one in
    thread.join(timeout=30)
    (job,) = done
    assert isinstance(job, Job), job
    assert not isinstance(take(store), Claim), "it does not run again"
    over = store.jobs.get(job_id)
    assert (over.status, over.message) == (Status.CANCELLED, "cancelled by ada")
    engine.dispose()


def test_a_wish_lasts_as_long_as_the_attempt_that_it_is_for(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    assert store.jobs.cancel(job_id, "ada").cancel_requested
    assert store.cards.take_turn(0, 0) is not None
    assert store.jobs.get(job_id).cancel_requested and store.attempts.beat(claim, Progress()).cancel_requested
    store.attempts.finish(claim, Reason.CANCELLED, "stopped", Progress())
    assert store.jobs.retry(job_id, "ada").cancel_requested is False
    assert isinstance(take(store), Claim), "the wish went with the attempt"


@pytest.mark.parametrize("upgraded_url", ["sqlite"], indirect=True)
def test_in_a_closed_lab_a_stranger_stops_no_running_job(store: Store) -> None:
    """PostgreSQL's own: tests/integration/test_postgres_roles.py."""
    job_id = store.jobs.submit(submission())
    assert isinstance(take(store), Claim)
    store.lab.set("changes", "own")
    with pytest.raises(NotYours, match="may cancel it"):
        store.jobs.cancel(job_id, "bob")
    assert not store.jobs.get(job_id).cancel_requested


def test_a_number_that_no_job_can_have_is_not_found(store: Store) -> None:
    for job_id in (-1, 0, 2**31, 10**30):
        with pytest.raises(JobNotFound):
            store.jobs.cancel(job_id, "ada")


@pytest.mark.parametrize("end", [None, Reason.BAD_DATA])
def test_who_asks_for_an_adapter_too_early_reads_what_its_job_does(store: Store, end: Reason | None) -> None:
    """ "no adapter 1 is stored" sounded as if there were no such job."""
    job_id = store.jobs.submit(submission())
    with pytest.raises(WrongState, match=f"job {job_id} has no adapter: it is queued"):
        store.adapters.get(Reference(job_id=job_id))
    mine = take(store)
    assert isinstance(mine, Claim)
    if end is not None:
        store.attempts.finish(mine, end, "told", Progress())
    with pytest.raises(WrongState, match="it has failed" if end else "it is running") as caught:
        store.adapters.get(Reference(job_id=job_id))
    assert str(caught.value.hint).startswith(f"loractl status {job_id}")


def test_who_asks_for_an_adapter_that_was_removed_reads_so(store: Store) -> None:
    store.jobs.submit(submission())
    mine = take(store)
    assert isinstance(mine, Claim)
    store.attempts.finish(mine, Reason.OK, "trained", Progress(), RESULT)
    assert store.results.remove(mine.job_id, "ada")
    with pytest.raises(WrongState, match="job 1 no longer has a result: it was removed"):
        store.adapters.get(Reference(job_id=mine.job_id))
