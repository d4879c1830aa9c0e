"""Specs and words of another version: they stop no other job, and nobody who looks.

Other values that a reader could not take are refused by the database (test_checks).
"""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason, Status, retry_delay_s
from loractl.common.store.database import make_engine
from loractl.common.store.queries.backlog import line_up
from loractl.common.store.records import Choice, Claim, Left, Page
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.status.overview import job_list, overview
from loractl.scheduler.status.overview_text import job_list_text, overview_text
from loractl.scheduler.why.answer import why
from loractl.scheduler.why.text import why_text

from ...factories import NOON, Clock, node_state, submission, take
from ...scheduler.screens import WIDE

ODD = ({}, {"new": 1}, {"name": 5}, {"resources": None}, {"training": []}, {"lora": {"r": "many"}, "after": None})
"""Specs that the database takes and this version can't read. What other rows are found by is in none of them."""


def show_all(store: Store, job_ids: list[int]) -> str:
    """What people see of everything."""
    screen = WIDE
    told = [overview_text(overview(store, Choice(), Page()), screen)]
    told.append(job_list_text(job_list(store, Choice(), Page(limit=100)), screen))
    for job_id in job_ids:
        told += [job_text(job_in_full(store, job_id), screen, full=full) for full in (False, True)]
    return "\n".join(told)


def test_a_spec_that_no_version_wrote_fails_its_own_job_when_a_claim_meets_it(upgraded_url: str) -> None:
    store = Store(make_engine(upgraded_url))
    odd = [store.jobs.submit(submission(user=f"u{number}")) for number in range(len(ODD))]
    with Session(store.engine) as session, session.begin():
        for job_id, spec in zip(odd, ODD, strict=True):
            session.get_one(Job, job_id).spec = spec
    good = store.jobs.submit(submission())
    show_all(store, odd)
    for job_id in odd:
        why_text(why(store, job_id), WIDE)
    claim: Claim | Left | None = Left(nodes=frozenset())
    while isinstance(claim, Left):
        claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == good
    for job_id in odd:
        row = store.jobs.get(job_id)
        assert (row.status, row.reason) == (Status.FAILED, Reason.BAD_SPEC)
        assert row.message is not None and row.message.startswith("this worker's loractl does not understand")
        assert store.jobs.events(job_id)[-1].text == row.message
    show_all(store, odd)


def test_no_claim_takes_a_method_that_the_job_file_does_not_permit(upgraded_url: str) -> None:
    store = Store(make_engine(upgraded_url))
    odd = store.jobs.submit(submission(method="lora"))
    with Session(store.engine) as session, session.begin():
        job = session.get_one(Job, odd)
        job.methods = ["qlora"]
        line_up(job, {}, job.submitted_at)
    assert isinstance(take(store), Left)
    row = store.jobs.get(odd)
    assert (row.status, row.reason) == (Status.FAILED, Reason.BAD_SPEC)
    assert row.message is not None and "the method qlora of its row, which its job file does not permit" in row.message


def test_a_row_of_a_newer_version_waits_for_a_newer_worker_and_says_so_once(upgraded_url: str) -> None:
    engine, clock = make_engine(upgraded_url), Clock()
    store = Store(engine, clock)
    jobs, versions = [store.jobs.submit(submission()) for _ in range(2)], ("99.0.0", "0.100.0")  # no text: 0.6 < 0.100
    with Session(engine) as session, session.begin():
        for job_id, version, new in zip(jobs, versions, ({"new": 1}, {"method": "full"}), strict=True):
            job = session.get_one(Job, job_id)
            job.spec, job.version = job.spec | new, version
    for _ in range(3):
        while isinstance(take(store), Left):
            pass
        clock.forward(61)
    for job_id, version in zip(jobs, versions, strict=True):
        row = store.jobs.get(job_id)
        assert row.status is Status.QUEUED and row.message is not None and version in row.message
        assert [event.kind for event in store.jobs.events(job_id)] == ["queued", "version"]


