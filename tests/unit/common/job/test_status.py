"""Statuses, reasons and what a reason means for a job."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.status import OUTCOMES, TRANSITIONS, Reason, Status, retry_delay_s


def test_every_reason_has_an_outcome_with_advice_for_a_person() -> None:
    assert set(OUTCOMES) == set(Reason)
    assert all(len(outcome.advice) > 10 for outcome in OUTCOMES.values())


def test_every_outcome_ends_the_job_and_only_one_is_a_success() -> None:
    assert all(outcome.status.is_terminal for outcome in OUTCOMES.values())
    assert [r for r, o in OUTCOMES.items() if o.status is Status.SUCCEEDED] == [Reason.OK]
    assert [r for r, o in OUTCOMES.items() if o.status is Status.CANCELLED] == [Reason.CANCELLED, Reason.PRUNED]


def test_only_what_is_tried_again_can_spend_a_retry() -> None:
    assert [r for r, o in OUTCOMES.items() if o.counts and not o.retryable] == []


def test_what_the_lab_caused_spends_no_retry() -> None:
    free = {r for r, o in OUTCOMES.items() if o.retryable and not o.counts}
    # out of memory is the plan's fault; the store tries again while a method or a larger card is left
    failures = {r for r, o in OUTCOMES.items() if o.blames is not None}
    of_a_box = {Reason.DISK_FULL, Reason.STORE_FAILED, Reason.BASE_MISSING}
    assert failures == of_a_box | {Reason.WORKER_LOST, Reason.KILLED, Reason.GPU_ERROR}
    assert free == failures | {Reason.PREEMPTED, Reason.DRAINED, Reason.HOST_LOST, Reason.OUT_OF_MEMORY}


def test_the_transitions_are_closed_and_every_outcome_can_be_reached_from_running() -> None:
    assert set(TRANSITIONS) == set(Status)
    assert set().union(*TRANSITIONS.values()) <= set(Status)
    assert {outcome.status for outcome in OUTCOMES.values()} <= TRANSITIONS[Status.RUNNING]
    assert all(status not in after for status, after in TRANSITIONS.items())


def test_an_ended_job_only_goes_back_into_the_queue_and_a_success_stays() -> None:
    ended = {status: TRANSITIONS[status] for status in Status if status.is_terminal}
    assert ended == {
        Status.SUCCEEDED: frozenset(),
        Status.FAILED: {Status.QUEUED},
        Status.CANCELLED: {Status.QUEUED},
    }


def test_every_status_can_be_reached_from_queued() -> None:
    reached, edge = {Status.QUEUED}, {Status.QUEUED}
    while edge := set().union(*(TRANSITIONS[s] for s in edge)) - reached:
        reached |= edge
    assert reached == set(Status)


@given(st.integers(1, 100))
def test_the_delay_doubles_from_ten_seconds_up_to_ten_minutes(attempt: int) -> None:
    assert retry_delay_s(1) == 10
    assert retry_delay_s(attempt + 1) in (2 * retry_delay_s(attempt), 600)
    assert retry_delay_s(attempt) <= retry_delay_s(attempt + 1) <= 600
