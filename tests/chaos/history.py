"""What happened, as the database saw it: triggers write down every change, in the transaction that made it."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, text

_AUDIT = """
CREATE TABLE chaos_audit (
    seq bigserial PRIMARY KEY, tx bigint NOT NULL DEFAULT txid_current(),
    at timestamptz NOT NULL DEFAULT clock_timestamp(), what text NOT NULL, job_id integer NOT NULL, attempt integer,
    kind text, old jsonb, new jsonb
);
CREATE FUNCTION chaos_job() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE old_row jsonb := NULL; new_row jsonb := NULL;
BEGIN
    IF TG_OP <> 'INSERT' THEN old_row := to_jsonb(OLD) - 'spec' - 'planned' - 'data'; END IF;
    IF TG_OP <> 'DELETE' THEN new_row := to_jsonb(NEW) - 'spec' - 'planned' - 'data'; END IF;
    INSERT INTO chaos_audit (what, job_id, attempt, old, new)
        VALUES ('job', COALESCE(NEW.job_id, OLD.job_id), COALESCE(NEW.attempt, OLD.attempt), old_row, new_row);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_job AFTER INSERT OR UPDATE OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION chaos_job();
CREATE FUNCTION chaos_part() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE others text[] := ARRAY['host', 'base_bytes', 'inside', 'shared', 'promised_at',  -- of an attempt: its company
        'lease_expires_at'];  -- and its lease while somebody has the job's row locked
BEGIN
    IF TG_OP = 'INSERT' OR to_jsonb(NEW) - others IS DISTINCT FROM to_jsonb(OLD) - others THEN
        INSERT INTO chaos_audit (what, job_id, attempt, kind)
            VALUES (TG_TABLE_NAME, NEW.job_id, NEW.attempt, to_jsonb(NEW)->>'kind');
    END IF;
    RETURN NULL;
END $$;
"""
_PARTS = ("attempts", "events", "metrics", "log_chunks", "adapters")


def record(engine: Engine) -> None:
    """Put the triggers on the tables."""
    with engine.begin() as connection:
        connection.exec_driver_sql(_AUDIT)
        for table in _PARTS:
            connection.exec_driver_sql(
                f"CREATE TRIGGER chaos_part AFTER INSERT OR UPDATE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION chaos_part()"
            )


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
    host: str | None = None  # the mark of the trainer that it was in
    joined: bool = False  # others trained there already
    shared: bool = False  # others were there with it
    cards: tuple[str, ...] = ()  # of an attempt on several, by rank
    lease_expires_at: dt.datetime | None = None  # by its own row: a beat while somebody had the job's row locked


@dataclass(frozen=True, kw_only=True)
class Window:
    """When the database was away, or a box or its way to the database, or a card's node."""

    start: dt.datetime
    end: dt.datetime
    box: str | None = None  # or a card of it; None: the database itself


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
    bases_changed: int = 0  # under trainings that shared them
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


def read(engine: Engine) -> dict[str, Any]:
    """The database's part of a History."""
    with engine.connect() as connection:

        def rows(query: str) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(text(query)).mappings()]

        attempts = "job_id, attempt, token, node, started_at, ended_at, reason, resumed_from_step, host, joined, shared"
        attempts += ", lease_expires_at, COALESCE(message, '') AS message"
        cards: dict[tuple[int, int], tuple[str, ...]] = {}
        for share in rows("SELECT job_id, attempt, node FROM shares ORDER BY job_id, attempt, rank"):
            key = share["job_id"], share["attempt"]
            cards[key] = (*cards.get(key, ()), share["node"])
        return {
            "jobs": {row["job_id"]: row for row in rows("SELECT * FROM jobs ORDER BY job_id")},
            "adapters": {row["job_id"]: row for row in rows("SELECT * FROM adapters")},
            "attempts": [
                AttemptRow(**row, cards=cards.get((row["job_id"], row["attempt"]), ()))
                for row in rows(f"SELECT {attempts} FROM attempts ORDER BY job_id, attempt")
            ],
            "changes": [
                Change(**row)
                for row in rows("SELECT tx, at, what, job_id, attempt, kind, old, new FROM chaos_audit ORDER BY seq")
            ],
        }
