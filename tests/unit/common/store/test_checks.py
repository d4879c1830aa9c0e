"""The columns' bounds in the database itself: nobody stores what no reader could read, and an upgrade loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from alembic import command
from click.testing import CliRunner
from sqlalchemy import Engine, insert, inspect, text

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import ValueRefused
from loractl.common.job.method import Need
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.placement.lines import QueueKey
from loractl.common.store import shapes
from loractl.common.store.checks import bring, checks_of, hold, quarantined
from loractl.common.store.columns import Characters, Flag, Json, LineKey, Prose
from loractl.common.store.database import DatabaseError, make_engine
from loractl.common.store.records import Claim, Progress, StoredResult
from loractl.common.store.schema import alembic_config, migrating, upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import (
    AttemptShare,
    Base,
    CardContention,
    DrainOrder,
    FinalLook,
    Job,
    JobLabel,
    KeptFile,
    LabFailure,
    LabSetting,
    Lock,
    Wish,
)
from loractl.scheduler.cli.main import cli

from .... import webs
from ...factories import NOON, submission, take

pytestmark = pytest.mark.both

REFUSED = {
    "jobs": {
        "priority": ["2147483648", "-2147483649"], "vram_lora": ["-1", "1125899906842625"], "vram_class": ["-1"],
        "retries_used": ["-1", "2147483647"], "loss": ["'NaN'", "'Infinity'", "1e301", "'many'"],
        "tokens_per_second": ["-1"], "submitted_at": ["'infinity'", "'1999-12-31 23:59:59'", "'2026-02-31 00:00:00'"],
        "lora_until": ["'-infinity'", "'9000-01-01 00:00:00'", "'noon'"],
        "name": ["'a\u0007b'", "'a\u202eb'", "'a\nb'"],
        "labels": ["'{\"a\": 5}'", "'[]'", "'null'", "'{'"], "spec": ["'[]'", "'7'", "'{\"a\": 1e999}'", "{big}"],
        "planned": ["'{\"lora\": -1}'", "'{\"lora\": 1.0}'", "'{\"lora\": \"4\"}'"], "methods": ["'{}'", "'[1]'"],
        "queue_key": [
            "'garbage'", "''", "'10000|abc||ada'", "'10000|001|{\"a|ada'", "'10000|001|{5}|ada'", "'1000|001||ada'",
            "'10000|001|{\"a\": 5}|ada'", "'10000|001|[]|ada'",
        ],
        "adjustment": ["'{\"micro_batch\": 0}'", "'4'"],
        "checkpoint": ["'{\"step\": 3}'", "'{\"step\": 1e2, \"prefix\": \"x\"}'"],
        "gangs": ["'{\"alone\": true, \"ways\": [{\"cards\": 0, \"parallel\": \"x\", \"lora\": 1, \"qlora\": 2}]}'"],
        "avoids": ["'[]'", f"'{'[' * 900}{']' * 900}'", f"'{{\"a\": {'9' * 5000}}}'"],
        "data": ["'{\"path\": {\"rows\": -1}}'"],
        "roomy": ["'{\"lora\": [{\"micro_batch\": 1, \"bytes\": 0, \"planned\": 1}]}'"],
    },
    "tags": {"tag": ["'latest'", "'a\u001bb'"]},
    "nodes": {"temperature": ["-2147483648"], "window_s": ["'NaN'"], "outside": ["'[{\"pid\": \"x\"}]'"]},
    "sweeps": {"rungs": ["'[2]'"], "settings": ["'{\"varied\": 5}'"]},
    "events": {"at": ["'infinity'"], "text": ["{long}"]},
    "usage": {"card_hours": ["-1"]},
}  # fmt: skip
"""Values in SQL, by table and column."""

MISSHAPEN: dict[str, dict[str, list[Any]]] = {
    "jobs": {
        "spec": [
            {"after": 5}, {"after": [0]}, {"after": list(range(1, 1002))}, {"after_any": 1}, {"lora": []},
            {"lora": {"init_from": {"sweep": "x"}}}, {"resources": {"time_limit": -1}}, {"lora_patience": 1e300},
            {"resources": {"node_labels": {"a": 1}}}, {"resources": {"max_vram": "x"}}, {"notify": "me"},
        ],
        "methods": [["full"], ["lora", "auto"]],
        "adjustment": [{"gradient_checkpointing": "third"}],
        "avoids": [
            {"box": {"reason": "x"}},
            *({"box": {"reason": "x", "until": until}} for until in (
                5, "noon", "2026-02-31T00:00:00+00:00", "2026-03-01T24:00:00+00:00", "2026-03-01T00:00:00")),
        ],
        "data": [{"path": {"uri": "x"}}, {"path": None}],
        "gangs": [{"alone": True, "ways": [{"cards": 2, "parallel": "tensor", "lora": 1, "qlora": 2}]}],
    },
    "nodes": {"self_test": [{"bf16": 1}, {"capability": 9}, {"context": -1}]},
}  # fmt: skip
"""Values of JSON, by table and column."""

LOOSE = {"jobs": {"spec": ["7", "x'7b7d'"], "name": ["x'61'"], "held": ["'many'", "2"], "attempt": ["'1x'", "0.5"],
    "submitted_at": ["'2026-03-01 24:00:00'", "'2026-03-01T00:00:00'", "'2026-03-01'", "1767225600"],
}}  # fmt: skip
"""What SQLite's own types would take."""


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@contextlib.contextmanager
def opened(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    yield engine
    engine.dispose()


def refused(engine: Engine, table: str, column: str, value: str) -> bool:
    """Whether the database itself refuses it."""
    told = value.replace("{long}", "'" + "x" * 16385 + "'").replace("{big}", "'" + '{"a": "' + "x" * 2**20 + "\"}'")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f'UPDATE {table} SET "{column}" = {told}')
            connection.rollback()
    except ValueRefused as error:
        return f"the database refuses the value of {column}" == error.sentence
    except DatabaseError:
        return True
    return False


