"""Jobs after jobs: who is blocked, what lets it go, and what keeps it."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, update
from sqlalchemy.orm import Session

from loractl.common.errors import UsageError, WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.job.sweep import NewSweep
from loractl.common.store.queries import followers
from loractl.common.store.records import HELD_OUT_LOSS, Claim, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.store.tables import Job, OutboxMessage
from loractl.common.units import GIB
from loractl.scheduler.change.amendment import amendment
from loractl.scheduler.submit.ancestor import settle_predecessors

from ...factories import RESULT, Clock, node_state, spec, submission, take


def queue(store: Store, *after: int, **keys: object) -> int:
    return store.jobs.submit(submission(lora=1, qlora=1, **{"after": list(after), **keys}))


def start(store: Store, job_id: int) -> Claim:
    claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == job_id, claim
    return claim


def end(store: Store, job_id: int, reason: Reason = Reason.OK) -> None:
    store.attempts.finish(start(store, job_id), reason, "", Progress(), RESULT if reason is Reason.OK else None)


def standing(store: Store, job_id: int) -> tuple[int | None, bool]:
    row = store.jobs.get(job_id)
    return row.awaits, row.held


def round_of_the_fleet(store: Store) -> None:
    store.cards.see(node_state("other:0", total=GIB // 2))
    assert store.cards.take_turn(0.0, 0.0) is not None


FREE = (None, False)


def test_a_job_starts_after_those_that_it_names_and_in_no_order_of_its_own(store: Store) -> None:
    first, second = queue(store), queue(store)
    last = queue(store, second, first)
    assert standing(store, last) == (second, False)
    end(store, first)
    assert standing(store, last) == (second, False)
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
    assert standing(store, last) == (first, False) and take(store) is None
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
    assert standing(store, last) == (first, False)


@pytest.mark.both
def test_the_round_lets_go_what_ended_otherwise(store: Store) -> None:
    """By a person, by an earlier version, or while the follower was being submitted."""
    kept, any_end = queue(store), queue(store)
    after_kept, after_any = queue(store, kept), queue(store, any_end, after_any=True)
    store.jobs.cancel(kept, "ada")
    assert store.jobs.cancel(any_end, "ada") and store.jobs.get(after_any).is_blocked
    assert store.jobs.has_unfinished(GIB, {}), "a worker that is to end with the last job waits for the round"
    store.jobs.hold(after_any, "ada")
    assert not store.jobs.has_unfinished(GIB, {})
    store.jobs.release(after_any, "ada")
    round_of_the_fleet(store)
    assert standing(store, after_kept) == (kept, False)
    assert standing(store, after_any) == FREE


def test_a_person_s_hold_outlives_the_wait_and_the_wait_outlives_a_release(store: Store) -> None:
    first = queue(store)
    last, released = queue(store, first), queue(store, first)
    for job_id in (last, released):
        store.jobs.hold(job_id, "mara", "disk")
    assert standing(store, last) == (first, True)
    store.jobs.release(released, "mara")
    assert standing(store, released) == (first, False)
    end(store, first)
    assert standing(store, last) == (None, True)
    assert standing(store, released) == FREE


def test_nobody_releases_what_only_waits(store: Store) -> None:
    first = queue(store)
    last = queue(store, first)
    with pytest.raises(WrongState, match=f"job {last} waits for job {first}, nobody holds it"):
        store.jobs.release(last, "ada")


def test_a_cancelled_one_waits_again_when_it_is_retried(store: Store) -> None:
    first = queue(store)
    last = queue(store, first)
    assert store.jobs.cancel(last, "ada").status is Status.CANCELLED
    store.jobs.retry(last, "ada")
    assert standing(store, last) == (first, False)
    store.jobs.cancel(last, "ada")
    end(store, first)
    store.jobs.retry(last, "ada")
    round_of_the_fleet(store)
    assert standing(store, last) == FREE


@pytest.mark.both
def test_one_that_is_retried_after_gc_has_removed_what_it_awaits_is_held_with_the_reason(
    timed: Store, clock: Clock
) -> None:
    first, second = queue(timed), queue(timed)
    last = queue(timed, first, second)
    for job_id in (last, first):
        timed.jobs.cancel(job_id, "ada")
    clock.forward(1)
    assert timed.results.forget_jobs([first], clock.now) == {first}
    timed.jobs.retry(last, "ada")
    round_of_the_fleet(timed)
    assert standing(timed, last) == (second, False)
    end(timed, second)
    assert standing(timed, last) == (None, True)
    assert timed.jobs.get(last).message == f"held: job {first}, which it was to start after, is not there any more"
    timed.jobs.release(last, "ada")
    assert standing(timed, last) == FREE


@pytest.mark.both
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


@pytest.mark.both
def test_of_a_blocked_job_only_its_list_is_read(store: Store) -> None:
    """Of 15,000 jobs, all that their files say took 270 MiB."""
    first = queue(store)
    behind = store.jobs.submit_all([submission(after=[first]) for _ in range(50)])
    with Session(store.engine) as session, session.begin():
        spec = session.get_one(Job, behind[0]).spec
        session.execute(update(Job).where(Job.job_id.in_(behind)).values(spec={**spec, "more": "a" * 50_000}))
    tracemalloc.start()
    found = store.jobs.followers(first)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == behind and most < 1_000_000


def test_a_job_with_many_followers_holds_up_no_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "AT_ONCE", 4)
    first, second = queue(store), queue(store)
    many = store.jobs.submit_all([submission(lora=1, qlora=1, after=[first]) for _ in range(12)])
    last = queue(store, second)
    for job_id in (first, second):  # by an earlier version, which let nobody go
        with Session(store.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == job_id).values(status=Status.SUCCEEDED))
    round_of_the_fleet(store)
    assert standing(store, last) == FREE
    assert [standing(store, job_id) for job_id in many[:4]] == [FREE] * 3 + [(first, False)]
    for _ in range(3):
        round_of_the_fleet(store)
    assert {standing(store, job_id) for job_id in many} == {FREE}


def test_jobs_of_one_submit_name_each_other_and_all_of_them_are_written_or_none(store: Store) -> None:
    answers = submission(lora=1, qlora=1, name="answers")
    begun = spec(name="pairs", after=["answers"], lora={"init_from": {"job": "answers"}})
    pairs = replace(submission(lora=1, qlora=1), spec=begun)
    first, second = store.jobs.submit_all([answers, pairs])
    stored = store.jobs.get(second).spec
    assert (stored["after"], stored["lora"]["init_from"]) == ([first], str(first))
    assert standing(store, second) == (first, False)


@pytest.mark.both
def test_an_edit_of_what_a_job_waits_for_outlives_the_end_that_would_have_let_it_go(postgres_engine: Engine) -> None:
    """It commits after the statement has seen which jobs wait, and before that locks their rows."""
    store = Store(postgres_engine)
    first, other = queue(store), queue(store)
    last = queue(store, first)
    claim = start(store, first)
    edit, threads = amendment(store, last, [f"after=[{other}]"]), list[threading.Thread]()

    def delayed(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        if "OF jobs SKIP LOCKED" not in statement or threads:
            return statement, parameters
        threads.append(threading.Thread(target=store.jobs.edit, args=(edit, "ada")))
        threads[0].start()
        return statement.replace("FROM jobs JOIN", "FROM (SELECT pg_sleep(0.5)) AS nap, jobs JOIN", 1), parameters

    event.listen(postgres_engine, "before_cursor_execute", delayed, retval=True)
    try:
        store.attempts.finish(claim, Reason.OK, "", Progress(), RESULT)
    finally:
        event.remove(postgres_engine, "before_cursor_execute", delayed)
        threads[0].join()
    assert standing(store, last) == (other, False)
    assert store.jobs.events(last)[-1].kind == "edited"


def sweep(store: Store, count: int, varied: str = "lora.r", **keys: object) -> tuple[int, list[int]]:
    members = [submission(lora=1, qlora=1, name=f"r{number}", max_retries=0, **keys) for number in range(count)]
    new = NewSweep(name="tuned", varied={varied: "8,16"}, rungs=None, trials=None, seed=None)
    sweep_id = store.sweeps.submit(new, members)
    return sweep_id, [member.job_id for member in store.sweeps.get(sweep_id).members]


def train(store: Store, job_id: int, loss: float | None) -> None:
    """None: it fails."""
    claim = start(store, job_id)
    if loss is None:
        store.attempts.finish(claim, Reason.BAD_DATA, "", Progress())
        return
    store.attempts.finish(claim, Reason.OK, "", Progress(metrics=((1, HELD_OUT_LOSS, loss),)), RESULT)


def begin_from_best(store: Store, sweep_id: int, **keys: object) -> int:
    settled = settle_predecessors(spec(name="last", lora={"init_from": {"sweep": sweep_id}}, **keys), store)
    return store.jobs.submit(replace(submission(lora=1, qlora=1), spec=settled))


@pytest.mark.parametrize("losses", [(0.9, 0.5, None), (None, 0.5, 0.9), (0.9, 0.5)])
def test_the_best_member_of_a_sweep_is_begun_from_once_all_have_ended(
    store: Store, losses: tuple[float | None, ...]
) -> None:
    sweep_id, members = sweep(store, len(losses))
    last = begin_from_best(store, sweep_id)
    for job_id, loss in zip(members, losses, strict=True):
        assert store.jobs.get(last).is_blocked
        train(store, job_id, loss)
    assert standing(store, last) == FREE and store.jobs.get(last).ancestor == members[1]
    assert not store.results.remove(members[1], "ada"), "an open job begins from it"
    claim = start(store, last)
    assert claim.spec.lora.init_from == str(members[1])
    assert store.adapters.ancestors([last]) == {last: members[1]}


def test_a_sweep_that_has_ended_before_is_asked_by_the_round(store: Store) -> None:
    sweep_id, members = sweep(store, 2)
    for job_id, loss in zip(members, (0.9, 0.5), strict=True):
        train(store, job_id, loss)
    last = begin_from_best(store, sweep_id)
    assert store.jobs.has_unfinished(GIB, {})
    round_of_the_fleet(store)
    assert standing(store, last) == FREE and store.jobs.get(last).ancestor == members[1]


@pytest.mark.both
def test_where_no_member_has_a_result_the_job_is_held_with_the_reason(store: Store) -> None:
    sweep_id, members = sweep(store, 1)
    last = begin_from_best(store, sweep_id, notify=["ops"])
    train(store, members[0], None)
    why = f"no member of sweep {sweep_id} has a held-out loss and a stored adapter; loractl cancel drops the job"
    assert standing(store, last) == (None, True) and store.jobs.get(last).message == f"held: {why}"
    round_of_the_fleet(store)  # no person did it, so that it tells of no change
    with store.engine.connect() as connection:
        posted = connection.execute(select(OutboxMessage.kind, OutboxMessage.job_id, OutboxMessage.subject)).all()
    assert posted == [("job.held", last, f"last: held, {why}")]
    store.jobs.release(last, "ada")
    take(store)
    assert standing(store, last) == (None, True) and store.jobs.get(last).message == f"held: {why}"


@pytest.mark.both
@pytest.mark.parametrize(
    ("varied", "keys", "unlike"),
    [
        ("preference.loss_type", {"task_type": "preference"}, True), ("training.label_smoothing_factor", {}, False),
        ("lora.init_from", {"task_type": "preference"}, True), ("lora.init_from", {}, False),
    ],
)  # fmt: skip
def test_no_member_is_the_best_of_a_sweep_whose_losses_cannot_be_compared(
    store: Store, varied: str, keys: dict[str, object], unlike: bool
) -> None:
    """A submit is refused; a job that an earlier version has queued is held."""
    sweep_id, members = sweep(store, 2, varied, notify=["ops"], **keys)
    why = f"sweep {sweep_id} has no best member: losses of different {varied} can't be compared"
    if unlike:
        with pytest.raises(UsageError, match=f"last: lora.init_from: {why}"):
            begin_from_best(store, sweep_id, **keys)
    after = {"after": members, "after_any": True}
    queued = spec(name="last", lora={"init_from": {"sweep": sweep_id}}, **after, **keys)
    last = store.jobs.submit(replace(submission(lora=1, qlora=1), spec=queued))
    for job_id, loss in zip(members, (0.02, 0.41), strict=True):
        train(store, job_id, loss)
    with store.engine.connect() as connection:
        (over,) = connection.execute(select(OutboxMessage.subject).where(OutboxMessage.kind == "sweep.over")).scalars()
    if not unlike:
        assert store.jobs.get(last).ancestor == members[0] and "best loss 0.0200" in over
        return
    told = f"held: {why}; loractl cancel drops the job, and loractl edit names a member"
    assert store.jobs.get(last).message == told and store.jobs.get(last).ancestor is None
    assert "best loss" not in over and store.sweeps.get(sweep_id).best is None


def test_a_release_chooses_among_the_members_that_have_a_result_by_then(store: Store) -> None:
    sweep_id, members = sweep(store, 1)
    last = begin_from_best(store, sweep_id)
    train(store, members[0], None)
    store.jobs.retry(members[0], "ada")
    train(store, members[0], 0.5)
    store.jobs.release(last, "ada")
    assert start(store, last).spec.lora.init_from == str(members[0])
    assert store.jobs.get(last).ancestor == members[0]


def test_a_member_whose_adapter_was_removed_is_not_chosen(store: Store) -> None:
    sweep_id, members = sweep(store, 3)
    for job_id, loss in zip(members, (0.9, 0.5, 0.3), strict=True):
        train(store, job_id, loss)
    assert store.results.remove(members[2], "ada")
    last = begin_from_best(store, sweep_id)
    round_of_the_fleet(store)
    assert store.jobs.get(last).ancestor == members[1]


def test_an_adapter_named_after_the_choice_takes_its_place(store: Store) -> None:
    other = queue(store)
    end(store, other)
    sweep_id, members = sweep(store, 2)
    for job_id, loss in zip(members, (0.9, 0.5), strict=True):
        train(store, job_id, loss)
    last = begin_from_best(store, sweep_id)
    round_of_the_fleet(store)
    assert store.adapters.descendants(members[1]) == [last]
    store.jobs.edit(amendment(store, last, [f"lora.init_from={other}"]), "ada")
    assert standing(store, last) == FREE
    assert store.adapters.ancestors([last]) == {last: other}
    assert store.adapters.descendants(other) == [last] and store.adapters.descendants(members[1]) == []
    assert not store.results.remove(other, "bob"), "an open job begins from it"
    assert start(store, last).spec.lora.init_from == str(other)


def test_an_edit_blocks_no_released_job_again(store: Store) -> None:
    first = queue(store, max_retries=0)
    last = queue(store, first, after_any=True)
    end(store, first, Reason.BAD_DATA)
    store.jobs.retry(first, "ada")
    store.jobs.edit(amendment(store, last, ["priority=5"]), "ada")
    assert standing(store, last) == FREE
    store.jobs.edit(amendment(store, last, ["after_any=false"]), "ada")
    assert standing(store, last) == (first, False)


@pytest.mark.both
def test_a_retry_with_a_change_continues_from_the_checkpoint_of_the_adapter_that_it_began_from(store: Store) -> None:
    sweep_id, (first, second) = sweep(store, 2)
    train(store, first, 0.5)
    train(store, second, None)
    last = begin_from_best(store, sweep_id)
    round_of_the_fleet(store)
    claim = start(store, last)
    checkpoint = StoredCheckpoint(step=400, prefix=f"jobs/{last}/checkpoints/x", manifest_sha256="c" * 64)
    store.attempts.keep_checkpoint(claim, checkpoint)
    store.attempts.finish(claim, Reason.TIMED_OUT, "60 min", Progress(step=400))
    store.jobs.retry(second, "ada")
    better = start(store, second)
    store.jobs.retry(last, "ada", amendment(store, last, ["resources.time_limit=2h"]))
    assert standing(store, last) == FREE
    store.attempts.finish(better, Reason.OK, "", Progress(metrics=((1, HELD_OUT_LOSS, 0.4),)), RESULT)
    again = start(store, last)
    assert (again.spec.lora.init_from, again.checkpoint) == (str(first), checkpoint)


def test_a_result_stays_while_a_job_waits_for_others_of_its_list(store: Store) -> None:
    first, second = queue(store), queue(store)
    queue(store, second, first)
    end(store, first)
    assert not store.results.remove(first, "ada")
    end(store, second)
    assert store.results.remove(first, "ada")
