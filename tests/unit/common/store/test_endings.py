"""How attempts end in the database: cancelled, tried again, lost, held, and what counts."""

from __future__ import annotations

import datetime as dt

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from loractl.common.artifacts import checkpoint_prefix
from loractl.common.errors import WrongState
from loractl.common.job.status import LAB_FAILURE_LIMIT, LAB_RETRY_DELAY_S, OUTCOMES, TRANSITIONS, Reason, Stage, Status
from loractl.common.placement.lines import RESULT_FIRST_S, VRAM_CLASSES
from loractl.common.settings import LEASE_S
from loractl.common.store.guard import begun, ended, retried
from loractl.common.store.records import Claim, Left, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB

from ...factories import PLENTY, RESULT, Clock, submission, take

NOTHING = Progress()


def claim(store: Store) -> Claim:
    taken = take(store)
    assert isinstance(taken, Claim)
    return taken


def end(store: Store, reason: Reason, mine: Claim | None = None) -> Status | None:
    result = RESULT if reason is Reason.OK else None
    return store.attempts.finish(mine or claim(store), reason, f"because of {reason.value}", NOTHING, result)


def lose(store: Store, clock: Clock) -> None:
    """An attempt whose worker falls silent."""
    claim(store)
    clock.forward(LEASE_S + 1)
    store.attempts.reap()


