"""A held job waits where it is until a person releases it."""

from __future__ import annotations

import pytest

from loractl.common.errors import JobNotFound, WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from ...factories import PLENTY, RESULT, submission, take


def test_a_held_job_is_not_claimed_and_says_who_holds_it_and_why(store: Store) -> None:
    job_id = store.submit(submission())
    row = store.hold(job_id, "bob", "the data are wrong")
    assert (row.status, row.held, row.message) == (Status.QUEUED, True, "held by bob: the data are wrong")
    assert take(store) is None
    assert store.unfinished(PLENTY) == 0
    assert [e.text for e in store.events(job_id)] == ["queued by ada", "held by bob: the data are wrong"]

    released = store.retry(job_id, "ada")
    assert (released.held, released.message) == (False, None)
    taken = take(store)
    assert isinstance(taken, Claim) and taken.job_id == job_id


def test_a_reason_that_no_database_can_hold_is_kept_as_far_as_it_can_be(store: Store) -> None:
    job_id = store.submit(submission())
    assert store.hold(job_id, "bob", "a\0b\ud800").message == "held by bob: a\ufffdb?"
    assert store.hold(job_id, "ada").message == "held by ada", "the last word counts"


def test_only_a_waiting_job_can_be_held(store: Store) -> None:
    with pytest.raises(JobNotFound):
        store.hold(1, "bob")
    job_id = store.submit(submission())
    taken = take(store)
    assert isinstance(taken, Claim)
    with pytest.raises(WrongState, match=f"job {job_id} is running: only a waiting job can be held"):
        store.hold(job_id, "bob")
    store.finish(taken, Reason.OK, "done", Progress(), RESULT)
    with pytest.raises(WrongState, match="is succeeded"):
        store.hold(job_id, "bob")
    assert not store.job(job_id).held
