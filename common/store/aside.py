"""Rows that this version can't read: set aside, so that they stop no other job."""

from __future__ import annotations

import datetime as dt
import re

from sqlalchemy import ColumnElement, Text, cast, or_, select

from loractl import __version__
from loractl.common.job.status import Reason, Status
from loractl.common.text import storable

from .fleet import unreadable
from .guard import become
from .tables import Event, Job
from .transaction import SKIP_LOCKED, Transaction

NEWER_WORKER_DELAY_S = 60.0
"""A job that only a newer worker can read is looked at again after so long."""

_AT_ONCE = 100
_METHODS = ('["lora"]', '["qlora"]', '["lora", "qlora"]', '["qlora", "lora"]', "[]")
_READ = (Job.job_id, Job.methods, Job.queue_key, Job.submitted_at, Job.gangs)


def set_aside_unreadable(tx: Transaction) -> list[int]:
    found = _unreadable_jobs(tx)
    return [job_id for job_id in found if tx.apart(job_id, lambda job_id=job_id: _look_again(tx, job_id))]  # type: ignore[misc]


def _unreadable_jobs(tx: Transaction) -> list[int]:
    """Waiting jobs whose rows the placement rule can't read; the database looks, and Python only where it must."""
    now = tx.now()
    years = (dt.datetime(2000, 1, 1, tzinfo=dt.UTC), dt.datetime(9000, 1, 1, tzinfo=dt.UTC))
    odd = or_(
        cast(Job.methods, Text).not_in(_METHODS),
        _no_key(tx),
        Job.submitted_at < years[0],
        Job.submitted_at > years[1],
    )
    waits = (Job.status == Status.QUEUED, or_(Job.not_before.is_(None), Job.not_before <= now))
    suspects = tx.session.execute(select(*_READ).where(*waits, odd).order_by(Job.job_id).limit(_AT_ONCE))
    return [row.job_id for row in suspects.mappings() if unreadable(dict(row))]


def _look_again(tx: Transaction, job_id: int) -> None:
    """Set the job aside if its row, locked, still waits and can't be read."""
    job = tx.session.get(Job, job_id, populate_existing=True, with_for_update=SKIP_LOCKED)
    if job is not None and job.status is Status.QUEUED and (why := unreadable(vars(job))):
        set_aside(tx, job, why, tx.now())


def set_aside(tx: Transaction, job: Job, what: str, now: dt.datetime) -> None:
    """End a locked, waiting job as bad_spec. If a newer client wrote it, leave it to a newer worker.

    `what`: what can't be read of it.
    """
    what = storable(f"this worker's loractl does not understand {what}")
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


def _no_key(tx: Transaction) -> ColumnElement[bool]:
    """Whether a row's queue_key is none: its size step is no number, or its labels are no JSON object at a glance."""
    labels = (Job.queue_key.like("%|%|{%"), Job.queue_key.not_like('%|%|{"%"}|%'))
    if tx.session.get_bind().dialect.name == "postgresql":
        return or_(Job.queue_key.op("!~")(r"^[^|]*\|[0-9]+\|"), labels[0] & labels[1])
    return or_(Job.queue_key.op("NOT GLOB")("*|[0-9]*|*"), labels[0] & labels[1])


def _release(version: str) -> tuple[int, ...]:
    """0.2.1 as (0, 2, 1), without what follows the numbers."""
    numbers = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
