"""Any value in any column: the database refuses it, or every command reads it.

What is stored stops no claim, no answer and no gc, and an ended job stays as it is. On SQLite any type in any column,
on PostgreSQL what each column's type takes; and what a login of people may write.
STORE_EXAMPLES=2000 pytest tests/fuzz/test_stored_values.py is the longest run: on PostgreSQL more than an hour.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import Forbidden, ValueRefused
from loractl.common.job.status import Status
from loractl.common.settings import load_settings
from loractl.common.store.records import Choice, Claim, Left, Page
from loractl.common.store.roles import SUBMIT
from loractl.common.store.store import Store
from loractl.common.store.tables import Base
from loractl.common.units import GIB, LARGEST
from loractl.scheduler.adapters.answer import adapter_list
from loractl.scheduler.adapters.text import adapters_text
from loractl.scheduler.fleet.answer import fleet
from loractl.scheduler.fleet.text import devices
from loractl.scheduler.garbage.cleaner import Cleaner, Policy, parse_age
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.job_text import job_text
from loractl.scheduler.status.overview import job_list, overview
from loractl.scheduler.status.overview_text import job_list_text, overview_text
from loractl.scheduler.status.standing import sweep_standing
from loractl.scheduler.status.standing_text import opened
from loractl.scheduler.usage.answer import GROUPS, quota_list, usage_table
from loractl.scheduler.usage.text import quotas_text, usage_text
from loractl.scheduler.web.metrics import Exporter
from loractl.scheduler.web.pages.markup import render
from loractl.scheduler.web.pages.pages import Asked, Drawn, Pages
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.why.answer import why
from loractl.scheduler.why.text import why_text

from .. import webs
from ..conftest import kept_engine
from ..databases import UPGRADED, database
from ..roles import role
from ..unit.factories import EXAMPLES, NOON, Clock, node_state, submission
from ..unit.scheduler.screens import WIDE

pytestmark = pytest.mark.timeout(max(300, 5 * EXAMPLES))

stored = settings(
    max_examples=EXAMPLES if EXAMPLES > 60 else 6,  # half a second each
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES <= 60,  # the short run must not fail by chance; the long one looks for something new
    print_blob=True,
)

WAITS, RUNS, ENDED, FAILED = "name = 'waits'", "name = 'runs'", "name = 'ended'", "name = 'failed'"
ROWS = {
    "jobs": (WAITS, WAITS, "name = 'shared'", "name = 'blocked'", RUNS, ENDED, FAILED, "name = 'member'"),
    "attempts": (f"job_id IN (SELECT job_id FROM jobs WHERE {RUNS})", "job_id = 1"),
    "nodes": ("node = 'kestrel:1'", "node = 'osprey:0'"),
    "sweeps": ("1 = 1",), "tags": ("1 = 1",), "uses": ("1 = 1",),
    "usage": ("1 = 1",), "label_sets": ("1 = 1",), "quotas": ("1 = 1",), "lab_settings": ("1 = 1",),
}  # fmt: skip
"""Jobs that wait (one of them on several cards), run and have ended, and the other rows of the lab."""

FRESH = ("fresh:0", "fresher:0", "freshest:0")

_edges = (0, 1, -1, 2, 2**31 - 1, 2**31 - 2, -(2**31), 2**31, 2**53, 2**63 - 1, -(2**63), -5 * GIB, 10**9)
whole = st.one_of(st.sampled_from(_edges), st.integers(-(2**63), 2**63 - 1))
real = st.one_of(st.sampled_from((float("inf"), float("-inf"), float("nan"), 1e308, -1e-9, 3.5)), st.floats())
TIMES = ("infinity", "-infinity", "0044-03-15 BC", "0001-01-01 00:00:00", "9999-12-31 23:59:59.999999", "2026-13-45")
PIECES = (
    '{"lora": 1e999}', '{"lora": -5368709120, "qlora": null}', '{"lora": "4"}', '{"lora": true, "qlora": 2.5}',
    "[" * 5000 + "]" * 5000, "9" * 5000, '"\\ud800"', '{"path": {"rows": 1e999, "tokens": -1, "bytes": "x"}}',
    '{"path": {"rows": 10, "tokens": 1e308}}', '{"path": 5}', '["lora", "lora"]', '["x"]', "null", "[]", "{}", "7",
    '{"alone": false, "ways": [{"cards": 99999999, "parallel": "data", "lora": -1, "qlora": null}]}',
    '{"alone": 1, "ways": 5}', '{"micro_batch": 0, "accumulation": -3}', '{"micro_batch": "a"}', '{"step": 1e999}',
    '{"step": "x", "prefix": 5}', '{"box": {"reason": 5, "until": "infinity"}}', '{"kestrel:0": []}',
    '{"varied": 5}', '{"varied": {"lora.r": 5, "x": null}, "trials": "x", "seed": []}', "[1e999, -1, \"x\"]", "[0.5]",
    '{"products": [[1]], "sums": [1]}', '{"products": [], "sums": [1, 0, 0], "load": 1e999}', '{"resources": 5}',
    '{"lora": {"init_from": "x"}}', '{"notify": 5}', "NaN", "{", "", "abc", "\\", "10000|abc||ada",
)  # fmt: skip
words = st.one_of(st.sampled_from((*PIECES, *TIMES)), st.text(max_size=20))
values = st.one_of(st.none(), st.booleans(), whole, real, words, st.binary(max_size=8))


def nested(leaf: Any, grow: Any, old: Any) -> Any:
    """A JSON value with one part replaced."""
    path: list[Any] = []
    while isinstance(old, (dict, list)) and old and grow.random() < 0.8:
        key = grow.choice(sorted(old) if isinstance(old, dict) else range(len(old)))
        path.append((old, key))
        old = old[key]
    if not path:
        return leaf
    path[-1][0][path[-1][1]] = leaf
    return path[0][0]


def write(connection: Any, table: str, column: str, where: str, value: Any) -> None:
    """Store a value as it is; PostgreSQL reads its text as the column's type."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f'UPDATE {table} SET "{column}" = ? WHERE {where}', (value,))
        return
    kind = kind_of(connection, table, column)
    written = value if value is None or isinstance(value, str) else str(value)
    connection.exec_driver_sql(
        f'UPDATE {table} SET "{column}" = CAST(CAST(%s AS text) AS {kind}) WHERE {where}', (written,)
    )


