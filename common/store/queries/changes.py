"""A person's changes of jobs, as they are written: a guarded update on SQLite, a function on PostgreSQL, whose work the
commit does.

A request to cancel a running job is a wish, a row of its own, which the next heartbeat reads: so it waits for nobody
who has locked the job's row.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import delete, exists, select, update
from sqlalchemy import text as sql

from loractl.common.errors import WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.text import clean_line, storable

from ..guard import become
from ..tables import Base, Job, JobLabel, Wish
from ..transaction import SKIP_LOCKED, Overtaken, Transaction
from .lab_settings import refuse_stranger

Answer = TypeVar("Answer")

SAID = {
    "cancel": "cancel asked for", "cancelled": "cancelled", "held": "held", "retry": "queued again", "edited": "edited",
}  # fmt: skip
"""The history's words for each, before the name of the person."""


_ASKS = {"cancel": "cancel", "cancelled": "cancel", "held": "hold", "retry": "retry", "edited": "edit"}


def seen(job: Job) -> dict[str, Any]:
    """The columns that must not have changed between a person's look and the change."""
    return {"status": job.status, "attempt": job.attempt, "held": job.held}


def change_row(
    tx: Transaction,
    job: Job,
    kind: str,
    new: Mapping[str, Any],
    user: str,
    tail: str = "",
    expected: Mapping[str, Any] | None = None,
) -> Job | None:
    """Change a job's row if its columns are still as `seen`, and record who did it; None if they are not.

    Returns the job as it is then: on PostgreSQL when the transaction commits, which raises Overtaken where another
    transaction has changed or locked the row meanwhile. `kind`: one of SAID. `tail`: what the history says after who
    did it. `expected`: other columns to compare."""
    tail = storable(tail).translate({10: " ", 13: " "})  # one line of the history, as loractl_change writes it
    expected = {**seen(job), **(expected or {})}
    said = f"{SAID[kind]} by {user}{tail}"
    over = {**new, "message": said} if kind in ("cancelled", "held") else new
    if tx.has_functions:
        asked = {"number": job.job_id, "kind": kind, "expected": as_json(expected), "new": as_json(new)}
        if not tx.session.scalar(_LORACTL_CHANGE, {**asked, "who": user, "tail": tail}):
            return None
        if job in tx.session:
            tx.session.expunge(job)
        for name, value in over.items() if kind != "cancel" else [("cancel_requested", True)]:
            setattr(job, name, value)
        return job
    refuse_stranger(tx, job.job_id, "release" if kind == "retry" and job.held else _ASKS[kind], user)
    # SQLite has one writer at a time, so that the columns of JSON can't have changed since they were read
    as_read = [getattr(Job, name) == value for name, value in expected.items() if name in ("status", "attempt", "held")]
    if kind == "cancel":
        tx.add_new(Wish, [{"job_id": job.job_id, "user": user, "at": tx.now()}])
    elif not tx.change(update(Job).where(Job.job_id == job.job_id, *as_read).values(**over)):
        return None
    if "labels" in new:
        tx.session.execute(delete(JobLabel).where(JobLabel.job_id == job.job_id))
        tx.session.add_all(JobLabel(job_id=job.job_id, key=key, value=value) for key, value in new["labels"].items())
    tx.tell(job.job_id, None, kind, said)
    tx.session.flush()
    return tx.session.get_one(Job, job.job_id, populate_existing=True)


_LORACTL_CHANGE = sql(
    "SELECT loractl_change(:number, :kind, CAST(:expected AS jsonb), CAST(:new AS json), :who, :tail)"
)


PATIENCE_S = 3.0
"""How long a person's change is tried. A heartbeat or an end holds its row for milliseconds."""

_PAUSE_S = 0.05

_HOLDER = sql(
    "SELECT one.pid, one.usename, one.application_name FROM jobs"
    " JOIN pg_locks AS lock ON lock.locktype = 'transactionid' AND lock.transactionid = jobs.xmax AND lock.granted"
    " JOIN pg_stat_activity AS one ON one.pid = lock.pid WHERE jobs.job_id = :number"
)
"""Whose transaction was the last to lock or to write the row, and is open."""


def persistently(begin: Callable[[], Transaction], work: Callable[[Transaction], Answer]) -> Answer:
    """Do it in a transaction, and again in a new one while its commit is overtaken. Raises WrongState in the end."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            with begin() as tx:
                return work(tx)
        except Overtaken as overtaken:
            if time.monotonic() > end:
                with begin() as tx:
                    raise _why(tx, overtaken) from overtaken
        time.sleep(_PAUSE_S)


def _why(tx: Transaction, overtaken: Overtaken) -> WrongState:
    """Names who keeps a job's row locked, like a psql that was left open."""
    if not overtaken.locked:
        return WrongState(f"{overtaken}; try again")
    holder = tx.session.execute(_HOLDER, {"number": overtaken.job_id}).first()
    who = "another session" if holder is None else f"{holder.usename}'s session {holder.pid}"
    what = f"{who} ({holder.application_name})" if holder is not None and holder.application_name else who
    end = "let it commit" if holder is None else f"let it commit, or end it: SELECT pg_terminate_backend({holder.pid})"
    return WrongState(f"job {overtaken.job_id} is not changed: {clean_line(what)} keeps its row locked", end)


def values_of(row: Base) -> dict[str, Any]:
    """The columns of a new row that have a value."""
    columns = row.__table__.columns
    return {name: value for name, value in vars(row).items() if name in columns and value is not None}


def as_json(columns: Mapping[str, Any]) -> str:
    """As the database's functions read it."""
    return json.dumps(columns, default=_time)


def _time(value: Any) -> str:
    if isinstance(value, dt.datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def answer_wishes(tx: Transaction) -> None:
    """Answer the wishes that no attempt has read: it may have ended, or given its job back, just then.

    For the node on the fleet's round.
    """
    asked = select(Job).where(Job.job_id.in_(select(Wish.job_id)), Job.status != Status.RUNNING).order_by(Job.job_id)
    for job in tx.session.scalars(asked.with_for_update(**SKIP_LOCKED)).all():
        if job.status is Status.QUEUED:
            by = tx.session.scalars(select(Wish.user).where(Wish.job_id == job.job_id).order_by(Wish.at)).first()
            become(job, Status.CANCELLED)
            job.reason, job.held, job.ended_at = Reason.CANCELLED, False, tx.now()
            job.message = f"cancelled by {by or 'a person'}"
            tx.tell(job.job_id, None, "cancelled", job.message)
        forget_wishes(tx, job.job_id)


def is_asked_to_stop(tx: Transaction, job_id: int) -> bool:
    """Whether a person has asked for it."""
    return bool(tx.session.scalar(select(exists().where(Wish.job_id == job_id))))


def forget_wishes(tx: Transaction, job_id: int) -> None:
    tx.session.execute(delete(Wish).where(Wish.job_id == job_id))
