"""Submission: new jobs, alone or as the members of a sweep."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from loractl import __version__
from loractl.common.job.method import Method
from loractl.common.job.status import Status
from loractl.common.job.sweep import NewSweep

from ..records import Submission
from ..tables import Job, Sweep
from ..transaction import Transaction
from .backlog import line_up


def submit(tx: Transaction, submission: Submission) -> int:
    return _queue(tx, submission, tx.now())


def submit_sweep(tx: Transaction, sweep: NewSweep, members: Sequence[Submission]) -> int:
    now = tx.now()
    settings = {"varied": dict(sweep.varied), "trials": sweep.trials, "seed": sweep.seed}
    rungs = None if sweep.rungs is None else list(sweep.rungs)
    row = Sweep(name=sweep.name, user=sweep.user, settings=settings, rungs=rungs, created_at=now)
    tx.session.add(row)
    tx.session.flush()
    for member in members:
        _queue(tx, member, now, row.sweep_id)
    return row.sweep_id


def _queue(tx: Transaction, submission: Submission, now: dt.datetime, sweep_id: int | None = None) -> int:
    job = _row(submission, now, sweep_id)
    line_up(job, submission.spec.resources.node_labels, now)
    tx.session.add(job)
    tx.session.flush()
    why = f", {submission.purpose}" if submission.purpose else ""
    why += "" if sweep_id is None else f" as a member of sweep {sweep_id}"
    tx.tell(job.job_id, None, "queued", f"queued by {submission.user}{why}")
    return job.job_id


def _row(submission: Submission, now: dt.datetime, sweep_id: int | None) -> Job:
    from loractl.common.job.identity import spec_digest

    spec, until = submission.spec, None
    if spec.lora_patience is not None and submission.methods == (Method.LORA, Method.QLORA):
        until = now + dt.timedelta(seconds=spec.lora_patience)
    return Job(
        name=spec.name,
        user=submission.user,
        labels=dict(spec.labels),
        spec=spec.model_dump(mode="json"),
        spec_hash=spec_digest(spec),
        base_model=spec.base_model,
        data=submission.data,
        priority=spec.priority,
        vram_lora=submission.need.lora,
        vram_qlora=submission.need.qlora,
        planned=vars(submission.planned),
        adjustment=submission.adjustment.as_json() or None,
        methods=[method.value for method in submission.methods],
        lora_until=until,
        need_key=submission.need_key,
        family=submission.family,
        preemptible=spec.preemptible,
        version=__version__,
        max_retries=spec.max_retries,
        status=Status.QUEUED,
        submitted_at=now,
        sweep_id=sweep_id,
    )