def test_a_row_of_a_newer_version_goes_to_the_newer_worker_though_the_rule_prefers_the_older_one_s_card(
    upgraded_url: str,
) -> None:
    engine, clock = make_engine(upgraded_url), Clock()
    store = Store(engine, clock)
    job_id = store.jobs.submit(submission(lora=8, method="lora"))
    spec = store.jobs.get(job_id).spec

    def claimed_by(node: str, said: object) -> Claim | Left | None:
        with Session(engine) as session, session.begin():
            job = session.get_one(Job, job_id)
            job.spec, job.version = said, "99.0.0"
        for one in ("a:0", "b:0"):
            store.cards.see(node_state(one))
        return store.attempts.claim(node)

    while not isinstance(claimed_by("b:0", spec), Claim):  # what this version reads is what the newer worker would
        assert (clock.now - NOON).total_seconds() < 200, "it waits for ever"
        assert not isinstance(claimed_by("a:0", {"new": 1}), Claim)
        assert any("too old to read it" in fit.then for fit in why(store, job_id).cards)
        clock.forward(5)


def test_a_user_s_jobs_that_no_version_reads_keep_no_card_from_others(upgraded_url: str) -> None:
    engine = make_engine(upgraded_url)
    store = Store(engine)
    newer = [store.jobs.submit(submission()) for _ in range(20)]
    with Session(engine) as session, session.begin():
        for job_id in newer:
            job = session.get_one(Job, job_id)
            job.spec, job.version = {"new": 1}, "99.0.0"
    own, others = store.jobs.submit(submission()), store.jobs.submit(submission(user="eve"))
    claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == others
    while isinstance(claim := take(store), Left):
        pass
    assert isinstance(claim, Claim) and claim.job_id == own


@pytest.mark.parametrize("column", ["status", "reason", "stage", "method"])
def test_a_word_of_a_newer_version_is_shown_as_it_is(upgraded_url: str, column: str) -> None:
    engine = make_engine(upgraded_url)
    store = Store(engine)
    new, good = store.jobs.submit(submission()), store.jobs.submit(submission())
    known = {"status": "failed", "reason": "worker_lost", "stage": "training", "method": "lora"}
    if column == "stage":
        known["status"] = "running"
    with engine.begin() as connection:
        for name, value in (known | {column: "sublimating"[:8]}).items():
            connection.execute(text(f"UPDATE jobs SET {name} = '{value}' WHERE job_id = {new}"))
    assert "sublimat" in show_all(store, [new])
    row = store.jobs.get(new)
    assert str(getattr(row, column)) == "sublimat"
    assert store.cards.fleet() is not None and store.jobs.has_unfinished(2**40, {})
    assert isinstance(take(store), Claim)
    assert store.jobs.get(good).status is Status.RUNNING
    if column == "status":
        assert store.results.over([new]).jobs == frozenset(), (
            "gc takes nothing of a job in a state that it does not know"
        )


def test_a_running_job_that_cannot_be_ended_in_order_keeps_no_other_from_being_ended(upgraded_url: str) -> None:
    engine, clock = make_engine(upgraded_url), Clock()
    store = Store(engine, clock)
    bad, *others = [store.jobs.submit(submission(user=user)) for user in ("eve", "ada", "bob")]
    for _ in range(3):
        assert isinstance(take(store), Claim)
    refuse = {
        "postgresql": """ALTER TABLE uses ADD CHECK ("user" <> 'eve')""",
        "sqlite": "CREATE TRIGGER no BEFORE INSERT ON uses WHEN NEW.user = 'eve' BEGIN SELECT RAISE(ABORT, ''); END",
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(refuse[engine.dialect.name])
        connection.execute(text(f"UPDATE jobs SET retries_used = 2000000000 WHERE job_id = {others[0]}"))
    clock.forward(3600)
    store.attempts.reap()
    row = store.jobs.get(bad)
    assert (row.status, row.reason, row.token, row.vram_reserved) == (Status.FAILED, Reason.BAD_SPEC, None, None)
    assert row.message == "box:0 was silent for 60 s; its attempt could not be ended in order"
    assert store.attempts.of_job(bad)[0].reason is Reason.WORKER_LOST
    assert [store.jobs.get(job_id).status for job_id in others] == [Status.QUEUED] * 2


def test_the_pause_before_a_retry_is_known_for_any_number_of_retries() -> None:
    assert [retry_delay_s(n) for n in (1, 2, 7, 2_000_000_000)] == [10, 20, 600, 600]