def test_no_column_takes_what_no_reader_could_read(upgraded_url: str, artifacts: ArtifactStore) -> None:
    webs.one_of_each(upgraded_url, artifacts)
    with opened(upgraded_url) as engine:
        as_sql = {
            table: {column: [f"'{json.dumps(one)}'" for one in told] for column, told in columns.items()}
            for table, columns in MISSHAPEN.items()
        }
        wanted = [REFUSED, as_sql, LOOSE] if engine.dialect.name == "sqlite" else [REFUSED, as_sql]
        taken = [
            (table, column, value) for tables in wanted for table, columns in tables.items()
            for column, told in columns.items() for value in told if not refused(engine, table, column, value)
        ]  # fmt: skip
        assert taken == []


UNBOUNDED = {"alembic_version", "locks"}
"""Tables whose one column no command shows."""


def test_the_database_holds_a_bound_for_each_column(upgraded_url: str) -> None:
    """PostgreSQL's own type is enough for yes and no."""
    with opened(upgraded_url) as engine, engine.connect() as connection:
        sqlite = engine.dialect.name == "sqlite"
        named = "SELECT conname FROM pg_constraint UNION SELECT 'by ' || tgname FROM pg_trigger"
        if sqlite:
            named = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"
        there = "\n".join(connection.exec_driver_sql(named).scalars())
        for table in (one for name, one in Base.metadata.tables.items() if name not in UNBOUNDED):
            bounds = {bound.column.name: bound for bound in checks_of(table, engine.dialect.name)}
            for column in table.columns:
                if sqlite or not isinstance(column.type, Flag):
                    assert bounds[column.name].name in there, f"{table.name}.{column.name}"
                if isinstance(column.type, Json | LineKey):
                    name = bounds[column.name].name
                    assert (f"{name}_{table.name}_update" if sqlite else f"by {name}") in there


@pytest.mark.parametrize("upgraded_url", ["postgresql"], indirect=True)
def test_postgresql_looks_into_json_only_where_it_is_written(upgraded_url: str, artifacts: ArtifactStore) -> None:
    """Also in a database of before, whose checks did at each update."""
    webs.one_of_each(upgraded_url, artifacts)
    with opened(upgraded_url) as engine:
        spec = next(bound for bound in checks_of(Job.__table__, "postgresql") if bound.column.name == "spec")
        with engine.begin() as connection:
            for statement in (
                f'DROP TRIGGER "{spec.name}" ON jobs',
                f'ALTER TABLE jobs DROP CONSTRAINT "{spec.name}"',
                f'ALTER TABLE jobs ADD CONSTRAINT "{spec.name}" CHECK ({spec.sql} AND loractl_fits_jobs_spec(spec))',
            ):
                connection.exec_driver_sql(statement)
        with engine.begin() as connection:
            hold(connection)
            asked = "SELECT string_agg(pg_get_constraintdef(oid), ' ') FROM pg_constraint WHERE contype = 'c'"
            assert "loractl_fits" not in str(connection.exec_driver_sql(asked).scalar())
        assert quarantined(engine) == 0
        assert refused(engine, "jobs", "spec", "'{\"after\": 5}'") and not refused(engine, "jobs", "step", "3")


