"""Rows that this version can't read: set aside, so that they stop no other job."""

from __future__ import annotations

import datetime as dt
import re

from sqlalchemy import or_, select, text

from loractl import __version__
from loractl.common.job.status import Reason, Status

from ..fleet import unreadable
from ..guard import become
from ..records import Aside
from ..tables import Event, Job
from ..transaction import SKIP_LOCKED, Transaction
from .outbox.notices import tell_of_jobs

NEWER_WORKER_DELAY_S = 60.0
"""How long before a job that only a newer worker can read is looked at again."""

AT_ONCE = 1000
"""Waiting jobs that are looked at in one go."""


def set_aside_unreadable(tx: Transaction, after: int | None = None) -> Aside:
    """End waiting jobs whose rows this version can't read, or leave them to a newer worker.

    It looks at a few, after the job numbered `after`; None: from the first. The claim sets aside what the lines meet.
    """
    ready = or_(Job.not_before.is_(None), Job.not_before <= tx.now()), ~Job.held
    waiting = select(*Job.__table__.columns).where(text("status = 'queued'"), *ready).order_by(Job.job_id)
    some = (waiting if after is None else waiting.where(Job.job_id > after)).limit(AT_ONCE)
    rows = tx.session.execute(some).mappings().all()
    found = [row["job_id"] for row in rows if unreadable(dict(row))]
    jobs: list[int] = []
    for job_id in found:
        tx.apart(job_id, lambda job_id=job_id: jobs.extend(look_again(tx, job_id)))  # type: ignore[misc]
    tell_of_jobs(tx, jobs)
    return Aside(jobs=tuple(jobs), after=rows[-1]["job_id"] if len(rows) == AT_ONCE else None)


def look_again(tx: Transaction, job_id: int) -> list[int]:
    """Lock the job's row. If it still waits and can't be read, set it aside; returns the numbers of those set aside."""
    job = tx.session.get(Job, job_id, populate_existing=True, with_for_update=SKIP_LOCKED)
    if job is None or job.status is not Status.QUEUED or not (why := unreadable(vars(job))):
        return []
    set_aside(tx, job, why, tx.now())
    return [job_id]


def set_aside(tx: Transaction, job: Job, what: str, now: dt.datetime) -> None:
    """End a locked, waiting job as bad_spec. If a newer client wrote it, leave it to a newer worker.

    `what`: what can't be read of it.
    """
    what = f"this worker's loractl does not understand {what}"
    if job.version is not None and _release(job.version) > _release(__version__):
        job.not_before = now + dt.timedelta(seconds=NEWER_WORKER_DELAY_S)
        job.message = f"written by loractl {job.version}, a worker with {__version__} can't read it"
        _tell_once(tx, job.job_id, f"{what}; left to a worker with {job.version}")
        return
    become(job, Status.FAILED)
    job.reason, job.message, job.ended_at, job.held = Reason.BAD_SPEC, what, now, False
    tx.tell(job.job_id, None, job.status.value, what)


def _tell_once(tx: Transaction, job_id: int, text: str) -> None:
    """A worker looks at such a job every minute: one line for each that has another reason is enough."""
    said = select(Event.event_id).where(Event.job_id == job_id, Event.kind == "version", Event.text == text).limit(1)
    if tx.session.scalar(said) is None:
        tx.tell(job_id, None, "version", text)


def _release(version: str) -> tuple[int, ...]:
    """0.2.1 as (0, 2, 1), without what follows the numbers."""
    numbers = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