def kind_of(connection: Any, table: str, column: str) -> str:
    """PostgreSQL's name of a column's type."""
    of_table = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = CAST(:t AS regclass)"
    asked = f"{of_table} AND attname = :c"
    return str(connection.execute(text(asked), {"t": table, "c": column}).scalar_one())


def glance(store: Store, shelf: ReportShelf, job_ids: Iterable[int]) -> None:
    """What is looked at all the time."""
    seen = overview(store, Choice(), Page())
    shown([overview_text(seen, WIDE), *(why_text(why(store, job_id), WIDE) for job_id in job_ids)], [seen])
    drawn([Pages(store, shelf).lab(Asked({}))])
    assert b"loractl_database_up 1.0" in Exporter(store).text()


def answers(store: Store, shelf: ReportShelf, job_ids: Iterable[int]) -> None:
    """All else that people ask."""
    pages, labelled = Pages(store, shelf), Choice(label=("a", "b"))
    listed, cards, adapters = job_list(store, Choice(), Page(limit=100)), fleet(store), adapter_list(store, Page())
    told = [job_list_text(listed, WIDE), devices(cards, WIDE, used=True), adapters_text(adapters, WIDE)]
    told.append(overview_text(overview(store, labelled, Page(limit=2), alone=True), WIDE))
    shown(told, [listed, cards, adapters])
    had, quotas = [usage_table(store, by, NOON - dt.timedelta(days=9)) for by in GROUPS], quota_list(store)
    shown([*(usage_text(table, WIDE) for table in had), quotas_text(quotas, WIDE)], [*had, quotas])
    drawn([pages.jobs(Asked({})), pages.sweeps(Asked({})), pages.adapters(Asked({})), pages.usage(Asked({}))])
    for job_id in job_ids:
        one = job_in_full(store, job_id)
        shown([job_text(one, WIDE), job_text(one, WIDE, full=True)], [one])
        drawn([pages.job(Asked({}), job_id)])
    for sweep in store.sweeps.newest(Page()):
        if not 0 < sweep.sweep_id <= LARGEST:
            continue  # no one can ask for it
        standing = sweep_standing(store, sweep.sweep_id)
        shown([opened(standing, WIDE)], [standing])
        drawn([pages.sweep(Asked({}), sweep.sweep_id)])