def test_the_bounds_take_what_a_newer_version_may_say(upgraded_url: str, artifacts: ArtifactStore) -> None:
    webs.one_of_each(upgraded_url, artifacts)
    with opened(upgraded_url) as engine:
        for column, value in {
            "status": "sublimated", "reason": "comet", "stage": "melting", "version": "99.0.0",
            "adjustment": '{"new": 1}', "checkpoint": '{"step": 1, "prefix": "x", "new": []}', "spec": '{"new": [1]}',
            "name": "тюнинг ✓", "labels": '{"team": "\U0001f600"}',
        }.items():  # fmt: skip
            assert not refused(engine, "jobs", column, f"'{value}'"), column


def rows_of(engine: Engine, like: dict[str, list[str]] | None = None) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, as text. `like`: only these columns."""
    with engine.connect() as connection:
        return {
            name: sorted(map(tuple, connection.exec_driver_sql(f"SELECT {', '.join(columns)} FROM {name}")), key=str)
            for name, columns in (like or columns_of(engine)).items()
        }


def columns_of(engine: Engine) -> dict[str, list[str]]:
    """Each as text, by table."""
    found = inspect(engine)
    names = set(found.get_table_names()) - {"alembic_version", "quarantine"}
    return {name: [f'CAST("{one["name"]}" AS text)' for one in found.get_columns(name)] for name in names}


GONE = {
    "hosts": None, "attempts": ("host", "inside", "promised_at", "joined", "shared"),
    "jobs": ("spec_hash", "cancel_requested", "held_too", "held", "max_retries"), "nodes": ("reserved",),
    "quotas": ("set_by", "at"), "lab_settings": ("set_by", "at"), "drains": ("at",), "log_chunks": ("at",),
    "fleet_rounds": ("node",), "tags": ("user", "at"),
}  # fmt: skip
"""What revisions since 0041 have removed or written: a table, and columns."""


def kept(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """What an upgrade keeps of the tables of an older revision."""
    gone = {name: {f'CAST("{column}" AS text)' for column in of or ()} for name, of in GONE.items()}
    left = {name: some for name, some in columns.items() if GONE.get(name, ()) is not None}
    return {name: [column for column in some if column not in gone.get(name, ())] for name, some in left.items()}


def form_of(engine: Engine) -> list[Any]:
    """Indexes and numbers that are given next."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            indexes = "SELECT name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name"
            numbers = "SELECT name, seq FROM sqlite_sequence ORDER BY name"
        else:
            indexes = (
                "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'quarantine'"
                " ORDER BY indexname"
            )
            numbers = (
                "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public'"
                " AND left(sequencename, 10) <> 'quarantine' ORDER BY 1"
            )
        return [connection.exec_driver_sql(one).all() for one in (indexes, numbers)]


@pytest.fixture
def old_url(database_url: str, artifacts: ArtifactStore) -> str:
    """A lab with rows of each kind, in the tables of before there were bounds."""
    with opened(database_url) as engine:
        with engine.begin() as connection, alembic_config(connection) as config:
            command.upgrade(config, "head")
        webs.one_of_each(database_url, artifacts)
        own = {"job_id": 1, "at": NOON, "attempt": 1, "node": "kestrel:0", "user": "ada"}
        others: list[tuple[type[Base], dict[str, Any]]] = [
            (Wish, own), (Lock, {"name": "x"}), (DrainOrder, {"target": "heron", "reason": "", "now": False} | own),
            (FinalLook, {"rows_sha256": "0"} | own), (LabSetting, {"name": "x", "value": "y"} | own),
            (LabFailure, {"reason": Reason.KILLED, "message": "x"} | own), (JobLabel, {"key": "a", "value": "b"} | own),
            (CardContention, {"device_name": "x", "contention": 0.6}),
            (AttemptShare, {"rank": 1, "bytes": 5} | own), (KeptFile, {"key": "a", "host": "x", "sha256": "0"} | own),
        ]  # fmt: skip
        with engine.begin() as connection:
            for table, row in others:
                has = table.__table__.columns
                connection.execute(insert(table).values({name: one for name, one in row.items() if name in has}))
    return database_url


