"""Rows that nobody's submit wrote, or that a newer version wrote: they stop no other job, and nobody who looks.

The database refuses nearly all of these values (test_checks): here it has no bounds.
"""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from loractl.common.errors import SweepNotFound
from loractl.common.job.status import Reason, Status, retry_delay_s
from loractl.common.store.checks import release
from loractl.common.store.database import make_engine
from loractl.common.store.records import Choice, Claim, Left, Page, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.scheduler.status.job import job_history, job_in_full
from loractl.scheduler.status.job_text import history_text, job_text
from loractl.scheduler.status.overview import job_list, overview
from loractl.scheduler.status.overview_text import job_list_text, overview_text

from ....databases import SQLITE_ALONE
from ...factories import NOON, Clock, submission, take
from ...scheduler.screens import WIDE

POISON = {
    "methods": ["'[\"x\"]'", "'null'", "'5'", "'{}'", "'[[\"lora\"]]'"],
    "queue_key": ["'garbage'", "''", "'10000|abc||ada'", "'10000|001|{\"a|ada'", "'10000|001|{5}|ada'"],
    "submitted_at": ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'0001-01-01 00:00:00'"],
    "spec": ["'null'", "'[]'", "'{}'", "'7'"],
    "data": ["'null'", "'[1]'"],
    "planned": ["'null'", "'3'", "'{\"lora\": 1e999}'", "'{\"lora\": -5368709120}'", "'{\"lora\": \"4\"}'"],
    "adjustment": ["'{\"x\": 1}'", "'4'", "'{\"micro_batch\": 0}'"],
    "checkpoint": ["'{\"x\": 1}'", "'[]'", "'{\"step\": 1e999, \"prefix\": \"x\"}'"],
    "labels": ["'null'", "'[]'", "'{\"team\": 5}'"],
    "gangs": ["'{\"alone\": true, \"ways\": [{\"cards\": 2, \"parallel\": \"data\", \"lora\": -1, \"qlora\": null}]}'"],
    "avoids": ["'[]'", f"'{'[' * 5000}{']' * 5000}'", f"'{'9' * 5000}'"],
    "lora_until": ["'infinity'"], "vram_needed": ["-5"], "vram_lora": ["-5368709120", "9223372036854775807"],
    "attempt": ["2147483647", "-1"], "cancel_requested": ["true"],
}  # fmt: skip
"""Values in SQL, by column."""

LOOSE = {
    **{name: ["'{'"] for name in
       ("spec", "labels", "data", "planned", "methods", "gangs", "adjustment", "checkpoint", "avoids")},
    "spec": ["'{'", "7", "x'7b'"], "vram_lora": ["'many'"], "attempt": ["'many'", "x'31'"], "eta_seconds": ["'soon'"],
    "held": ["'many'"], "user": ["x'616461'"], "submitted_at": ["'noon'"], "priority": ["1099511627776", "0.5"],
    "sweep_id": ["1e308", "-1e308"],
}  # fmt: skip
"""What SQLite stores as well, whatever a column's type."""

HARMLESS = {
    "priority": ["2147483647", "-2147483648"], "version": ["'99999999999999999999'"],
}  # fmt: skip
"""Values that nobody need mind."""


def poisoned(upgraded_url: str, values: dict[str, list[str]]) -> tuple[Store, dict[int, str]]:
    """A store with a waiting job for each value, by number."""
    engine = make_engine(upgraded_url)
    with engine.begin() as connection:
        release(connection)
    store, rows = Store(engine), {}
    for column, texts in values.items():
        for value in texts:
            job_id = store.jobs.submit(submission(lora=1, qlora=1))
            with engine.begin() as connection:
                statement = f"UPDATE jobs SET {column} = {value} WHERE job_id = {job_id}"
                connection.execute(text(statement.replace(":", "\\:")))
            rows[job_id] = f"{column} = {value}"
    return store, rows


def show_all(store: Store, job_ids: list[int]) -> str:
    """What people see of everything."""
    screen = WIDE
    told = [overview_text(overview(store, Choice(), Page()), screen)]
    told.append(job_list_text(job_list(store, Choice(), Page(limit=100)), screen))
    for job_id in job_ids:
        told += [job_text(job_in_full(store, job_id), screen), history_text(job_history(store, job_id), screen)]
    return "\n".join(told)


def test_no_row_stops_the_claims_and_what_cannot_be_read_is_set_aside_with_an_event(upgraded_url: str) -> None:
    is_set_aside(upgraded_url, POISON)


