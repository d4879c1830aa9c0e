"""What happened, as the database saw it: triggers write down every change, in the transaction that made it."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from sqlalchemy import Column, Engine, select, text

from loractl.common.store.columns import Json, UtcDateTime
from loractl.common.store.tables import Base

_AUDIT = """
CREATE TABLE chaos_audit (
    seq bigserial PRIMARY KEY, tx bigint NOT NULL DEFAULT txid_current(),
    at timestamptz NOT NULL DEFAULT clock_timestamp(), what text NOT NULL, job_id integer NOT NULL, attempt integer,
    kind text, old jsonb, new jsonb
);
CREATE FUNCTION chaos_job() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE old_row jsonb := NULL; new_row jsonb := NULL;
BEGIN
    IF TG_OP <> 'INSERT' THEN old_row := to_jsonb(OLD) - 'spec' - 'planned' - 'data'; END IF;
    IF TG_OP <> 'DELETE' THEN new_row := to_jsonb(NEW) - 'spec' - 'planned' - 'data'; END IF;
    INSERT INTO chaos_audit (what, job_id, attempt, old, new)
        VALUES ('job', COALESCE(NEW.job_id, OLD.job_id), COALESCE(NEW.attempt, OLD.attempt), old_row, new_row);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_job AFTER INSERT OR UPDATE OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION chaos_job();
CREATE FUNCTION chaos_part() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP = 'INSERT' OR to_jsonb(NEW) - 'lease_expires_at' IS DISTINCT FROM to_jsonb(OLD) - 'lease_expires_at' THEN
        -- an attempt writes its lease alone while somebody has the job's row locked
        INSERT INTO chaos_audit (what, job_id, attempt, kind)
            VALUES (TG_TABLE_NAME, NEW.job_id, NEW.attempt, to_jsonb(NEW)->>'kind');
    END IF;
    RETURN NULL;
END $$;
"""
_SQLITE_AUDIT = """
CREATE TABLE chaos_audit (
    seq integer PRIMARY KEY, at text NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    what text NOT NULL, job_id integer NOT NULL, attempt integer, kind text, old text, new text
);
CREATE TRIGGER chaos_job_1 AFTER INSERT ON jobs BEGIN
    INSERT INTO chaos_audit (what, job_id, attempt, new) VALUES ('job', NEW.job_id, NEW.attempt, {new}); END;
CREATE TRIGGER chaos_job_2 AFTER UPDATE ON jobs BEGIN
    INSERT INTO chaos_audit (what, job_id, attempt, old, new)
        VALUES ('job', NEW.job_id, NEW.attempt, {old}, {new}); END;
CREATE TRIGGER chaos_job_3 AFTER DELETE ON jobs BEGIN
    INSERT INTO chaos_audit (what, job_id, attempt, old) VALUES ('job', OLD.job_id, OLD.attempt, {old}); END;
"""
_SQLITE_PART = """
CREATE TRIGGER chaos_{table}_1 AFTER INSERT ON {table} BEGIN
    INSERT INTO chaos_audit (what, job_id, attempt, kind) VALUES ('{table}', NEW.job_id, NEW.attempt, {kind}); END;
CREATE TRIGGER chaos_{table}_2 AFTER UPDATE ON {table} WHEN {changed} BEGIN
    INSERT INTO chaos_audit (what, job_id, attempt, kind) VALUES ('{table}', NEW.job_id, NEW.attempt, {kind}); END;