@pytest.mark.parametrize("since", ["", "0031"])
def test_an_upgrade_leaves_every_row_of_every_table_as_it_was(old_url: str, since: str) -> None:
    """From the tables without bounds, and through all migrations since that revision."""
    with opened(old_url) as engine:
        assert [name for name, found in rows_of(engine).items() if not found] == []
        if since:
            with migrating(engine) as connection, alembic_config(connection) as config:
                command.downgrade(config, since)
        columns, form = kept(columns_of(engine)), form_of(engine)
        rows = rows_of(engine, columns)
        upgrade(engine)
        after = rows_of(engine, columns)
        assert {name: len(found) for name, found in after.items()} == {name: len(found) for name, found in rows.items()}
        assert after == rows and (since or form_of(engine) == form)
        assert quarantined(engine) == 0
    with opened(old_url) as engine:  # other connections see the bounds, and can use the tables
        assert refused(engine, "jobs", "priority", "99999999999")
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
                assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_an_upgrade_keeps_the_labels_that_a_job_s_key_asks_for(old_url: str) -> None:
    """Keys before revision 0047 had a label's bar as it was."""
    with opened(old_url) as engine:
        with migrating(engine) as connection, alembic_config(connection) as config:
            command.downgrade(config, "0046")
            connection.exec_driver_sql(
                """UPDATE jobs SET queue_key = '10000|010|{"a|b": "c"}|' || "user" WHERE name = 'waits'"""
            )
        upgrade(engine)
        with engine.connect() as connection:
            key = str(connection.exec_driver_sql("SELECT queue_key FROM jobs WHERE name = 'waits'").scalar())
        assert QueueKey.parse(key).requires == {("a|b", "c")} and quarantined(engine) == 0


def test_what_breaks_a_bound_goes_to_the_quarantine_and_its_row_stays(old_url: str) -> None:
    with opened(old_url) as engine:
        store = Store(engine)
        before = rows_of(engine)
        broken = {
            "waits": ("spec", "[]"), "blocked": ("vram_lora", "-5"), "runs": ("loss", "1e301"),
            "ended": ("planned", '{"lora": -7}'), "failed": ("submitted_at", "1999-01-01 00:00:00"),
        }  # fmt: skip
        with engine.begin() as connection:
            for name, (column, value) in broken.items():
                connection.exec_driver_sql(f"UPDATE jobs SET {column} = '{value}' WHERE name = '{name}'")
            connection.exec_driver_sql("UPDATE tags SET tag = 'latest'")
        done = CliRunner(env={"LORACTL_DATABASE_URL": old_url}).invoke(cli, ["db", "upgrade"])
        assert "6 values broke a column's bounds: see loractl status JOB --full" in done.output
        after = rows_of(engine)
        assert {name: len(found) for name, found in after.items() if name != "events"} == {
            name: len(found) for name, found in before.items() if name != "events"
        }
        assert len(after["events"]) == len(before["events"]) + len(broken)
        with engine.connect() as connection:
            aside = connection.exec_driver_sql("SELECT table_name, column_name, value FROM quarantine").all()
        kept = {(table, column): value for table, column, value in aside}
        assert kept[("tags", "tag")] == "latest"
        assert {one[0] for one in kept} == {"jobs", "tags"} and quarantined(engine) == len(aside) == len(broken) + 1
        assert kept[("jobs", "spec")] == "[]" and float(kept[("jobs", "loss")]) == 1e301
        jobs = {job.name: job for job in map(store.jobs.get, range(1, len(before["jobs"]) + 1))}
        assert {name: (jobs[name].status, jobs[name].held) for name in broken} == {
            "waits": (Status.QUEUED, True), "blocked": (Status.QUEUED, True), "runs": (Status.RUNNING, False),
            "ended": (Status.SUCCEEDED, False), "failed": (Status.FAILED, False),
        }  # fmt: skip
        assert "vram_lora of its row could not stay" in str(jobs["waits"].message).replace("spec", "vram_lora")
        told = store.jobs.events(jobs["ended"].job_id)[-1]
        assert (told.kind, told.text) == ("quarantine", 'planned was moved to the quarantine: {"lora": -7}')
        take(store)
        assert store.jobs.get(jobs["waits"].job_id).status is Status.QUEUED, "it is held, and not failed"


