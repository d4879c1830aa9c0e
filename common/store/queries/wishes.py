"""Wishes: a person cancels, holds or retries a job that was submitted before.

Each locks the row first: an attempt that ends at this moment does so before the wish, or after it.
"""

from __future__ import annotations

from sqlalchemy import case, or_, select, update

from loractl.common.errors import SweepNotFound, WrongState
from loractl.common.job.status import Reason, Status
from loractl.common.placement.lines import RESULT_FIRST_S
from loractl.common.text import clean_line, storable
from loractl.common.units import LARGEST

from ..attempt_columns import retried
from ..guard import change, may_come_back, move
from ..records import Amendment
from ..tables import Job, Sweep
from ..transaction import Transaction
from .jobs import read_job
from .submissions import amend


def cancel(tx: Transaction, job_id: int, user: str) -> Job:
    job = read_job(tx, job_id, lock=True)
    said = f"cancelled by {user}"
    if job.status is Status.QUEUED:
        over = {"reason": Reason.CANCELLED, "message": said, "held": False, "ended_at": tx.now()}
        tx.change(move(job_id, Status.QUEUED, Status.CANCELLED).values(**over))
        tx.tell(job_id, None, "cancelled", said)
    elif job.status is Status.RUNNING:
        tx.change(change(job_id, Status.RUNNING).values(cancel_requested=True))
        tx.tell(job_id, None, "cancel", f"cancel asked for by {user}")
    else:
        raise WrongState(f"job {job_id} has already {_ended_as(job)}")
    return read_job(tx, job_id)


def cancel_sweep(tx: Transaction, sweep_id: int, user: str) -> list[Job]:
    if not 0 < sweep_id <= LARGEST:
        raise SweepNotFound(sweep_id)
    left = select(Job.job_id).where(Job.sweep_id == sweep_id, Job.status.in_([Status.QUEUED, Status.RUNNING]))
    job_ids = tx.session.scalars(left.order_by(Job.job_id).with_for_update()).all()
    if not job_ids and tx.session.get(Sweep, sweep_id) is None:
        raise SweepNotFound(sweep_id)
    if not job_ids:
        raise WrongState(f"all jobs of sweep {sweep_id} have ended")
    return [cancel(tx, job_id, user) for job_id in job_ids]


def hold(tx: Transaction, job_id: int, user: str, reason: str) -> Job:
    text = storable(f"held by {user}: {reason}" if reason else f"held by {user}")
    job = read_job(tx, job_id, lock=True)
    if not tx.change(change(job_id, Status.QUEUED).values(held=True, message=text)):
        what = f"job {job_id} {job.status.in_words}: only a waiting job can be held"
        raise WrongState(what, _back_to_the_queue(job) if job.status is Status.RUNNING else None)
    tx.tell(job_id, None, "held", text)
    return read_job(tx, job_id)


def _back_to_the_queue(job: Job) -> str:
    order = f"loractl drain {clean_line(job.node or '')} --now --reason ..."
    return f"{order} gives it back with a checkpoint, and then it waits"


def retry(tx: Transaction, job_id: int, user: str, amendment: Amendment | None = None) -> Job:
    job = read_job(tx, job_id, lock=True) if amendment is None else amend(tx, amendment, user)
    again = (
        update(Job)
        .where(Job.job_id == job_id)
        .where(or_(may_come_back(), (Job.status == Status.QUEUED) & Job.held))
        .values(status=Status.QUEUED, **retried())
        .values(result_until=case((Job.result_host.is_not(None), tx.now_in(RESULT_FIRST_S))))
    )
    if not tx.change(again):
        done = f"loractl reproduce {job_id} runs it again, loractl submit --like {job_id} another one like it"
        what = f"job {job_id} {job.status.in_words}: only a failed, cancelled or held job can be retried"
        raise WrongState(what, done if job.status is Status.SUCCEEDED else None)
    tx.tell(job_id, None, "retry", f"queued again by {user}")
    return read_job(tx, job_id)


def _ended_as(job: Job) -> str:
    return {Status.SUCCEEDED: "succeeded", Status.FAILED: "failed"}.get(job.status, "been cancelled")
