"""Guarded writes of a job's row: each names the state that it expects, and a status follows TRANSITIONS.

The columns that belong to an attempt are in groups, which its start, its end and a retry clear. A nullable column that
an attempt writes and the next attempt must not see belongs in one of them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Update, update

from loractl.common.job.status import TRANSITIONS, Status

from .records import Claim
from .tables import Job

RIGHT = ("token", "lease_expires_at", "vram_reserved", "stage", "preempted_by")
"""Their values say which attempt runs."""

EXPECTED = ("eta_seconds", "eta_spread_seconds", "evaluated", "to_evaluate")
"""When it will end, and how far its evaluation is. An ended attempt has no expected end."""

REACHED = ("step", "total_steps", "loss", "tokens_per_second")
"""How far it came. A person reads it until the next attempt begins."""

VERDICT = ("reason", "message", "not_before")
"""How the last attempt ended, and how long the next one waits for it."""

LIFE = {
    "held": False, "retries_used": 0, "lab_failures": 0, "lab_step": None,
    "avoids": None, "ended_at": None,
}  # fmt: skip
"""Cleared by a person's retry alone."""


def begun() -> dict[str, Any]:
    """Cleared when an attempt begins, before it writes its own values."""
    return dict.fromkeys((*EXPECTED, *REACHED, *VERDICT))


def ended() -> dict[str, Any]:
    """Cleared when an attempt ends, before it writes how."""
    return dict.fromkeys((*RIGHT, *EXPECTED))


def retried() -> dict[str, Any]:
    """Cleared by a person's retry. RIGHT and EXPECTED are not in it: every end has cleared them.

    PostgreSQL's role that submits may write no other columns (docs/deploy.md).
    """
    return {**dict.fromkeys((*REACHED, *VERDICT)), **LIFE}


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


def _check(before: Status, after: Status) -> None:
    if after not in TRANSITIONS[before]:
        raise AssertionError(f"no job goes from {before.value} to {after.value}")
