"""Wishes: a person cancels, holds, retries or edits a job that was submitted before."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import inspect, select

from loractl.common.errors import SweepNotFound, WrongState
from loractl.common.job.status import TRANSITIONS, Reason, Status
from loractl.common.placement.lines import RESULT_FIRST_S
from loractl.common.text import clean_line
from loractl.common.units import LARGEST

from ..attempt_columns import retried
from ..records import Amendment
from ..tables import Job, Sweep
from ..transaction import Transaction
from .changes import change_row, seen
from .jobs import read_job, with_wishes
from .submissions import amend

_TRIES = 5
"""Give up on a row that others change each time before we can."""


def cancel(tx: Transaction, job_id: int, user: str) -> Job:
    """Cancel a waiting job now, or ask a running one's trainer to stop.

    Raises JobNotFound, WrongState when it has ended.
    """
    for _ in range(_TRIES):
        job = read_job(tx, job_id)
        if job.status is Status.RUNNING:
            if change_row(tx, job_id, "cancel", seen(job), {}, user):
                return with_wishes(tx, [job])[0]
        elif job.status is Status.QUEUED:
            over = {"status": Status.CANCELLED, "reason": Reason.CANCELLED, "held": False, "ended_at": tx.now()}
            if change_row(tx, job_id, "cancelled", seen(job), over, user):
                return read_job(tx, job_id)
        else:
            raise WrongState(f"job {job_id} has already {_ended_as(job)}")
    raise _changed(job_id)


def cancel_sweep(tx: Transaction, sweep_id: int, user: str) -> list[Job]:
    """Cancel all members of a sweep that have not ended. Raises SweepNotFound, WrongState when all have."""
    if not 0 < sweep_id <= LARGEST:
        raise SweepNotFound(sweep_id)
    left = select(Job.job_id).where(Job.sweep_id == sweep_id, Job.status.in_([Status.QUEUED, Status.RUNNING]))
    job_ids = tx.session.scalars(left.order_by(Job.job_id)).all()
    if not job_ids and tx.session.get(Sweep, sweep_id) is None:
        raise SweepNotFound(sweep_id)
    if not job_ids:
        raise WrongState(f"all jobs of sweep {sweep_id} have ended")
    return [job for job_id in job_ids if (job := _cancel_if_open(tx, job_id, user)) is not None]


def _cancel_if_open(tx: Transaction, job_id: int, user: str) -> Job | None:
    """A member may end while those before it are cancelled."""
    try:
        return cancel(tx, job_id, user)
    except WrongState:
        if read_job(tx, job_id).status.is_terminal:
            return None
        raise


def hold(tx: Transaction, job_id: int, user: str, reason: str = "") -> Job:
    """Keep a waiting job from starting until `retry`. Raises JobNotFound, WrongState."""
    for _ in range(_TRIES):
        job = read_job(tx, job_id)
        if job.status is not Status.QUEUED:
            what = f"job {job_id} {job.status.in_words}: only a waiting job can be held"
            raise WrongState(what, _back_to_the_queue(job) if job.status is Status.RUNNING else None)
        new = {"held": True} if job.awaits is None else {"held": True, "held_too": True}
        if change_row(tx, job_id, "held", seen(job), new, user, f": {reason}" if reason else ""):
            return read_job(tx, job_id)
    raise _changed(job_id)


def _back_to_the_queue(job: Job) -> str:
    order = f"loractl drain {clean_line(job.node or '')} --now --reason ..."
    return f"{order} requeues it with a checkpoint"


def retry(tx: Transaction, job_id: int, user: str, amendment: Amendment | None = None) -> Job:
    """Queue a failed, cancelled or held job again, with all its retries, and what is to change of it.

    Raises JobNotFound, WrongState.
    """
    for _ in range(_TRIES):
        job = read_job(tx, job_id) if amendment is None else edit(tx, amendment, user)
        if Status.QUEUED not in _after(job):
            done = f"loractl reproduce {job_id} runs it again, loractl submit --like {job_id} queues one like it"
            what = f"job {job_id} {job.status.in_words}: only a failed, cancelled or held job can be retried"
            raise WrongState(what, done if job.status is Status.SUCCEEDED else None)
        if job.status is Status.QUEUED and job.awaits is not None and not job.held_too:
            what = f"job {job_id} waits for job {job.awaits}, nobody holds it"
            raise WrongState(what, f"loractl edit {job_id} --set after=[] lets it start without")
        until = None if job.result_host is None else tx.now() + dt.timedelta(seconds=RESULT_FIRST_S)
        new = {"status": Status.QUEUED, **retried(), "held": job.awaits is not None, "result_until": until}
        if change_row(tx, job_id, "retry", seen(job), new, user):
            return read_job(tx, job_id)
        amendment = None  # it is in the row by now
    raise _changed(job_id)


def _after(job: Job) -> frozenset[Status]:
    """The states that a person may give the job. A held one waits again."""
    if job.status is Status.RUNNING:
        return frozenset()
    return frozenset(TRANSITIONS[job.status]) | ({Status.QUEUED} if job.held else set())


def edit(tx: Transaction, amendment: Amendment, user: str) -> Job:
    """Change what is asked of a job. Raises JobNotFound, WrongState when it has changed since it was looked at."""
    now, job = tx.now(), read_job(tx, amendment.job_id)
    if (job.status, job.attempt, job.spec) != amendment.seen:
        raise _changed(job.job_id)
    expected = {**seen(job), "spec": job.spec, "adjustment": job.adjustment}
    tx.session.expunge(job)  # what is changed here in memory is written below
    amend(tx, job, amendment, now)
    new = {name: one.value for name, one in inspect(job).attrs.items() if one.history.has_changes()}
    if not change_row(tx, job.job_id, "edited", expected, new, user, f": {amendment.text}"):
        raise _changed(job.job_id)
    return read_job(tx, job.job_id)


def _changed(job_id: int) -> WrongState:
    return WrongState(f"job {job_id} has changed meanwhile; try again")


def _ended_as(job: Job) -> str:
    return {Status.SUCCEEDED: "succeeded", Status.FAILED: "failed"}.get(job.status, "been cancelled")
