"""A person's changes of jobs, as they are written: a guarded update on SQLite, a function on PostgreSQL.

On PostgreSQL a request to cancel a running job is a wish, a row of its own, which the next heartbeat reads: so it waits
for nobody who has locked the job's row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, exists, select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import OperationalError

from loractl.common.errors import WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.text import clean_line, storable

from ..database import LOCK_NOT_FREE
from ..tables import Job, JobLabel, Wish
from ..transaction import SKIP_LOCKED, Transaction

_SAID = {
    "cancel": "cancel asked for", "cancelled": "cancelled", "held": "held", "retry": "queued again", "edited": "edited",
}  # fmt: skip
"""The history's words for each, before the name of the person."""


def seen(job: Job) -> dict[str, Any]:
    """The columns that must not have changed between a person's look and the change."""
    return {"status": job.status, "attempt": job.attempt, "held": job.held}


def change_row(
    tx: Transaction,
    job_id: int,
    kind: str,
    expected: Mapping[str, Any],
    new: Mapping[str, Any],
    user: str,
    tail: str = "",
) -> bool:
    """Change a job's row if its columns are still as expected, and record who did it; False if they are not.

    `kind`: one of _SAID. `tail`: what the history says after who did it."""
    tail = storable(tail)
    if tx.has_functions:
        asked = {"number": job_id, "kind": kind, "expected": _as_json(expected), "new": _as_json(new)}
        return _ask_function(tx, job_id, {**asked, "who": user, "tail": tail})
    said = f"{_SAID[kind]} by {user}{tail}"
    if kind == "cancel":  # no wish: here nobody keeps a row locked, and a worker of an earlier version reads this, too
        new = {"cancel_requested": True}
    elif kind in ("cancelled", "held"):
        new = {**new, "message": said}
    # SQLite has one writer at a time, so that the columns of JSON can't have changed since they were read
    as_read = [getattr(Job, name) == value for name, value in expected.items() if name in ("status", "attempt", "held")]
    if not tx.change(update(Job).where(Job.job_id == job_id, *as_read).values(**new)):
        return False
    if "labels" in new:
        tx.session.execute(delete(JobLabel).where(JobLabel.job_id == job_id))
        tx.session.add_all(JobLabel(job_id=job_id, key=key, value=value) for key, value in new["labels"].items())
    tx.tell(job_id, None, kind, said)
    tx.session.flush()
    return True


_LORACTL_CHANGE = sql(
    "SELECT loractl_change(:number, :kind, CAST(:expected AS jsonb), CAST(:new AS json), :who, :tail)"
)


PATIENCE_MS = 3000
"""How long a person's change waits for the job's row. A heartbeat or an end holds it for milliseconds."""

_HOLDER = sql(
    "SELECT one.pid, one.usename, one.application_name FROM jobs"
    " JOIN pg_locks AS lock ON lock.locktype = 'transactionid' AND lock.transactionid = jobs.xmax AND lock.granted"
    " JOIN pg_stat_activity AS one ON one.pid = lock.pid WHERE jobs.job_id = :number"
)
"""Whose transaction was the last to lock or to write the row, and is open."""


def _ask_function(tx: Transaction, job_id: int, asked: Mapping[str, Any]) -> bool:
    """Raises WrongState where somebody keeps the job's row locked, like a psql that was left open."""
    try:
        with tx.session.begin_nested():
            tx.session.execute(sql(f"SET LOCAL lock_timeout = {PATIENCE_MS}"))
            return bool(tx.session.scalar(_LORACTL_CHANGE, asked))
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_FREE:
            raise
        holder = tx.session.execute(_HOLDER, {"number": job_id}).first()
    who = "another session" if holder is None else f"{holder.usename}'s session {holder.pid}"
    what = f"{who} ({holder.application_name})" if holder is not None and holder.application_name else who
    end = "let it commit" if holder is None else f"let it commit, or end it: SELECT pg_terminate_backend({holder.pid})"
    raise WrongState(f"job {job_id} is not changed: {clean_line(what)} keeps its row locked", end)


def _as_json(columns: Mapping[str, Any]) -> str:
    return json.dumps(columns, default=lambda moment: moment.isoformat())


def answer_wishes(tx: Transaction) -> None:
    """Answer the wishes that no heartbeat has read: the job may have ended, or waited again, just then.

    For the node on the fleet's round.
    """
    asked = select(Job).where(Job.job_id.in_(select(Wish.job_id))).order_by(Job.job_id)
    for job in tx.session.scalars(asked.with_for_update(**SKIP_LOCKED)).all():
        if job.status is Status.RUNNING:
            job.cancel_requested = True
            continue
        if job.status is Status.QUEUED:
            by = tx.session.scalars(select(Wish.user).where(Wish.job_id == job.job_id).order_by(Wish.at)).first()
            over = {"status": Status.CANCELLED, "reason": Reason.CANCELLED, "held": False, "ended_at": tx.now()}
            change_row(tx, job.job_id, "cancelled", seen(job), over, by or "a person")
        forget_wishes(tx, job.job_id)


def is_asked_to_stop(tx: Transaction, job_id: int) -> bool:
    """Whether a person has asked for it and no heartbeat has read it yet."""
    return bool(tx.session.scalar(select(exists().where(Wish.job_id == job_id))))


def forget_wishes(tx: Transaction, job_id: int) -> None:
    tx.session.execute(delete(Wish).where(Wish.job_id == job_id))