@SQLITE_ALONE
@pytest.mark.parametrize("value", ["'high'", "x'31'", "0.5", "-9223372036854775808"])
def test_status_lists_every_waiting_job_once_whatever_a_priority_holds(upgraded_url: str, value: str) -> None:
    store, _ = poisoned(upgraded_url, {"priority": [value]})
    store.jobs.submit(submission(lora=1, qlora=1))
    assert sorted(job.job_id for job in overview(store, Choice(), Page()).waiting) == [1, 2]


@SQLITE_ALONE
def test_nor_does_one_that_only_sqlite_stores(upgraded_url: str) -> None:
    is_set_aside(upgraded_url, LOOSE)


def is_set_aside(upgraded_url: str, values: dict[str, list[str]]) -> None:
    """Each of the values, while a healthy job starts."""
    store, rows = poisoned(upgraded_url, values)
    good = store.jobs.submit(submission())
    show_all(store, list(rows)[::5])
    store.cards.fleet()
    store.jobs.set_aside_unreadable()
    claim: Claim | Left | None = Left(nodes=frozenset())
    while isinstance(claim, Left):
        claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == good
    for job_id, what in rows.items():
        row = store.jobs.get(job_id)
        assert (row.status, row.reason) == (Status.FAILED, Reason.BAD_SPEC), f"{what}: {row.status} {row.message}"
        assert row.message is not None and row.message.startswith("this worker's loractl does not understand"), what
        assert store.jobs.events(job_id)[-1].text == row.message
        if row.sweep_id is not None:
            with pytest.raises(SweepNotFound):
                store.sweeps.head(row.sweep_id)
    show_all(store, list(rows)[::5])
    store.results.needed_data(NOON)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE nodes SET user_limit = 0 WHERE node = 'odd:0'", "UPDATE nodes SET user_limit = -5 WHERE node = 'odd:0'",
        "UPDATE nodes SET max_jobs = -1 WHERE node = 'odd:0'",
    ],
)  # fmt: skip
def test_a_card_that_can_t_be_read_keeps_no_job_from_other_cards(upgraded_url: str, statement: str) -> None:
    engine = make_engine(upgraded_url)
    store = Store(engine)
    store.jobs.submit(submission())
    first = take(store, node="odd:0", user_limit=1)
    assert isinstance(first, Claim)
    store.attempts.finish(first, Reason.CANCELLED, "enough", Progress())
    good = store.jobs.submit(submission())
    with engine.begin() as connection:
        release(connection)
        connection.execute(text(statement))
    show_all(store, [1, good])
    claim = take(store)
    while isinstance(claim, Left):
        claim = store.attempts.claim("box:0", distrusted=frozenset({"odd:0"}))
    assert isinstance(claim, Claim) and claim.job_id == good
    engine.dispose()


def test_what_a_row_says_besides_stops_nobody(upgraded_url: str) -> None:
    store, rows = poisoned(upgraded_url, HARMLESS)
    show_all(store, list(rows))
    for _ in rows:
        take(store)
    assert store.jobs.set_aside_unreadable().jobs == ()
    show_all(store, list(rows))


def test_a_row_of_a_newer_version_waits_for_a_newer_worker_and_says_so_once(upgraded_url: str) -> None:
    engine, clock = make_engine(upgraded_url), Clock()
    store = Store(engine, clock)
    jobs = [store.jobs.submit(submission()) for _ in range(2)]
    with Session(engine) as session, session.begin():
        session.get_one(Job, jobs[0]).methods = ["full"]
        session.get_one(Job, jobs[1]).spec = {"new": 1}
        for job_id in jobs:
            session.get_one(Job, job_id).version = "99.0.0"
    for _ in range(3):
        store.jobs.set_aside_unreadable()
        while isinstance(take(store), Left):
            pass
        clock.forward(61)
    for job_id in jobs:
        row = store.jobs.get(job_id)
        assert row.status is Status.QUEUED and row.message is not None and "99.0.0" in row.message
        assert [event.kind for event in store.jobs.events(job_id)] == ["queued", "version"]


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
    assert row.message == "box:0 was silent for 60 s; its row can't be read by this version"
    assert store.attempts.of_job(bad)[0].reason is Reason.WORKER_LOST
    assert [store.jobs.get(job_id).status for job_id in others] == [Status.QUEUED] * 2


def test_the_pause_before_a_retry_is_known_for_any_number_of_retries() -> None:
    assert [retry_delay_s(n) for n in (1, 2, 7, 2_000_000_000)] == [10, 20, 600, 600]