def shown(texts: Iterable[str], as_json: Iterable[Any]) -> None:
    """Both forms of the answers can be printed."""
    for one in texts:
        one.encode("utf-8", "replace")
    for answer in as_json:
        json.dumps(answer.as_json())


def drawn(pages: Iterable[Drawn]) -> None:
    for page in pages:
        str(render(page.template, **page.values)).encode("utf-8", "replace")


def rounds(store: Store) -> None:
    """What nodes do for all."""
    store.cards.take_turn(0.0, 0.0)
    store.jobs.end_patience()
    store.cards.preempt()
    store.jobs.replan_outdated()
    store.jobs.waiting_classes((8, 24))
    store.jobs.has_unfinished(2**40, {})


def claim_until(store: Store, job_id: int) -> None:
    """Fresh cards claim until they have the job, without the cards that don't take what is left to them."""
    idle = set(webs.CARDS)
    for _ in range(12):
        for node in FRESH:
            store.cards.see(node_state(node, total=400 * GIB, max_jobs=64))
        for node in FRESH:
            claim = store.attempts.claim(node, gangs=True, distrusted=frozenset(idle))
            if isinstance(claim, Claim) and claim.job_id == job_id:
                return
            idle |= claim.nodes - set(FRESH) if isinstance(claim, Left) else set()
    raise AssertionError("no card has taken the healthy job")


def raw(engine: Engine, where: str) -> list[Any]:
    """The rows of jobs, and their attempts', as the driver gives them."""
    with engine.connect() as connection:
        jobs = f"SELECT CAST(job_id AS text), {_texts(connection, 'jobs')} FROM jobs WHERE {where} ORDER BY 1"
        return [tuple(row) for row in connection.exec_driver_sql(jobs)]


def _texts(connection: Any, table: str) -> str:
    kind = "blob" if connection.dialect.name == "sqlite" else "text"
    return ", ".join(f'CAST("{column.name}" AS {kind})' for column in Base.metadata.tables[table].columns)


def look(url: str, artifacts: ArtifactStore, home: Path, poison: Callable[[Engine], Sequence[int]]) -> None:
    """`poison`: writes what nobody would, and returns the jobs to look at; none where the database refused it all."""
    engine, clock = kept_engine(url), Clock()
    store = Store(engine, clock)
    shelf = ReportShelf(store, lambda: artifacts)
    try:
        if not (job_ids := [job_id for job_id in poison(engine) if 0 < job_id <= LARGEST]):  # others no one can ask for
            return
        ended = raw(engine, "status IN ('succeeded', 'failed', 'cancelled')")
        healthy = store.jobs.submit(submission(lora=1, qlora=1, user="healthy", name="healthy"))
        glance(store, shelf, job_ids)
        rounds(store)
        claim_until(store, healthy)
        answers(store, shelf, (*job_ids, healthy))
        policy = Policy(keep_last=1, older_than=parse_age("30d"), past_jobs=True)
        list(Cleaner(load_settings({"LORACTL_HOME": str(home)}), store, artifacts, policy).find())
        numbers = ", ".join(str(one[0]) for one in ended) or "0"
        assert raw(engine, f"job_id IN ({numbers})") == ended, "an ended job was written"
        clock.forward(7200)
        store.attempts.reap()
        assert store.jobs.get(healthy).status is not Status.RUNNING
        overview(store, Choice(), Page())
    finally:
        engine.dispose()