@pytest.mark.both
def test_a_waiting_job_is_cancelled_at_once_and_never_claimed(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    row = timed.jobs.cancel(job_id, "bob")
    assert (row.status, row.reason, row.message) == (Status.CANCELLED, Reason.CANCELLED, "cancelled by bob")
    assert row.ended_at == clock.now
    assert take(timed) is None
    assert [e.text for e in timed.jobs.events(job_id)] == ["queued by ada", "cancelled by bob"]


@pytest.mark.parametrize("reason", [Reason.CANCELLED, Reason.TRAINER_ERROR, Reason.DRAINED, Reason.WORKER_LOST])
def test_a_running_job_is_told_to_stop_and_ends_cancelled_however_it_stops(store: Store, reason: Reason) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    assert store.jobs.cancel(job_id, "bob").status is Status.RUNNING
    assert store.attempts.beat(mine, NOTHING).cancel_requested
    assert end(store, reason, mine) is Status.CANCELLED
    row = store.jobs.get(job_id)
    assert (row.status, row.reason) == (Status.CANCELLED, Reason.CANCELLED)
    assert store.attempts.of_job(job_id)[0].reason is reason, "the attempt keeps what happened"
    also = "" if reason is Reason.CANCELLED else "cancelled while it ran; "
    assert row.message == f"{also}because of {reason.value}" == store.jobs.events(job_id)[-1].text
    assert take(store) is None


def test_a_job_that_was_done_before_it_heard_of_the_cancel_has_succeeded(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    store.jobs.cancel(job_id, "bob")
    assert end(store, Reason.OK, mine) is Status.SUCCEEDED
    assert store.jobs.get(job_id).reason is Reason.OK


@pytest.mark.parametrize(
    ("reason", "word", "hint"),
    [
        (Reason.OK, "succeeded", "loractl report {} shows what it measured"),
        (Reason.DIVERGED, "failed", "loractl retry {} queues it again"),
        (Reason.CANCELLED, "been cancelled", "loractl retry {} queues it again"),
    ],
)
def test_an_ended_job_cannot_be_cancelled(store: Store, reason: Reason, word: str, hint: str) -> None:
    job_id = store.jobs.submit(submission())
    end(store, reason)
    with pytest.raises(WrongState, match=f"job {job_id} has already {word}") as refused:
        store.jobs.cancel(job_id, "bob")
    assert refused.value.hint == hint.format(job_id)


def test_finishing_twice_changes_nothing_and_recognises_its_own_success(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    assert end(store, Reason.OK, mine) is Status.SUCCEEDED
    before = len(store.jobs.events(job_id))
    assert end(store, Reason.OK, mine) is Status.SUCCEEDED
    assert end(store, Reason.DIVERGED, mine) is None, "another ending is not the one that was written"
    assert len(store.jobs.events(job_id)) == before
    assert len(store.adapters.all()) == 1
    assert not store.attempts.beat(mine, NOTHING).accepted


def test_a_failure_that_counts_waits_longer_each_time_until_no_retry_is_left(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(max_retries=2))
    for retry, delay in ((1, 10), (2, 20)):
        assert end(timed, Reason.TRAINER_ERROR) is Status.QUEUED
        row = timed.jobs.get(job_id)
        assert (row.retries_used, row.not_before) == (retry, clock.now + dt.timedelta(seconds=delay))
        clock.forward(delay - 1)
        assert take(timed) is None, "not before its time"
        assert timed.jobs.waiting_classes(VRAM_CLASSES) == set()
        clock.forward(1)
        assert timed.jobs.waiting_classes(VRAM_CLASSES) == {8}
    assert end(timed, Reason.TRAINER_ERROR) is Status.FAILED
    row = timed.jobs.get(job_id)
    assert (row.reason, row.attempt, row.ended_at) == (Reason.TRAINER_ERROR, 3, clock.now)
    assert [a.reason for a in timed.attempts.of_job(job_id)] == [Reason.TRAINER_ERROR] * 3
    assert take(timed) is None


def test_without_retries_the_first_failure_that_counts_is_the_last(store: Store) -> None:
    store.jobs.submit(submission(max_retries=0))
    assert end(store, Reason.TRAINER_ERROR) is Status.FAILED


@pytest.mark.parametrize("reason", [Reason.DRAINED, Reason.PREEMPTED])
def test_what_the_lab_caused_is_tried_again_at_once_and_spends_no_retry(store: Store, reason: Reason) -> None:
    job_id = store.jobs.submit(submission(max_retries=0))
    for _ in range(4):
        assert end(store, reason) is Status.QUEUED
    row = store.jobs.get(job_id)
    assert (row.retries_used, row.not_before, row.held, row.attempt) == (0, None, False, 4)


@pytest.mark.both
def test_a_failing_card_is_tried_again_after_a_pause_and_three_of_them_hold_the_job(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(max_retries=0))
    for _ in range(LAB_FAILURE_LIMIT - 1):
        assert end(timed, Reason.GPU_ERROR) is Status.QUEUED
        assert take(timed) is None, "not at once"
        clock.forward(LAB_RETRY_DELAY_S)
    assert end(timed, Reason.GPU_ERROR) is Status.QUEUED
    row = timed.jobs.get(job_id)
    assert (row.held, row.retries_used) == (True, 0)
    assert row.message == (
        "held: its card failed 3 times in a row; the job may cause it; the last on box:0: because of gpu_error"
    )


@pytest.mark.parametrize("reason", [r for r in Reason if not OUTCOMES[r].retryable])
def test_what_another_attempt_cannot_help_ends_the_job_at_once(store: Store, reason: Reason) -> None:
    job_id = store.jobs.submit(submission(max_retries=9))
    assert end(store, reason) is OUTCOMES[reason].status
    assert store.jobs.get(job_id).status is OUTCOMES[reason].status


def test_a_silent_attempt_is_ended_after_its_lease_and_not_before(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(lora=20, qlora=10))
    mine = claim(timed)
    clock.forward(LEASE_S - 1)
    assert timed.attempts.beat(mine, NOTHING).accepted
    clock.forward(LEASE_S)
    assert timed.attempts.reap() == [], "the lease ends now, it is not over"
    clock.forward(0.001)
    assert timed.attempts.reap() == [(job_id, 12)]
    assert timed.attempts.reap() == []
    row = timed.jobs.get(job_id)
    assert (row.status, row.reason, row.message) == (Status.QUEUED, Reason.WORKER_LOST, "box:0 was silent for 60 s")
    assert claim(timed).attempt == 2


def test_a_late_heartbeat_before_the_reaper_keeps_the_attempt(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission())
    mine = claim(timed)
    clock.forward(LEASE_S * 3)
    assert timed.attempts.beat(mine, NOTHING).accepted
    assert timed.attempts.reap() == []


def test_a_lost_job_that_was_to_be_cancelled_is_cancelled(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    claim(timed)
    timed.jobs.cancel(job_id, "ada")
    clock.forward(LEASE_S + 1)
    assert timed.attempts.reap() == []
    assert timed.jobs.get(job_id).status is Status.CANCELLED


def test_a_job_that_loses_its_third_worker_is_held_until_a_person_releases_it(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    for _ in range(LAB_FAILURE_LIMIT - 1):
        lose(timed, clock)
        assert not timed.jobs.get(job_id).held
    lose(timed, clock)
    row = timed.jobs.get(job_id)
    assert (row.status, row.held) == (Status.QUEUED, True)
    assert row.message == (
        "held: its worker was lost 3 times in a row; the job may kill its workers;"
        " the last on box:0: box:0 was silent for 60 s"
    )
    assert take(timed) is None
    assert (timed.jobs.waiting_classes(VRAM_CLASSES), timed.jobs.has_unfinished(PLENTY, {})) == (set(), False)

    released = timed.jobs.release(job_id, "bob")
    assert (released.held, released.message, released.status) == (False, None, Status.QUEUED)
    assert claim(timed).attempt == LAB_FAILURE_LIMIT + 1


def test_a_retried_job_has_all_its_retries_and_lost_workers_again(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(max_retries=0))
    assert end(timed, Reason.TRAINER_ERROR) is Status.FAILED
    row = timed.jobs.retry(job_id, "bob")
    assert (row.status, row.reason, row.ended_at, row.retries_used) == (Status.QUEUED, None, None, 0)
    for _ in range(LAB_FAILURE_LIMIT):
        lose(timed, clock)
    assert timed.jobs.get(job_id).held
    clock.forward(1)
    timed.jobs.release(job_id, "bob")
    lose(timed, clock)
    assert not timed.jobs.get(job_id).held, "one more loss after a person released it is the first of three"


def test_lost_workers_are_counted_since_the_retry_also_when_the_clock_was_set_back(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(max_retries=0))
    assert end(timed, Reason.TRAINER_ERROR) is Status.FAILED
    timed.jobs.retry(job_id, "bob")
    clock.forward(-3600)
    for _ in range(LAB_FAILURE_LIMIT):
        assert not timed.jobs.get(job_id).held
        lose(timed, clock)
    assert timed.jobs.get(job_id).held, "three losses after the retry, though before it by the clock"


TOLD = Progress(
    stage=Stage.TRAINING,
    step=3,
    total_steps=9,
    loss=2.5,
    tokens_per_second=80.0,
    eta_seconds=60.0,
    eta_spread_seconds=9.0,
    evaluated=3,
    to_evaluate=40,
)
TOLD_COLUMNS = [name for name in vars(TOLD) if getattr(TOLD, name) not in (None, (), "")]


def test_an_attempt_during_which_the_clock_goes_back_costs_nothing_and_measures_nothing(
    timed: Store, clock: Clock
) -> None:
    job_id = timed.jobs.submit(submission())
    mine = claim(timed)
    clock.forward(-3600)
    prefix = checkpoint_prefix(job_id, 1, 3)
    assert timed.attempts.keep_checkpoint(mine, StoredCheckpoint(step=3, prefix=prefix))
    assert timed.jobs.get(job_id).checkpoint_s is None
    assert timed.attempts.beat(mine, Progress(trained_s=1.0, trained_steps=3)).accepted
    assert end(timed, Reason.OK, mine) is Status.SUCCEEDED
    assert timed.cards.fleet().charges == {"ada": 0.0}
    (run,) = timed.attempts.timed("org/model", clock.now)
    assert run.seconds is None


@pytest.mark.both
@pytest.mark.parametrize("reason", [Reason.TRAINER_ERROR, Reason.DIVERGED, Reason.CANCELLED, Reason.PRUNED])
def test_a_retried_job_shows_nothing_of_the_attempt_before(timed: Store, reason: Reason) -> None:
    job_id = timed.jobs.submit(submission(max_retries=0))
    mine = claim(timed)
    timed.attempts.beat(mine, TOLD)
    told = timed.jobs.get(job_id)
    assert {name: getattr(told, name) for name in TOLD_COLUMNS} == {name: getattr(TOLD, name) for name in TOLD_COLUMNS}
    end(timed, reason, mine)
    for row in (timed.jobs.get(job_id), timed.jobs.retry(job_id, "ada")):
        assert (row.token, row.lease_expires_at, row.vram_reserved, row.stage) == (None,) * 4, "no attempt has it"
        assert (row.eta_seconds, row.eta_spread_seconds, row.preempted_by) == (None,) * 3, "nothing is expected of it"
    assert {name: getattr(row, name) for name in TOLD_COLUMNS} == dict.fromkeys(TOLD_COLUMNS)
    assert (row.reason, row.message, row.not_before, row.ended_at) == (None,) * 4


@pytest.mark.both
def test_every_column_that_an_attempt_writes_is_cleared_when_it_begins_or_ends(timed: Store) -> None:
    job_id = timed.jobs.submit(submission(max_retries=0))
    before = columns(timed.jobs.get(job_id))
    mine = claim(timed)
    timed.attempts.beat(mine, TOLD)
    written = {name for name, value in columns(timed.jobs.get(job_id)).items() if value != before[name]}
    lasting = {"status", "attempt", "node", "gpu", "method", "started_at"}  # the next attempt writes them anew
    lasting |= {"queue_key"}  # a line of its own from now on
    assert written - lasting <= begun().keys() | ended().keys()
    assert begun().keys() - ended().keys() <= retried().keys(), "a retry clears what the end leaves to be read"


def columns(row: Job) -> dict[str, object]:
    return {column.name: getattr(row, column.name) for column in Job.__table__.columns}


def test_a_cancelled_job_can_be_retried_and_runs_to_its_end(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    store.jobs.cancel(job_id, "ada")
    end(store, Reason.CANCELLED, mine)
    row = store.jobs.retry(job_id, "ada")
    assert (row.status, row.cancel_requested, row.reason) == (Status.QUEUED, False, None)
    assert end(store, Reason.OK) is Status.SUCCEEDED


def test_a_job_that_waits_runs_or_has_succeeded_cannot_be_retried(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    for status in (Status.QUEUED, Status.RUNNING, Status.SUCCEEDED):
        with pytest.raises(WrongState, match=f"job {job_id} {status.in_words}: only a failed or cancelled"):
            store.jobs.retry(job_id, "ada")
        if status is Status.QUEUED:
            mine = claim(store)
        if status is Status.RUNNING:
            end(store, Reason.OK, mine)


@pytest.mark.both
def test_the_waiting_classes_are_those_in_which_a_job_could_be_claimed_now(store: Store) -> None:
    for lora in (4, 20):
        store.jobs.submit(submission(lora=lora, method="lora"))
    store.jobs.submit(submission(lora=None, qlora=None))
    assert store.jobs.waiting_classes(VRAM_CLASSES) == {8, 24}
    assert store.jobs.waiting_classes((8, 12)) == {8}
    for free in (4, 5):
        assert isinstance(take(store, free * GIB, f"box:{free}"), Claim)
    assert store.jobs.waiting_classes(VRAM_CLASSES) == {24}


def test_unfinished_is_what_runs_and_what_would_fit(store: Store) -> None:
    assert not store.jobs.has_unfinished(PLENTY, {})
    small, large = (store.jobs.submit(submission(lora=n, method="lora")) for n in (4, 20))
    assert [store.jobs.has_unfinished(n * GIB, {}) for n in (3, 4, 20)] == [False, True, True]
    mine = claim(store)
    assert mine.job_id == small and store.jobs.has_unfinished(3 * GIB, {}), "what runs may run anywhere"
    assert store.jobs.has_unfinished(None, {})
    end(store, Reason.TRAINER_ERROR, mine)
    assert not store.jobs.has_unfinished(None, {})
    assert store.jobs.has_unfinished(4 * GIB, {}), "a job that waits for its next attempt is not finished"
    store.jobs.cancel(small, "ada")
    assert [store.jobs.has_unfinished(n * GIB, {}) for n in (19, 20)] == [False, True]
    store.jobs.cancel(large, "ada")
    assert not store.jobs.has_unfinished(PLENTY, {})
    store.jobs.submit(submission(lora=None, qlora=None))
    assert store.jobs.has_unfinished(1, {}), "one whose need is not known may fit anywhere"


@pytest.mark.both
def test_unfinished_leaves_out_what_asks_for_labels_that_the_box_lacks(store: Store) -> None:
    for resources in ({"node_labels": {"nvlink": "yes"}}, {"node_labels": {"nvlink": "yes"}, "cards": 2}):
        store.jobs.submit(submission(lora=4, method="lora", resources=resources))
    boxes = ({}, {"nvlink": "no"}, {"nvlink": "yes", "site": "roof"})
    assert [store.jobs.has_unfinished(PLENTY, labels) for labels in boxes] == [False, False, True]
    store.jobs.submit(submission(lora=4, method="lora"))
    assert all(store.jobs.has_unfinished(PLENTY, labels) for labels in boxes)


@pytest.mark.both
def test_a_spec_that_this_version_cannot_read_fails_and_does_not_block_the_next(timed: Store, clock: Clock) -> None:
    broken, good = timed.jobs.submit(submission(priority=9)), timed.jobs.submit(submission())
    with Session(timed.engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id == broken).values(spec={"name": "tiny", "colour": "red"}))
    assert take(timed) == Left(nodes=frozenset()), "look again at once"
    row = timed.jobs.get(broken)
    assert (row.status, row.reason, row.ended_at) == (Status.FAILED, Reason.BAD_SPEC, clock.now)
    assert row.status in TRANSITIONS[Status.QUEUED]
    assert "this worker's loractl does not understand" in (row.message or "")
    assert claim(timed).job_id == good


@pytest.mark.both
@pytest.mark.parametrize("reason", [Reason.STORE_FAILED, Reason.DRAINED, Reason.WORKER_LOST])
def test_the_box_that_holds_a_finished_result_takes_the_retry_alone_for_ten_minutes(
    timed: Store, clock: Clock, reason: Reason
) -> None:
    job_id = timed.jobs.submit(submission(max_retries=1))
    mine = take(timed, node="heron:0")
    assert isinstance(mine, Claim)
    timed.attempts.beat(mine, Progress(result_host="heron"))
    if reason is Reason.WORKER_LOST:
        clock.forward(LEASE_S + 1)
        timed.attempts.reap()
    else:
        assert timed.attempts.finish(mine, reason, "why", NOTHING) is Status.QUEUED
    wait = timed.jobs.get(job_id).not_before
    clock.forward(0 if wait is None else (wait - clock.now).total_seconds())
    assert not isinstance(take(timed, node="owl:0"), Claim)
    clock.forward(RESULT_FIRST_S - 1)
    assert not isinstance(take(timed, node="owl:0"), Claim)
    again = take(timed, node="heron:0")
    assert isinstance(again, Claim) and again.result_host == "heron"
    timed.attempts.beat(again, Progress(result_host=""))
    assert timed.jobs.get(job_id).result_host is None, "nothing was there"


@pytest.mark.both
def test_after_ten_minutes_any_box_takes_it(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    mine = take(timed, node="heron:0")
    assert isinstance(mine, Claim)
    timed.attempts.finish(mine, Reason.DRAINED, "why", Progress(result_host="heron"))
    clock.forward(RESULT_FIRST_S)
    other = take(timed, node="owl:0")
    assert isinstance(other, Claim)
    assert timed.jobs.get(job_id).result_host == "heron", "it is there still, should this attempt fail"
    end(timed, Reason.OK, other)
    assert timed.jobs.get(job_id).result_host is None


@pytest.mark.both
def test_a_withdrawn_checkpoint_is_not_gone_on_from_and_one_stored_meanwhile_is(timed: Store) -> None:
    job_id = timed.jobs.submit(submission())
    mine = claim(timed)
    first, second = (StoredCheckpoint(step=n, prefix=f"jobs/{job_id}/checkpoints/1-{n}") for n in (5, 10))
    for kept, withdrawn, left in ((first, first, None), (second, first, second), (second, second, None)):
        assert timed.attempts.keep_checkpoint(mine, kept)
        timed.attempts.beat(mine, Progress(withdrawn=withdrawn.prefix))
        assert timed.jobs.get(job_id).checkpoint == (None if left is None else vars(left))
    assert timed.attempts.keep_checkpoint(mine, first)
    last = Progress(withdrawn=first.prefix)
    assert timed.attempts.finish(mine, Reason.HOST_LOST, "it is broken", last) is Status.QUEUED
    assert timed.jobs.get(job_id).checkpoint is None


@pytest.mark.both
@pytest.mark.parametrize("reason", [Reason.TRAINER_ERROR, Reason.TIMED_OUT, Reason.DIVERGED, Reason.CANCELLED])
def test_a_failed_job_keeps_what_a_retry_goes_on_from_and_says_so(timed: Store, clock: Clock, reason: Reason) -> None:
    job_id = timed.jobs.submit(submission(max_retries=0))
    mine = claim(timed)
    stored = StoredCheckpoint(step=5, prefix=f"jobs/{job_id}/checkpoints/1-5")
    assert timed.attempts.keep_checkpoint(mine, stored)
    timed.attempts.beat(mine, Progress(result_host="box"))
    keeps = reason in (Reason.TRAINER_ERROR, Reason.TIMED_OUT)
    assert end(timed, reason, mine) is (Status.CANCELLED if reason is Reason.CANCELLED else Status.FAILED)
    row, told = timed.jobs.get(job_id), timed.jobs.events(job_id)[-1].text
    assert (row.checkpoint, row.result_host) == ((vars(stored), "box") if keeps else (None, None))
    assert ("its finished result stays on box for loractl retry, until loractl gc removes it" in told) is keeps
    if not keeps:
        return
    clock.forward(7200)
    timed.jobs.retry(job_id, "ada")
    assert not isinstance(take(timed, node="owl:0"), Claim)
    again = take(timed)
    assert isinstance(again, Claim) and again.checkpoint == stored