def test_an_upgrade_asks_of_each_row_the_fields_alone_that_a_shape_has_gained(old_url: str) -> None:
    """And finds what breaks them; what the shape asked before holds, as long as its trigger was there."""
    with opened(old_url) as engine, migrating(engine) as connection:
        hold(connection)
        jobs, dialect = Base.metadata.tables["jobs"], engine.dialect.name
        (now,) = (check for check in checks_of(jobs, dialect) if check.column.name == "spec")
        kind = cast(Json, now.column.type)
        shape = cast(shapes.fields, kind.shape)
        fewer = shape.only([name for name in shape.shapes if name != "max_retries"])
        before = dataclasses.replace(now, deep=shapes.fits_sql(dialect, '"spec"', fewer, null=False))
        added = kind.added('"spec"', dialect, before.deep)
        assert added is not None and "max_retries" in added and "notify" not in added
        other = before.deep.replace("notify", "notifies")
        assert [kind.added('"spec"', dialect, one) for one in (now.deep, other, "")] == [None] * 3, "all is asked"

        bring(connection, jobs, [before if check == now else check for check in checks_of(jobs, dialect)])
        waits = "FROM jobs WHERE name = 'waits'"
        spec = json.loads(connection.exec_driver_sql(f"SELECT CAST(spec AS text) {waits}").scalar_one())
        wrong = json.dumps({**spec, "max_retries": "two"})
        connection.execute(text("UPDATE jobs SET spec = :wrong WHERE name = 'waits'"), {"wrong": wrong})
        hold(connection)
        hold(connection)  # and finds nothing more
        assert connection.exec_driver_sql("SELECT value FROM quarantine").scalars().all() == [wrong]
    with opened(old_url) as engine:
        assert refused(engine, "jobs", "spec", '\'{"max_retries": "two"}\'')
        assert refused(engine, "jobs", "spec", "'{\"notify\": 5}'"), "the whole shape is asked of what is written"


ABSURD = Progress(
    stage=Stage.TRAINING, step=-3, total_steps=2**40, loss=math.nan, tokens_per_second=-math.inf, eta_seconds=1e200,
    eta_spread_seconds=math.inf, evaluated=-1, to_evaluate=2**33, need=Need(lora=-5, qlora=2**60), vram_peak=-1,
    vram_allocated=2**62, vram_process=2**51, base_bytes=-1, resumed_from_step=-1, running=-4,
    metrics=((1, "loss", math.nan), (2, "n" * 65, 1.0), (-1, "loss", 1.0), (4, "a\nb", 1.0), (5, "loss", 0.5)),
    events=(("k" * 40, "bell \a \0 \ud800" + "x" * 99_999),), log="\0\ud800" + "y" * 2_000_000, result_host="box\n",
)  # fmt: skip


def test_a_measurement_that_can_t_be_kept_stops_neither_a_lease_nor_an_end(upgraded_url: str) -> None:
    with opened(upgraded_url) as engine:
        store = Store(engine)
        store.jobs.submit(submission())
        claim = take(store)
        assert isinstance(claim, Claim)
        before = store.jobs.get(claim.job_id).lease_expires_at
        for _ in range(3):
            assert store.attempts.beat(claim, ABSURD).accepted
        row = store.jobs.get(claim.job_id)
        assert before is not None and row.lease_expires_at is not None and row.lease_expires_at > before
        assert (row.stage, row.step, row.loss, row.eta_seconds) == (Stage.TRAINING, None, None, None)
        assert [(point.step, point.value) for point in store.jobs.metrics(claim.job_id, "loss")] == [(5, 0.5)]
        told = [event.text for event in store.jobs.events(claim.job_id) if event.kind == "left out"]
        assert len(told) == 1 and told[0].startswith("no number that can be kept: step -3, total_steps ")
        sha = "0" * 64
        result = StoredResult(adapter_uri="u", report_uri="r", adapter_size=1, adapter_sha256=sha, manifest_sha256=sha)
        done = store.attempts.finish(claim, Reason.OK, "m\0" + "z" * 99_999, ABSURD, result)
        assert done is Status.SUCCEEDED
        assert len(str(store.jobs.get(claim.job_id).message).encode()) <= 16384


def test_a_sensor_that_says_nonsense_does_not_silence_its_card(upgraded_url: str) -> None:
    with opened(upgraded_url) as engine:
        store = Store(engine)
        store.jobs.submit(submission())
        odd = {"load": 2**32, "temperature": -(2**40), "outside": [{"pid": -1}], "device_name": "x\ny" * 200}
        assert isinstance(take(store, **odd), Claim)
        node = store.cards.fleet().nodes["box:0"]
        assert (node.load, node.temperature, node.outside) == (None, None, [])


@pytest.mark.parametrize(
    ("kind", "written", "kept"),
    [
        (Characters(4), "", ""), (Characters(4), "ab cd", "ab c"), (Characters(9), "a\nb\u202ec\0", "a�b�c�"),
        (Characters(9, "latest"), "latest", "latest�"), (Characters(9, "latest"), "later", "later"),
        (Prose(8), "", ""), (Prose(8), "a\n\x1b", "a\n\x1b"), (Prose(8), "ééééé", "éé…"),
        (Prose(8), "12345678", "12345678"),
    ],
)  # fmt: skip
def test_text_is_written_as_its_column_can_hold_it(kind: Characters | Prose, written: str, kept: str) -> None:
    assert kind.harmless(written) == kept and kind.harmless(kept) == kept
