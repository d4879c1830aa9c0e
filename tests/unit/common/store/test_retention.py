"""Which files the rows still need: results, attempts, data sets and logs."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text, update
from sqlalchemy.orm import Session

from loractl.common.errors import WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.job.sweep import NewSweep
from loractl.common.store.queries import retention
from loractl.common.store.records import Claim, Progress, StoredResult
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from ...factories import NOON, RESULT, Clock, node_state, spec, submission, take

DAY = dt.timedelta(days=1)


def claim(store: Store) -> Claim:
    taken = take(store)
    assert isinstance(taken, Claim)
    return taken


def ended(store: Store, reason: Reason = Reason.OK, result: StoredResult | None = RESULT, **keys: Any) -> int:
    """A job that has run and ended."""
    job_id = store.jobs.submit(submission(**keys))
    store.attempts.finish(claim(store), reason, "done", Progress(), result if reason is Reason.OK else None)
    return job_id


def name_data(store: Store, job_id: int, *names: str) -> None:
    data = {
        key: {"uri": f"s3://lab/datasets/{name}", "sha256": "0" * 64} for key, name in zip("ab", names, strict=False)
    }
    with Session(store.engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id == job_id).values(data=data))


def test_results_beyond_the_newest_of_each_user_and_name_are_found(timed: Store, clock: Clock) -> None:
    mine = []
    for _ in range(4):
        clock.forward(60)
        mine.append(ended(timed, name="a"))
    theirs = ended(timed, name="a", user="bob")
    other = ended(timed, name="b")
    ended(timed, Reason.DIVERGED, name="a")
    assert [job.job_id for job in timed.results.beyond_newest(1)] == mine[:3]
    assert [job.job_id for job in timed.results.beyond_newest(3)] == mine[:1]
    assert timed.results.beyond_newest(4) == []
    assert {theirs, other} == {a.job_id for a in timed.adapters.all()} - set(mine)


@pytest.mark.both
def test_an_adapter_stays_while_an_open_job_is_to_begin_from_it(timed: Store, clock: Clock) -> None:
    first, second = ended(timed, name="a"), ended(timed, name="a")
    clock.forward(60)
    ended(timed, name="a")
    begun = timed.jobs.submit(replace(submission(), spec=spec(name="b", lora={"init_from": str(first)})))
    assert timed.adapters.ancestors([first, second, begun]) == {begun: first}
    assert timed.adapters.descendants(first) == [begun] and timed.adapters.descendants(second) == []
    assert [job.job_id for job in timed.results.beyond_newest(1)] == [second]
    assert not timed.results.remove(first, "bob") and timed.results.remove(second, "bob")
    timed.jobs.cancel(begun, "ada")
    assert timed.adapters.descendants(first) == [] and [job.job_id for job in timed.results.beyond_newest(1)] == [first]
    assert timed.results.remove(first, "bob")


def test_a_removed_result_leaves_the_job_succeeded_with_its_history(store: Store) -> None:
    job_id = ended(store)
    assert store.results.remove(job_id, "bob")
    row = store.jobs.get(job_id)
    assert (row.status, row.reason, row.adapter_uri, row.report_uri) == (Status.SUCCEEDED, Reason.OK, None, None)
    assert store.adapters.all() == []
    assert (store.jobs.events(job_id)[-1].kind, store.jobs.events(job_id)[-1].text) == (
        "removed",
        "adapter and report removed by bob (loractl gc)",
    )
    assert not store.results.remove(job_id, "bob"), "twice is once"
    assert len([e for e in store.jobs.events(job_id) if e.kind == "removed"]) == 1
    with pytest.raises(WrongState):
        store.jobs.retry(job_id, "bob")


@pytest.mark.parametrize("reason", [None, Reason.DIVERGED])
def test_only_a_result_can_be_removed(store: Store, reason: Reason | None) -> None:
    job_id = store.jobs.submit(submission())
    if reason is not None:
        store.attempts.finish(claim(store), reason, "it failed", Progress())
    before = len(store.jobs.events(job_id))
    assert not store.results.remove(job_id, "bob")
    assert not store.results.remove(job_id + 1, "bob")
    assert len(store.jobs.events(job_id)) == before


@pytest.mark.both
def test_an_attempt_is_over_once_it_ended_without_being_the_result(timed: Store, clock: Clock) -> None:
    retried = timed.jobs.submit(submission())
    for reason in (Reason.DRAINED, Reason.TRAINER_ERROR):
        timed.attempts.finish(claim(timed), reason, "again", Progress())
    clock.forward(60)
    again = claim(timed)  # its third attempt runs
    waiting = timed.jobs.submit(submission(lora=200, qlora=200))
    succeeded, removed, failed = ended(timed), ended(timed), ended(timed, Reason.DIVERGED)
    timed.results.remove(removed, "ada")

    asked = [retried, waiting, succeeded, removed, failed, 99]
    over = timed.results.over(asked)
    assert over.known == {retried, waiting, succeeded, removed, failed}, "of job 99 this database knows nothing"
    assert over.jobs == {succeeded, removed, failed}
    assert over.attempts == {(retried, 1), (retried, 2), (removed, 1), (failed, 1)}
    timed.attempts.finish(again, Reason.OK, "done", Progress(), RESULT)
    assert (retried, 3) not in timed.results.over(asked).attempts, "the result"
    timed.jobs.retry(failed, "ada")
    assert failed not in timed.results.over(asked).jobs
    assert (failed, 1) in timed.results.over(asked).attempts, "an attempt that is over stays over"
    assert timed.results.over([]).known == frozenset()


def test_more_jobs_than_one_statement_takes_can_be_asked_for(store: Store) -> None:
    job_id = ended(store, Reason.DIVERGED)
    assert store.results.over(range(1, 40_000)).attempts == {(job_id, 1)}


@pytest.mark.both
def test_a_data_set_is_needed_while_a_job_may_read_it(timed: Store, clock: Clock) -> None:
    jobs = {
        "waiting": timed.jobs.submit(submission(lora=200, qlora=200)),
        "result": ended(timed),
        "removed": ended(timed),
        "failed": ended(timed, Reason.DIVERGED),
    }
    jobs["running"] = timed.jobs.submit(submission())
    claim(timed)
    timed.results.remove(jobs["removed"], "ada")
    for name, job_id in jobs.items():
        name_data(timed, job_id, f"{name}.jsonl", "shared.csv")
    clock.forward(86400)
    shared = {"shared.csv"}
    assert timed.results.needed_data(NOON - DAY) == {f"{name}.jsonl" for name in jobs} | shared, "it may be retried"
    assert timed.results.needed_data(NOON + DAY) == {"waiting.jsonl", "running.jsonl", "result.jsonl"} | shared
    without = {jobs["result"], jobs["waiting"]}
    assert timed.results.needed_data(NOON + DAY, {jobs["result"]}) == {"waiting.jsonl", "running.jsonl"} | shared
    assert "result.jsonl" in timed.results.needed_data(NOON - DAY, without)


@pytest.mark.both
def test_what_is_the_same_of_many_jobs_is_read_once(timed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    names_in = retention._names_in

    def note(data: str) -> list[str]:
        read.append(data)
        return names_in(data)

    monkeypatch.setattr(retention, "_names_in", note)
    for job_id in timed.jobs.submit_all([submission() for _ in range(20)]):
        name_data(timed, job_id, "shared.jsonl")
    assert (timed.results.needed_data(NOON), len(read)) == ({"shared.jsonl"}, 1)


@pytest.mark.both
def test_the_log_of_a_result_is_spent_and_other_logs_are_kept(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    timed.attempts.finish(claim(timed), Reason.TRAINER_ERROR, "it failed", Progress(log="first\n"))
    clock.forward(60)
    last = claim(timed)
    timed.attempts.beat(last, Progress(log="second\n"))
    assert timed.results.spent_logs() == []
    timed.attempts.finish(last, Reason.OK, "done", Progress(log="end\n"), RESULT)
    failed = ended(timed, Reason.DIVERGED)

    assert timed.results.spent_logs() == [(job_id, 2, len("second\nend\n"))]
    timed.results.forget_log(job_id, 2)
    assert timed.results.spent_logs() == []
    assert [chunk.text for chunk in timed.jobs.log(job_id)] == ["first\n"], (
        "why the first attempt failed is stored nowhere else"
    )
    assert timed.jobs.log(failed) == []


@pytest.mark.both
def test_values_of_single_steps_go_and_those_that_sweeps_are_judged_by_stay(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    points = ((1, "loss", 3.0), (1, "grad_norm", 1.0), (4, "rung_0.25", 2.0), (9, "held_out_loss", 1.5))
    taken = claim(timed)
    timed.attempts.beat(taken, Progress(metrics=points))
    timed.attempts.finish(taken, Reason.OK, "done", Progress(), RESULT)
    assert timed.results.courses(clock.now) == [], "it ended this moment"
    clock.forward(1)
    (course,) = timed.results.courses(clock.now)
    assert (course.job_id, course.points_size) == (job_id, 400)
    timed.results.forget_courses([job_id])
    left = [name for _, name, _ in points if timed.jobs.metrics(job_id, name)]
    assert left == ["rung_0.25", "held_out_loss"] and timed.results.courses(clock.now) == []


def test_no_member_goes_while_its_sweep_goes_on_and_an_empty_sweep_goes(timed: Store, clock: Clock) -> None:
    sweep = NewSweep(name="grid", varied={"lora.r": "8,16"}, rungs=(0.25,))
    sweep_id = timed.sweeps.submit(sweep, [submission(), submission()])
    first = claim(timed)
    timed.attempts.finish(first, Reason.DIVERGED, "no", Progress())
    clock.forward(86400)
    second = claim(timed)
    assert timed.results.past_jobs(clock.now) == [], "the one that runs is compared with it"
    assert timed.results.forget_jobs([first.job_id], clock.now) == set()
    timed.attempts.finish(second, Reason.DIVERGED, "no", Progress())
    clock.forward(1)
    assert [job.job_id for job in timed.results.past_jobs(clock.now)] == [first.job_id, second.job_id]
    assert timed.results.forget_jobs([first.job_id], clock.now) == {first.job_id}
    assert [member.job_id for member in timed.sweeps.get(sweep_id).members] == [second.job_id]
    assert timed.results.forget_jobs([second.job_id], clock.now) == {second.job_id}
    assert timed.sweeps.several([sweep_id]) == []


@pytest.mark.both
def test_a_job_that_was_queued_again_or_has_a_result_is_not_forgotten(timed: Store, clock: Clock) -> None:
    again, kept = ended(timed, Reason.DIVERGED), ended(timed)
    clock.forward(1)
    assert [job.job_id for job in timed.results.past_jobs(clock.now)] == [again]
    assert [job.job_id for job in timed.results.past_jobs(clock.now, without=[kept])] == [again, kept]
    timed.jobs.retry(again, "ada")
    assert timed.results.forget_jobs([again, kept, 99], clock.now) == set()


def test_locks_that_nobody_holds_go_with_old_jobs(postgres_engine: Engine) -> None:
    store = Store(postgres_engine)
    store.cards.see(node_state("box:0", user_limit=1))
    store.jobs.submit(submission())
    assert isinstance(store.attempts.claim("box:0"), Claim)

    def locks() -> set[str]:
        with postgres_engine.connect() as connection:
            return set(connection.scalars(text("SELECT name FROM locks")))

    with postgres_engine.begin() as connection:
        connection.execute(text("INSERT INTO locks VALUES ('end of sweep 3')"))
    assert locks() == {"fleet", "closing", "user ada", "card GPU-box:0", "end of sweep 3"}
    with postgres_engine.begin() as connection:
        connection.execute(text("SELECT FROM locks WHERE name = 'end of sweep 3' FOR UPDATE"))
        store.results.forget_jobs([], NOON)
    assert locks() == {"fleet", "closing", "end of sweep 3"}