"""
_BULKY = ("spec", "planned", "data")
"""Of a job: what the triggers leave out."""

_LEASE = "lease_expires_at"
"""Of an attempt: see the triggers of PostgreSQL."""

TRANSACTION_S = 1.0
"""SQLite has no number of a transaction. One writer at a time writes, so what follows at once, or within so long on the
same job, is taken for the same: a stale write so soon after the end of its attempt would not be found."""

_PARTS = ("attempts", "events", "metrics", "log_chunks", "adapters")


def record(engine: Engine) -> None:
    """Put the triggers on the tables."""
    if engine.dialect.name == "sqlite":
        _record_in_sqlite(engine)
        return
    with engine.begin() as connection:
        connection.exec_driver_sql(_AUDIT)
        for table in _PARTS:
            connection.exec_driver_sql(
                f"CREATE TRIGGER chaos_part AFTER INSERT OR UPDATE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION chaos_part()"
            )


def _record_in_sqlite(engine: Engine) -> None:
    def row(name: str) -> str:
        """SQLite makes no JSON of a whole row, and a function of it takes 127 values."""

        def value(column: Column[Any]) -> str:
            found = f'{name}."{column.name}"'
            if isinstance(column.type, Json):
                return f"json({found})"
            return f"{found} || '+00:00'" if isinstance(column.type, UtcDateTime) else found

        columns = [column for column in Base.metadata.tables["jobs"].columns if column.name not in _BULKY]
        first = ", ".join(f"'{column.name}', {value(column)}" for column in columns[:50])
        rest = ", ".join(f"'$.{column.name}', {value(column)}" for column in columns[50:])
        return f"json_set(json_object({first}), {rest})"

    said = [_SQLITE_AUDIT.format(old=row("OLD"), new=row("NEW"))]
    for table in _PARTS:
        columns = [column.name for column in Base.metadata.tables[table].columns if column.name != _LEASE]
        changed = " OR ".join(f"NEW.{column} IS NOT OLD.{column}" for column in columns)
        kind = "NEW.kind" if "kind" in columns else "NULL"
        said.append(_SQLITE_PART.format(table=table, changed=changed, kind=kind))
    connection = engine.raw_connection()
    connection.executescript("".join(said))  # type: ignore[attr-defined]  # sqlite3's own
    connection.close()


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row that was written: a job's before and after, or that an attempt's row was written in another table."""

    tx: int
    at: dt.datetime
    what: str  # job, or a table's name
    job_id: int
    attempt: int | None = None
    kind: str | None = None  # of an event
    old: dict[str, Any] | None = None
    new: dict[str, Any] | None = None


_CHANGE = tuple(one.name for one in fields(Change))


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    job_id: int
    attempt: int
    token: str
    node: str
    started_at: dt.datetime
    ended_at: dt.datetime | None
    reason: str | None
    resumed_from_step: int | None = None
    message: str = ""
    cards: tuple[str, ...] = ()  # of an attempt on several, by rank
    lease_expires_at: dt.datetime | None = None  # by its own row: a beat while somebody had the job's row locked


@dataclass(frozen=True, kw_only=True)
class Window:
    """When the database was away, or a box or its way to the database, or a card's node, or a job's row was held."""

    start: dt.datetime
    end: dt.datetime
    box: str | None = None  # or a card of it; None: the database itself
    job: int | None = None  # whose row nobody else could have


