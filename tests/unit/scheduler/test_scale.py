"""What people ask often reads no more rows when more jobs wait or have ended, and its pages leave nothing out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text

from loractl.common.job.status import Status
from loractl.common.job.sweep import NewSweep
from loractl.common.store.records import Choice, Page
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.adapters.answer import adapter_list
from loractl.scheduler.fleet.answer import fleet
from loractl.scheduler.status.overview import SWEEPS_SHOWN, job_list, overview
from loractl.scheduler.why.answer import Why, why

from ...databases import SQLITE_ALONE
from ..factories import node_state, submission

FEW, MANY = 400, 3_200
"""Both are more than a page and more than is replayed, so that an answer has the same form."""

ANSWERS: dict[str, Callable[[Store], Any]] = {
    "status": lambda store: overview(store, Choice(), Page()),
    "status of one user": lambda store: overview(store, Choice(user="user1"), Page()),
    "a later page of status": lambda store: overview(store, Choice(), Page(after=100), alone=True),
    "status -a": lambda store: job_list(store, Choice(), Page()),
    "why": lambda store: why(store, 60),
    "gpus": fleet,
    "adapters": lambda store: adapter_list(store, Page()),
}


class Counted:
    """A cursor that counts the rows that are taken from it."""

    def __init__(self, cursor: Any, counts: dict[str, int]) -> None:
        self._cursor, self._counts = cursor, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def fetchone(self) -> Any:
        row = self._cursor.fetchone()
        self._counts["rows"] += row is not None
        return row

    def fetchmany(self, size: int | None = None) -> Any:
        return self._count(self._cursor.fetchmany(size or self._cursor.arraysize))

    def fetchall(self) -> Any:
        return self._count(self._cursor.fetchall())

    def _count(self, rows: list[Any]) -> list[Any]:
        self._counts["rows"] += len(rows)
        return rows


@contextmanager
def counted(store: Store) -> Iterator[dict[str, int]]:
    """How many statements are run and how many rows are read."""
    counts = {"statements": 0, "rows": 0}

    def after(_: Any, cursor: Any, *rest: Any) -> None:
        context = rest[2]
        counts["statements"] += 1
        context.cursor = Counted(cursor, counts)

    event.listen(store.engine, "after_cursor_execute", after)
    try:
        yield counts
    finally:
        event.remove(store.engine, "after_cursor_execute", after)


def grow(store: Store, jobs: int, ended: bool) -> None:
    """Let so many jobs wait, of 4 users and 2 priorities, or let them have ended today, each with an adapter."""
    with store.engine.begin() as connection:
        columns = [c["name"] for c in _columns(connection, "jobs") if c["name"] != "job_id"]
        names = ", ".join(f'"{name}"' for name in columns)
        while (count := connection.scalar(text("SELECT count(*) FROM jobs"))) < jobs:
            alone = f"SELECT {names} FROM jobs WHERE sweep_id IS NULL ORDER BY job_id LIMIT :more"
            connection.execute(text(f"INSERT INTO jobs ({names}) {alone}"), {"more": jobs - count})
        if not ended:
            return
        done = "UPDATE jobs SET status = 'succeeded', reason = 'ok', attempt = 1, ended_at = :now, report_uri = 'file:///r'"
        connection.execute(text(f"{done} WHERE job_id <> 60"), {"now": "2099-01-01 12:00:00"})
        stored = (
            "INSERT INTO adapters (job_id, attempt, name, base_model, method, uri, size, sha256, created_at)"
            " SELECT job_id, 1, 'tiny' || job_id % 7, 'org/model', 'lora', 'file:///a', 1, 'f', :now FROM jobs"
            " WHERE job_id NOT IN (SELECT job_id FROM adapters) AND job_id <> 60"
        )
        connection.execute(text(stored), {"now": "2026-01-01 12:00:00"})


def _columns(connection: Any, table: str) -> list[Any]:
    from sqlalchemy import inspect

    return list(inspect(connection).get_columns(table))


@pytest.mark.parametrize("ended", [False, True], ids=["waiting", "ended"])
def test_no_answer_reads_more_rows_when_more_jobs_wait_or_have_ended(ended: bool, store: Store) -> None:
    for number in range(16):
        store.jobs.submit(submission(user=f"user{number % 4}", priority=number % 2, lora=9 + number, qlora=8 + number))
    store.sweeps.submit(NewSweep(name="grid", varied={"lora.r": "8,16"}), [submission(name="grid-1")])
    for number in range(4):
        store.cards.see(node_state(f"box:{number}", total=24 * GIB, outside_bytes=(0 if number else 20) * GIB))
    read: dict[int, dict[str, dict[str, int]]] = {}
    for jobs in (FEW, MANY):
        grow(store, jobs, ended)
        read[jobs] = {}
        for name, ask in ANSWERS.items():
            with counted(store) as counts:
                ask(store)
            read[jobs][name] = dict(counts)
    for name, few in read[FEW].items():
        many = read[MANY][name]
        assert few["rows"] > (0 if ended or name != "adapters" else -1), "what is not counted proves nothing"
        assert many["rows"] <= few["rows"] + 50, f"{name} reads {few} and {many}"  # users' jobs come in parts
        assert many["rows"] < 500 and many["statements"] <= few["statements"] + 5 < 100, f"{name} asks {few} and {many}"
    if not ended:  # the users had no card, so they have equal shares
        turn = sorted(store.jobs.matching(), key=lambda job: (-job.priority, job.submitted_at, job.job_id))
        assert [job.job_id for job in store.jobs.ready(300)] == [job.job_id for job in turn[:300]]
    counts = overview(store, Choice(), Page())
    assert (counts.waiting_count, counts.ended.get(Status.SUCCEEDED, 0)) == ((1, MANY - 1) if ended else (MANY, 0))


def test_the_pages_of_status_have_every_waiting_job_once_and_in_order(store: Store) -> None:
    for number in range(23):
        store.jobs.submit(
            submission(user="ada" if number % 3 else "bob", priority=number % 4 // 2, labels={"n": "odd"})
        )
    for choice in (Choice(), Choice(user="bob"), Choice(label=("n", "odd"))):
        waiting = [job for job in store.jobs.matching() if not choice.user or job.user == choice.user]
        expected = [job.job_id for job in sorted(waiting, key=lambda job: (-job.priority, job.job_id))]
        assert _paged(lambda page, choice=choice: overview(store, choice, page).waiting, expected) == expected
        newest = sorted(expected, reverse=True)
        assert _paged(lambda page, choice=choice: job_list(store, choice, page).jobs, newest) == newest
    last = overview(store, Choice(), Page(limit=23))
    assert last.after is None, "there is no page behind the last job"


def _paged(ask: Callable[[Page], tuple[Any, ...]], expected: list[int]) -> list[int]:
    found: list[int] = []
    while len(found) < len(expected) and (part := ask(Page(limit=4, after=found[-1] if found else None))):
        found += [job.job_id for job in part]
    return found


def test_members_of_sweeps_take_no_place_of_other_jobs_on_a_page_for_people(store: Store) -> None:
    for number in range(SWEEPS_SHOWN + 2):
        store.sweeps.submit(NewSweep(name=f"s{number}", varied={"lora.r": "8"}), [submission(), submission()])
    alone = store.jobs.submit(submission())
    shown = overview(store, Choice(), Page(limit=1), alone=True)
    assert [job.job_id for job in shown.waiting] == [alone] and shown.after is None
    assert shown.waiting_count == 2 * (SWEEPS_SHOWN + 2) + 1
    assert (len(shown.sweeps), shown.sweep_count) == (SWEEPS_SHOWN, SWEEPS_SHOWN + 2)
    assert shown.sweeps[-1].name == f"s{SWEEPS_SHOWN + 1}", "the newest ones are shown"
    with_members = overview(store, Choice(), Page(limit=1))
    assert with_members.waiting[0].sweep_id == 1 and with_members.after == 1


@SQLITE_ALONE
def test_what_would_help_is_asked_of_the_rule_with_every_job_that_waits(store: Store) -> None:
    store.cards.see(node_state("a:0", total=24 * GIB))
    mine = store.jobs.submit(submission(lora=40, qlora=8, method="lora"))
    answer = why(store, mine)
    assert isinstance(answer, Why)
    assert answer.wait.word == "never"
    store.cards.see(node_state("b:0", total=48 * GIB, outside_bytes=20 * GIB))
    told = why(store, mine)
    assert isinstance(told, Why)
    assert told.wait.helps.startswith("It would start now on a:0 with method: qlora")
    for _ in range(205):  # none of them can start, and they stand before it
        store.jobs.submit(submission(user="bob", lora=30, qlora=30, priority=1))
    again = why(store, mine)
    assert isinstance(again, Why)
    assert again.wait.helps.startswith("It would start now on a:0"), "jobs that can't start take no card"
    store.jobs.submit(submission(user="cyd", lora=20, qlora=20, priority=0))
    store.jobs.submit(submission(user="bob", lora=20, qlora=20, priority=1))
    taken = why(store, mine)
    assert isinstance(taken, Why)
    assert "a:0" not in taken.wait.helps, "the 206th of bob takes that card"
    assert not taken.ahead.complete and len(taken.ahead.jobs) > 50
