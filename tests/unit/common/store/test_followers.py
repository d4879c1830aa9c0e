"""Jobs after jobs: who is blocked, what lets it go, and what keeps it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loractl.common.errors import WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB

from ...factories import RESULT, Clock, node_state, spec, submission, take


def queue(store: Store, *after: int, **keys: object) -> int:
    return store.jobs.submit(submission(lora=1, qlora=1, **{"after": list(after), **keys}))


def start(store: Store, job_id: int) -> Claim:
    claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == job_id, claim
    return claim


def end(store: Store, job_id: int, reason: Reason = Reason.OK) -> None:
    store.attempts.finish(start(store, job_id), reason, "", Progress(), RESULT if reason is Reason.OK else None)


def standing(store: Store, job_id: int) -> tuple[int | None, bool, bool]:
    row = store.jobs.get(job_id)
    return row.awaits, row.held, row.held_too


def round_of_the_fleet(store: Store) -> None:
    store.cards.see(node_state("other:0", total=GIB // 2))
    assert store.cards.take_turn("other:0", 0.0, 0.0) is not None


FREE = (None, False, False)


def test_a_job_starts_after_those_that_it_names_and_in_no_order_of_its_own(store: Store) -> None:
    first, second = queue(store), queue(store)
    last = queue(store, second, first)
    assert standing(store, last) == (second, True, False)
    end(store, first)
    assert standing(store, last) == (second, True, False)
    end(store, second)
    assert standing(store, last) == FREE
    assert store.jobs.events(last)[-1].text == f"job {second} has succeeded"
    end(store, last)


def test_what_has_succeeded_before_is_not_waited_for(store: Store) -> None:
    first = queue(store)
    end(store, first)
    assert standing(store, queue(store, first)) == FREE


@pytest.mark.parametrize("reason", [Reason.BAD_DATA, Reason.CANCELLED])
def test_a_failure_keeps_it_until_a_retry_succeeds(store: Store, reason: Reason) -> None:
    first = queue(store, max_retries=0)
    last = queue(store, first)
    end(store, first, reason)
    assert standing(store, last) == (first, True, False) and take(store) is None
    store.jobs.retry(first, "ada")
    end(store, first)
    assert standing(store, last) == FREE


@pytest.mark.parametrize("reason", [Reason.BAD_DATA, Reason.OK])
def test_any_end_will_do_where_the_job_says_so(store: Store, reason: Reason) -> None:
    first = queue(store, max_retries=0)
    last = queue(store, first, after_any=True)
    end(store, first, reason)
    assert standing(store, last) == FREE and store.jobs.events(last)[-1].text.startswith(f"job {first} has ")


def test_an_attempt_that_is_tried_again_is_no_end(store: Store) -> None:
    first = queue(store, max_retries=2)
    last = queue(store, first, after_any=True)
    end(store, first, Reason.TRAINER_ERROR)
    assert standing(store, last) == (first, True, False)


def test_the_round_lets_go_what_ended_otherwise(store: Store) -> None:
    """By a person, by an earlier version, or while the follower was being submitted."""
    kept, any_end = queue(store), queue(store)
    after_kept, after_any = queue(store, kept), queue(store, any_end, after_any=True)
    store.jobs.cancel(kept, "ada")
    store.jobs.cancel(any_end, "ada")
    round_of_the_fleet(store)
    assert standing(store, after_kept) == (kept, True, False)
    assert standing(store, after_any) == FREE


def test_a_person_s_hold_outlives_the_wait_and_the_wait_outlives_a_release(store: Store) -> None:
    first = queue(store)
    last, released = queue(store, first), queue(store, first)
    for job_id in (last, released):
        store.jobs.hold(job_id, "mara", "disk")
    assert standing(store, last) == (first, True, True)
    store.jobs.retry(released, "mara")
    assert standing(store, released) == (first, True, False)
    end(store, first)
    assert standing(store, last) == (None, True, False)
    assert standing(store, released) == FREE


def test_nobody_releases_what_only_waits(store: Store) -> None:
    first = queue(store)
    last = queue(store, first)
    with pytest.raises(WrongState, match=f"job {last} waits for job {first}, nobody holds it"):
        store.jobs.retry(last, "ada")


def test_a_cancelled_one_waits_again_when_it_is_retried(store: Store) -> None:
    first = queue(store)
    last = queue(store, first)
    assert store.jobs.cancel(last, "ada").status is Status.CANCELLED
    store.jobs.retry(last, "ada")
    assert standing(store, last) == (first, True, False)
    store.jobs.cancel(last, "ada")
    end(store, first)
    store.jobs.retry(last, "ada")
    round_of_the_fleet(store)
    assert standing(store, last) == FREE


def test_patience_for_lora_begins_when_it_may_start(timed: Store, clock: Clock) -> None:
    first = queue(timed)
    last = queue(timed, first, lora_patience=3600)
    clock.forward(4000)
    assert timed.jobs.end_patience() == []
    end(timed, first)
    until = timed.jobs.get(last).lora_until
    assert until is not None and (until - clock.now).total_seconds() == 3600


def test_followers_are_found_through_each_other(store: Store) -> None:
    first = queue(store)
    second = queue(store, first)
    third, other = queue(store, second), queue(store)
    assert store.jobs.followers(first) == [second, third]
    assert store.jobs.followers(other) == store.jobs.followers(third) == []


def test_jobs_of_one_submit_name_each_other_and_all_of_them_are_written_or_none(store: Store) -> None:
    answers = submission(lora=1, qlora=1, name="answers")
    begun = spec(name="pairs", after=["answers"], lora={"init_from": {"job": "answers"}})
    pairs = replace(submission(lora=1, qlora=1), spec=begun)
    first, second = store.jobs.submit_all([answers, pairs])
    stored = store.jobs.get(second).spec
    assert (stored["after"], stored["lora"]["init_from"]) == ([first], str(first))
    assert standing(store, second) == (first, True, False)
