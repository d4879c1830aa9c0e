"""Submission: new jobs, alone or as the members of a sweep, and later changes of what they ask."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loractl import __version__
from loractl.common.job.method import Method
from loractl.common.job.status import Status
from loractl.common.job.sweep import NewSweep
from loractl.common.memory.engine import ENGINE

from ..records import Amendment, Submission
from ..tables import Job, JobLabel, Sweep
from ..transaction import Transaction
from .backlog import line_up
from .followers import block, first_awaited


def submit(tx: Transaction, submission: Submission) -> int:
    """Write a QUEUED job; its number is durable when this returns."""
    return submit_all(tx, [submission])[0]


def submit_all(tx: Transaction, submissions: Sequence[Submission]) -> list[int]:
    """Write all of these as QUEUED jobs, or none. One may name those before it."""
    from loractl.common.job.ancestor import with_numbers

    now, job_ids = tx.now(), []
    numbers: dict[str, int] = {}
    for submission in submissions:
        named = replace(submission, spec=with_numbers(submission.spec, numbers))
        job_ids.append(_queue(tx, named, now))
        numbers[submission.spec.name] = job_ids[-1]
    return job_ids


def submit_sweep(tx: Transaction, sweep: NewSweep, members: Sequence[Submission]) -> int:
    """Write all members of a sweep as QUEUED jobs, or none; returns the sweep's number."""
    now = tx.now()
    settings = {"varied": dict(sweep.varied), "trials": sweep.trials, "seed": sweep.seed}
    rungs = None if sweep.rungs is None else list(sweep.rungs)
    row = Sweep(name=sweep.name, user=sweep.user, settings=settings, rungs=rungs, created_at=now)
    tx.session.add(row)
    tx.session.flush()
    for member in members:
        _queue(tx, member, now, row.sweep_id)
    return row.sweep_id


def amend(tx: Transaction, job: Job, amendment: Amendment, now: dt.datetime) -> None:
    """Give a job's columns in memory what is asked of it now."""
    submission = amendment.submission
    for name, value in _asked(submission).items():
        setattr(job, name, value)
    if job.status is not Status.RUNNING:
        _block(tx, job, submission)
        job.lora_until = _lora_until(submission, now)
    job.gangs = submission.ways.as_json()
    job.checkpoint_s = None  # it may save more often now
    if amendment.planned_anew or amendment.new_batch:
        job.adjustment = None  # it was made for another batch
    if amendment.planned_anew:
        for name, value in _planned(submission).items():
            setattr(job, name, value)
    line_up(job, submission.spec.resources.node_labels, now)


def _queue(tx: Transaction, submission: Submission, now: dt.datetime, sweep_id: int | None = None) -> int:
    job = _row(submission, now, sweep_id)
    _block(tx, job, submission)
    line_up(job, submission.spec.resources.node_labels, now)
    tx.session.add(job)
    tx.session.flush()
    tx.session.add_all(JobLabel(job_id=job.job_id, key=key, value=value) for key, value in job.labels.items())
    why = f", {submission.purpose}" if submission.purpose else ""
    why += "" if sweep_id is None else f" as a member of sweep {sweep_id}"
    tx.tell(job.job_id, None, "queued", f"queued by {submission.user}{why}")
    return job.job_id


def _block(tx: Transaction, job: Job, submission: Submission) -> None:
    """Let the job wait for the first of its `after` that is not over. All have numbers below its own: no ring."""
    after = [one for one in submission.spec.after if isinstance(one, int)]
    block(job, first_awaited(tx, after, any_end=submission.spec.after_any))
    begun = submission.spec.lora.init_from
    if not isinstance(begun, str | None) and begun.sweep is not None and job.awaits is None:
        block(job, after[-1])  # the fleet's round names the sweep's best, which a person's login may not


def _row(submission: Submission, now: dt.datetime, sweep_id: int | None) -> Job:
    return Job(
        **_asked(submission),
        **_planned(submission),
        user=submission.user,
        base_model=submission.spec.base_model,
        data=submission.data,
        adjustment=submission.adjustment.as_json() or None,
        lora_until=_lora_until(submission, now),
        status=Status.QUEUED,
        submitted_at=now,
        sweep_id=sweep_id,
    )


def _asked(submission: Submission) -> dict[str, Any]:
    """The columns that say what is asked for, apart from its data."""
    from loractl.common.job.identity import spec_digest

    spec = submission.spec
    return {
        "name": spec.name,
        "labels": dict(spec.labels),
        "spec": spec.model_dump(mode="json"),
        "spec_hash": spec_digest(spec),
        "priority": spec.priority,
        "methods": [method.value for method in submission.methods],
        "preemptible": spec.preemptible,
        "version": __version__,
        "max_retries": spec.max_retries,
    }


def _planned(submission: Submission) -> dict[str, Any]:
    """The columns that say what it needs."""
    return {
        "vram_lora": submission.need.lora,
        "vram_qlora": submission.need.qlora,
        "planned": vars(submission.planned),
        "gangs": submission.ways.as_json(),
        "roomy": submission.roomy.as_json(),
        "need_key": submission.need_key,
        "family": submission.family,
        "engine": ENGINE,
    }


def _lora_until(submission: Submission, now: dt.datetime) -> dt.datetime | None:
    patience = submission.spec.lora_patience
    if patience is None or submission.methods != (Method.LORA, Method.QLORA):
        return None
    return now + dt.timedelta(seconds=patience)