def places() -> Any:
    """One to three columns of rows, and what they are to hold."""
    names = [(table, column.name, where) for table, wheres in ROWS.items() for where in wheres
             for column in Base.metadata.tables[table].columns]  # fmt: skip
    grow = st.randoms(use_true_random=False)
    return st.lists(
        st.tuples(st.sampled_from(names), values, grow), min_size=1, max_size=3, unique_by=lambda p: p[0][2]
    )


def stored_in(engine: Engine, told: Sequence[Any]) -> list[int]:
    """Write them; the jobs that this may concern."""
    job_ids: set[int] = set()
    for (table, column, where), value, grow in told:
        with engine.connect() as connection:
            old = connection.exec_driver_sql(f'SELECT CAST("{column}" AS text) FROM {table} WHERE {where}').scalar()
            of = f"SELECT job_id FROM jobs WHERE {where}" if table == "jobs" else "SELECT max(job_id) FROM jobs"
            concerned = connection.exec_driver_sql(of).scalars().all()
        new = value
        if isinstance(old, str) and old[:1] in ("{", "[") and grow.random() < 0.5 and not isinstance(value, bytes):
            new = json.dumps(nested(value, grow, json.loads(old)))
        note(f"UPDATE {table} SET {column} = {new!r} WHERE {where}")
        with contextlib.suppress(SQLAlchemyError, ValueRefused), engine.begin() as connection:
            write(connection, table, column, where, new)
            job_ids.update([new] if (table, column) == ("jobs", "job_id") and type(new) is int else concerned)
    return sorted(job_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> ArtifactStore:
    return ArtifactStore((folder / "artifacts").as_uri())


@pytest.fixture(scope="module")
def seeded_file(sqlite_template: Path, folder: Path, artifacts: ArtifactStore) -> Path:
    shutil.copy(sqlite_template, file := sqlite_template.with_name("stored.db"))
    webs.one_of_each(f"sqlite:///{file}", artifacts)
    return file


@stored
@given(told=places())
def test_any_value_in_any_column_on_sqlite(
    seeded_file: Path, folder: Path, artifacts: ArtifactStore, told: Any
) -> None:
    file = seeded_file.with_name("poisoned.db")
    for name in (file, file.with_name("poisoned.db-wal"), file.with_name("poisoned.db-shm")):
        name.unlink(missing_ok=True)
    shutil.copy(seeded_file, file)
    look(f"sqlite:///{file}", artifacts, folder / "home", lambda engine: stored_in(engine, told))


_SEED = """
CREATE SCHEMA seed;
DO $$ DECLARE each record; BEGIN
  FOR each IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version' LOOP
    EXECUTE format('CREATE TABLE seed.%1$I AS TABLE public.%1$I', each.tablename);
  END LOOP;
END $$;
"""
_AGAIN = """
DO $$ DECLARE each record; BEGIN
  SET LOCAL session_replication_role = replica;
  FOR each IN SELECT tablename FROM pg_tables WHERE schemaname = 'seed' LOOP
    EXECUTE format('DELETE FROM public.%1$I; INSERT INTO public.%1$I TABLE seed.%1$I', each.tablename);
  END LOOP;
END $$
"""


@pytest.fixture(scope="module")
def seeded_url(postgres_server: str, folder: Path, artifacts: ArtifactStore) -> Iterator[str]:
    with database(postgres_server, UPGRADED) as url:
        webs.one_of_each(url, artifacts)
        engine = kept_engine(url)
        with engine.begin() as connection:
            connection.execute(text(_SEED))
        yield url
        engine.dispose()


def as_it_was(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(_AGAIN))


@stored
@given(told=places())
def test_any_value_in_any_column_on_postgresql(
    seeded_url: str, folder: Path, artifacts: ArtifactStore, told: Any
) -> None:
    as_it_was(kept_engine(seeded_url))
    look(seeded_url, artifacts, folder / "home", lambda engine: stored_in(engine, told))


@pytest.fixture(scope="module")
def person_url(seeded_url: str) -> Iterator[str]:
    with role(seeded_url, f"eve_{secrets.token_hex(4)}", SUBMIT) as url:
        yield url
        kept_engine(url).dispose()


def values_of_a_person() -> Any:
    """One or two calls of a login, each with a copy of a row in which a column is changed, or an edit."""
    names = [(table, column.name) for table in ("jobs", "jobs", "jobs", "sweeps", "tags")
             for column in Base.metadata.tables[table].columns]  # fmt: skip
    told = st.tuples(st.sampled_from(names), values, st.randoms(use_true_random=False), st.booleans())
    return st.lists(told, min_size=1, max_size=2)


def written_by(login: Engine, told: Sequence[Any]) -> list[int]:
    """The login's new jobs."""
    job_ids: list[int] = []
    for (table, column), value, grow, edits in told:
        with login.connect() as connection:
            row = copied(connection, table)
        old = row.get(column)
        new = nested(value, grow, copy.deepcopy(old)) if isinstance(old, dict | list) and grow.random() < 0.5 else value
        note(f"{'edit' if edits else 'new'} {table} {column} = {new!r}")
        with login.connect() as connection:
            job = copied(connection, "jobs")
        if table == "jobs" and not edits:
            job |= {column: new}
        else:
            with login.begin() as connection:
                job_ids.append(call(connection, "loractl_submit(CAST(:one AS json))", {"job": job}))
        with contextlib.suppress(SQLAlchemyError, Forbidden, ValueRefused), login.begin() as connection:
            if table == "tags":
                text_of = "CAST(:one AS json) ->> 'name', CAST(:one AS json) ->> 'tag'"
                call(
                    connection, f"loractl_tag({text_of}, 1, NULL, 'eve')", {"name": "ended", "tag": "own", column: new}
                )
            elif table == "sweeps":
                sweep_id = call(connection, "loractl_submit(CAST(:one AS json))", {"sweep": row | {column: new}})
                job_ids.append(
                    call(connection, "loractl_submit(CAST(:one AS json))", {"job": job | {"sweep_id": sweep_id}})
                )
            elif edits:
                asked = f"loractl_change({job_ids[-1]}, 'edited', '{{}}', CAST(:one AS json), 'eve', '')"
                call(connection, asked, {column: new})
            else:
                job_ids.append(call(connection, "loractl_submit(CAST(:one AS json))", {"job": job}))
    return job_ids


def call(connection: Any, asked: str, one: Any) -> Any:
    return connection.execute(text(f"SELECT {asked}"), {"one": json.dumps(one, default=str)}).scalar_one()


def copied(connection: Any, table: str) -> dict[str, Any]:
    """A row of the lab, as a client gives the columns of a new one."""
    where = WAITS if table == "jobs" else "true"
    found = connection.execute(text(f"SELECT row_to_json(one) FROM {table} AS one WHERE {where} LIMIT 1")).scalar_one()
    now = dt.datetime.now(dt.UTC).isoformat()
    return {name: now if name in ("submitted_at", "created_at") else value for name, value in found.items()}


@stored
@given(told=values_of_a_person())
def test_any_value_that_a_login_of_people_may_write(
    seeded_url: str, person_url: str, folder: Path, artifacts: ArtifactStore, told: Any
) -> None:
    as_it_was(kept_engine(seeded_url))
    look(seeded_url, artifacts, folder / "home", lambda _: written_by(kept_engine(person_url), told))