@dataclass(frozen=True, kw_only=True)
class Span:
    """From when until when a fault was active; what was killed is so until it is back."""

    kind: str
    start: dt.datetime
    end: dt.datetime


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An attempt of which a node, a box or a rank was hit."""

    at: dt.datetime
    job_id: int
    attempt: int
    final: bool  # it can't go on
    rank: bool = False  # one of its ranks alone was killed


@dataclass(frozen=True, kw_only=True)
class Act:
    """What a person asked for while faults were active."""

    kind: str  # edit, hold, retry, tag, gc
    job_id: int  # 0: no one job
    asked_at: dt.datetime
    over_at: dt.datetime | None = None  # when the answer came; None: it never did
    acknowledged: bool = False  # False: refused, or nobody knows
    key: str = ""  # of an edit, dotted
    value: float = 0  # of that key


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A promise that was not kept."""

    promise: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A process of an attempt, as it was seen at last."""

    run: str  # the mark of the attempt
    pid: int
    at: dt.datetime


@dataclass(frozen=True, kw_only=True)
class History:
    """All that the checker looks at."""

    printed: list[int]  # numbers that submit printed
    cancelled: dict[int, dt.datetime]  # job -> when the cancel was acknowledged
    jobs: dict[int, dict[str, Any]]  # the rows at the end
    attempts: list[AttemptRow]
    adapters: dict[int, dict[str, Any]]
    changes: list[Change]
    lease_s: float
    hits: tuple[Hit, ...] = ()
    sightings: tuple[Sighting, ...] = ()
    acts: tuple[Act, ...] = ()
    asked: frozenset[int] = frozenset()  # jobs that somebody wished to cancel, whether it was acknowledged or not
    trainers_killed: int = 0
    torn: frozenset[str] = frozenset()  # stored checkpoints that the suite damaged
    windows: tuple[Window, ...] = ()
    spans: tuple[Span, ...] = ()
    boxes: frozenset[str] = frozenset()
    poisoned: frozenset[int] = frozenset()  # jobs whose loss is not a number
    bad: frozenset[str] = frozenset()  # boxes whose cards failed every job for a time
    artifacts: dict[int, str] = field(default_factory=dict)  # succeeded job -> what is wrong with its artifacts
    left: tuple[str, ...] = ()  # processes of an attempt that outlived it
    stuck: tuple[str, ...] = ()  # what had not ended when the run was given up

    def of_job(self) -> dict[int, list[Change]]:
        found: dict[int, list[Change]] = {}
        for change in self.changes:
            if change.what == "job":
                found.setdefault(change.job_id, []).append(change)
        return found


def changes(engine: Engine) -> list[Change]:
    """What was written so far, in its order."""
    with engine.connect() as connection:
        audit = [dict(row) for row in connection.execute(text("SELECT * FROM chaos_audit ORDER BY seq")).mappings()]
    if engine.dialect.name == "sqlite":
        _number_transactions(audit)
    return [Change(**{name: row[name] for name in _CHANGE}) for row in audit]


def read(engine: Engine) -> dict[str, Any]:
    """The database's part of a History."""
    written = changes(engine)  # first: one connection at a time writes to SQLite, and each may
    with engine.connect() as connection:

        def rows(table: str, *order: str) -> list[dict[str, Any]]:
            of = Base.metadata.tables[table]
            found = connection.execute(select(of).order_by(*(of.columns[name] for name in order))).mappings()
            return [{k: v.value if isinstance(v, Enum) else v for k, v in row.items()} for row in found]

        cards: dict[tuple[int, int], tuple[str, ...]] = {}
        for share in rows("shares", "job_id", "attempt", "rank"):
            key = share["job_id"], share["attempt"]
            cards[key] = (*cards.get(key, ()), share["node"])
        columns = [one.name for one in fields(AttemptRow) if one.name not in ("cards", "message")]
        return {
            "jobs": {row["job_id"]: row for row in rows("jobs", "job_id")},
            "adapters": {row["job_id"]: row for row in rows("adapters")},
            "attempts": [
                AttemptRow(
                    **{name: row[name] for name in columns},
                    message=row["message"] or "",
                    cards=cards.get((row["job_id"], row["attempt"]), ()),
                )
                for row in rows("attempts", "job_id", "attempt")
            ],
            "changes": written,
        }


def _number_transactions(audit: list[dict[str, Any]]) -> None:
    """Give SQLite's rows their numbers of transactions, and their texts their types."""
    last: dict[int, dict[str, Any]] = {}  # of each job
    for row in audit:
        row["at"] = dt.datetime.fromisoformat(row["at"]).replace(tzinfo=dt.UTC)
        row |= {name: json.loads(row[name]) for name in ("old", "new") if row[name] is not None}
        before = last.get(row["job_id"])
        near = before is not None and (row["at"] - before["at"]).total_seconds() <= TRANSACTION_S
        same = before is not None and (near or before["seq"] == row["seq"] - 1)
        row["tx"] = before["tx"] if before is not None and same else row["seq"]
        last[row["job_id"]] = row
