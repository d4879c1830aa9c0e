"""Waiting jobs with a spec that this version can't read: set aside, or left to a worker of a newer version."""

from __future__ import annotations

import datetime as dt
import re

from sqlalchemy import select

from loractl import __version__
from loractl.common.job.status import Reason, Status

from ..guard import become
from ..tables import Event, Job
from ..transaction import Transaction

NEWER_WORKER_DELAY_S = 60.0
"""How long before a job that only a newer worker can read is looked at again."""


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
