"""Guarded writes of a job's row: each names the state that it expects, and a status follows TRANSITIONS."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Update, update

from loractl.common.job.status import TRANSITIONS, Status

from .records import Claim
from .tables import Job


def change(job_id: int, expected: Status) -> Update:
    """An update of the row while the job has this status."""
    return update(Job).where(Job.job_id == job_id, Job.status == expected)


def mine(claim: Claim) -> Update:
    """The guard of every write of an attempt."""
    return change(claim.job_id, Status.RUNNING).where(Job.token == claim.token)


def move(job_id: int, before: Status, after: Status) -> Update:
    """An update that gives the job its next status."""
    _check(before, after)
    return change(job_id, before).values(status=after)


def become(job: Job, after: Status) -> None:
    """Give a locked row its next status."""
    _check(job.status, after)
    job.status = after


def may_come_back() -> ColumnElement[bool]:
    """Whether the job has ended in a way that lets a person queue it again."""
    ended = [status for status, after in TRANSITIONS.items() if status.is_terminal and Status.QUEUED in after]
    return Job.status.in_(ended)


def _check(before: Status, after: Status) -> None:
    if after not in TRANSITIONS[before]:
        raise AssertionError(f"no job goes from {before.value} to {after.value}")
