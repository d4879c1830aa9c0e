"""What people ask: new jobs, alone or as members of a sweep, and later to cancel, hold, retry or edit them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from sqlalchemy import Table, inspect, select
from sqlalchemy import text as sql

from loractl import __version__
from loractl.common.errors import SweepNotFound, ValueRefused, WrongState
from loractl.common.job.method import Method
from loractl.common.job.status import TRANSITIONS, Reason, Status
from loractl.common.job.sweep import NewSweep, setting
from loractl.common.memory.correction import ENGINE
from loractl.common.placement.duration import extent_of
from loractl.common.placement.lines import RESULT_FIRST_S
from loractl.common.text import clean_line, storable
from loractl.common.units import LAST_NUMBER

from ..columns import misfits
from ..guard import retried
from ..records import Amendment, Submission
from ..tables import Job, JobLabel, Sweep
from ..transaction import Transaction
from .backlog import line_up
from .changes import as_json, change_row, seen, values_of
from .durations import Forecasts
from .followers import first_awaited
from .jobs import read_job


def submit(tx: Transaction, submission: Submission) -> int:
    """Write a QUEUED job; its number is durable when this returns."""
    return submit_all(tx, [submission])[0]


def submit_all(tx: Transaction, submissions: Sequence[Submission]) -> list[int]:
    """Write all of these as QUEUED jobs, or none. One may name those before it."""
    from loractl.common.job.ancestor import with_numbers

    now, job_ids = tx.now(), []
    forecasts = Forecasts(tx, now)
    numbers: dict[str, int] = {}
    for submission in submissions:
        named = replace(submission, spec=with_numbers(submission.spec, numbers))
        job_ids.append(_queue(tx, named, forecasts, now))
        numbers[submission.spec.name] = job_ids[-1]
    return job_ids


def submit_sweep(tx: Transaction, sweep: NewSweep, members: Sequence[Submission]) -> int:
    """Write all members of a sweep as QUEUED jobs, or none; returns the sweep's number."""
    now = tx.now()
    settings = {"varied": dict(sweep.varied), "trials": sweep.trials, "seed": sweep.seed}
    rungs = None if sweep.rungs is None else list(sweep.rungs)
    row = Sweep(name=sweep.name, user=members[0].user, settings=settings, rungs=rungs, created_at=now)
    sweep_id = _write(tx, row, {"sweep": values_of(row)})
    forecasts = Forecasts(tx, now)
    for member in members:
        _queue(tx, member, forecasts, now, sweep_id)
    return sweep_id


def amend(tx: Transaction, job: Job, amendment: Amendment, now: dt.datetime) -> None:
    """Give a job's columns in memory what is asked of it now."""
    submission, waited = amendment.submission, _waits(job)
    for name, value in _asked(submission).items():
        setattr(job, name, value)
    if job.status is not Status.RUNNING:
        if _waits(job) != waited:  # else a released job would wait again, and choose another adapter to begin from
            _block(tx, job, submission)
        job.lora_until = _lora_until(submission, now)
    job.gangs = submission.ways.as_json()
    job.checkpoint_s = None  # it may save more often now
    if submission.spec.training.dtype != "auto":
        job.begun_bf16 = None
    if amendment.replanned or amendment.new_batch:
        job.adjustment = None  # it was made for another batch
    if amendment.replanned:
        for name, value in _planned(submission).items():
            setattr(job, name, value)
    job.extent = _extent(submission)
    Forecasts(tx, now).write(job)
    line_up(job, submission.spec.resources.node_labels, now)


def _queue(
    tx: Transaction, submission: Submission, forecasts: Forecasts, now: dt.datetime, sweep_id: int | None = None
) -> int:
    job = _row(submission, now, sweep_id)
    forecasts.write(job)
    _block(tx, job, submission)
    line_up(job, submission.spec.resources.node_labels, now)
    why = f", {submission.purpose}" if submission.purpose else ""
    why += "" if sweep_id is None else f" as a member of sweep {sweep_id}"
    job_id = _write(tx, job, {"job": values_of(job), "why": storable(why)})
    if not tx.has_functions:
        tx.session.add_all(JobLabel(job_id=job_id, key=key, value=value) for key, value in job.labels.items())
        tx.tell(job_id, None, "queued", f"queued by {submission.user}{why}")
    return job_id


def _write(tx: Transaction, row: Job | Sweep, document: Mapping[str, Any]) -> int:
    """Write a new row; returns its number. On PostgreSQL a function does it, and adds what belongs to it."""
    if tx.has_functions:
        return int(tx.session.scalars(_LORACTL_SUBMIT, {"document": as_json(document)}).one())
    tx.session.add(row)
    tx.session.flush()
    return row.job_id if isinstance(row, Job) else row.sweep_id


_LORACTL_SUBMIT = sql("SELECT loractl_submit(CAST(:document AS json))")


def _block(tx: Transaction, job: Job, submission: Submission) -> None:
    """Let the job wait for the first of its `after` that is not over. All have numbers below its own: no ring."""
    after = [one for one in submission.spec.after if isinstance(one, int)]
    job.awaits = first_awaited(tx, after, any_end=submission.spec.after_any)
    begun = submission.spec.lora.init_from
    if not isinstance(begun, str | None) and begun.sweep is not None and job.awaits is None:
        job.awaits = after[-1]  # the fleet's round names the sweep's best, which a person's login may not


def _waits(job: Job) -> tuple[Any, ...]:
    """What decides which jobs it starts after."""
    return job.after, job.after_any, setting(job.spec, "lora.init_from")


def _row(submission: Submission, now: dt.datetime, sweep_id: int | None) -> Job:
    return Job(
        **_asked(submission),
        **_planned(submission),
        user=submission.user,
        base_model=submission.spec.base_model,
        data=submission.data,
        extent=_extent(submission),
        adjustment=submission.adjustment.as_json() or None,
        lora_until=_lora_until(submission, now),
        status=Status.QUEUED,
        submitted_at=now,
        sweep_id=sweep_id,
    )


def _extent(submission: Submission) -> dict[str, Any] | None:
    """Raises ValueRefused: its data are counted before the database is asked whether it holds them."""
    if misfits(cast(Table, Job.__table__), {"data": submission.data}):
        raise ValueRefused("data")
    extent = extent_of(submission.spec, submission.data, submission.plan.parameters)
    return None if extent is None else vars(extent)


def _asked(submission: Submission) -> dict[str, Any]:
    """The columns that say what is asked for, apart from its data."""
    spec = submission.spec
    return {
        "name": spec.name,
        "labels": dict(spec.labels),
        "spec": spec.model_dump(mode="json"),
        "priority": spec.priority,
        "methods": [method.value for method in submission.methods],
        "preemptible": spec.preemptible is True,
        "yields": spec.preemptible is not False,
        "version": __version__,
    }


def _planned(submission: Submission) -> dict[str, Any]:
    """The columns that say what it needs."""
    plan = submission.plan
    return {
        "vram_lora": plan.need.lora,
        "vram_qlora": plan.need.qlora,
        "planned": vars(plan.planned),
        "gangs": submission.ways.as_json(),
        "roomy": plan.roomy.as_json(),
        "need_key": plan.need_key,
        "family": plan.family,
        "engine": ENGINE,
    }


def _lora_until(submission: Submission, now: dt.datetime) -> dt.datetime | None:
    patience = submission.spec.lora_patience
    if patience is None or submission.methods != (Method.LORA, Method.QLORA):
        return None
    return now + dt.timedelta(seconds=patience)


_TRIES = 5
"""Give up on a row that others change each time before we can."""


def cancel(tx: Transaction, job_id: int, user: str, *, waiting: bool = False) -> Job:
    """Cancel a waiting job now, or ask a running one's trainer to stop. `waiting`: only if it still waits.

    Raises JobNotFound, WrongState when it has ended, or has started.
    """
    for _ in range(_TRIES):
        job = read_job(tx, job_id)
        if job.status is Status.RUNNING and waiting:
            raise WrongState(f"job {job_id} has started meanwhile", f"loractl cancel {job_id} stops it, too")
        if job.status is Status.RUNNING:
            if (asked := change_row(tx, job, "cancel", {}, user)) is not None:
                return asked
        elif job.status is Status.QUEUED:
            over = {"status": Status.CANCELLED, "reason": Reason.CANCELLED, "held": False, "ended_at": tx.now()}
            if (cancelled := change_row(tx, job, "cancelled", over, user)) is not None:
                return cancelled
        else:
            again, result = f"loractl retry {job_id} queues it again", f"loractl report {job_id} shows what it measured"
            ended = {Status.SUCCEEDED: "succeeded", Status.FAILED: "failed"}.get(job.status, "been cancelled")
            what = f"job {job_id} has already {ended}"
            raise WrongState(what, result if job.status is Status.SUCCEEDED else again)
    raise _changed(job_id)


def read_open_members(tx: Transaction, sweep_id: int) -> list[int]:
    """The members of a sweep that have not ended. Raises SweepNotFound, WrongState when all have."""
    if not 0 < sweep_id <= LAST_NUMBER:
        raise SweepNotFound(sweep_id)
    left = select(Job.job_id).where(Job.sweep_id == sweep_id, Job.status.in_([Status.QUEUED, Status.RUNNING]))
    job_ids = list(tx.session.scalars(left.order_by(Job.job_id)))
    if not job_ids and tx.session.get(Sweep, sweep_id) is None:
        raise SweepNotFound(sweep_id)
    if not job_ids:
        raise WrongState(f"all jobs of sweep {sweep_id} have ended")
    return job_ids


def cancel_open(tx: Transaction, job_ids: Sequence[int], user: str, *, waiting: bool = False) -> list[Job]:
    """Cancel those of these jobs that have not ended, or with `waiting` that still wait. Raises JobNotFound."""
    return [job for job_id in job_ids if (job := _cancel_if_open(tx, job_id, user, waiting)) is not None]


def _cancel_if_open(tx: Transaction, job_id: int, user: str, waiting: bool) -> Job | None:
    """A member may end, or start, while those before it are cancelled."""
    try:
        return cancel(tx, job_id, user, waiting=waiting)
    except WrongState:
        if waiting or read_job(tx, job_id).status.is_terminal:
            return None
        raise


def hold(tx: Transaction, job_id: int, user: str, reason: str = "") -> Job:
    """Keep a waiting job from starting until `release`. Raises JobNotFound, WrongState."""
    for _ in range(_TRIES):
        job = read_job(tx, job_id)
        if job.status is not Status.QUEUED:
            what = f"job {job_id} {job.status.in_words}: only a waiting job can be held"
            hint = f"loractl drain {clean_line(job.node or '')} --now --reason ... requeues it with a checkpoint"
            raise WrongState(what, hint if job.status is Status.RUNNING else None)
        if (held := change_row(tx, job, "held", {"held": True}, user, f": {reason}" if reason else "")) is not None:
            return held
    raise _changed(job_id)


def retry(tx: Transaction, job_id: int, user: str, amendment: Amendment | None = None) -> Job:
    """Queue a failed or cancelled job again, with all its retries, and what is to change of it.

    Raises JobNotFound, WrongState.
    """
    for _ in range(_TRIES):
        job = read_job(tx, job_id) if amendment is None else edit(tx, amendment, user)
        if job.status is Status.QUEUED and job.held:
            raise WrongState(f"job {job_id} is held, and has not ended", f"loractl release {job_id} lets it start")
        if Status.QUEUED not in _after(job):
            seen = f"loractl status {job_id} shows its state"
            done = f"loractl reproduce {job_id} runs it again, loractl submit --like {job_id} queues one like it"
            what = f"job {job_id} {job.status.in_words}: only a failed or cancelled job can be retried"
            raise WrongState(what, done if job.status is Status.SUCCEEDED else seen)
        if (queued := _queue_again(tx, job, user)) is not None:
            return queued
        amendment = None  # it is in the row by now
    raise _changed(job_id)


def release(tx: Transaction, job_id: int, user: str) -> Job:
    """Let a held job start again, with all its retries. Raises JobNotFound, WrongState."""
    from loractl.common.job.ancestor import may_go_without

    for _ in range(_TRIES):
        job = read_job(tx, job_id)
        if job.status is Status.QUEUED and job.is_blocked:
            what = f"job {job_id} waits for job {job.awaits}, nobody holds it"
            anyway = f"loractl edit {job_id} --set after=[] lets it start anyway"
            raise WrongState(what, anyway if may_go_without(job.spec, job.awaits) else f"loractl why {job_id}")
        if job.status is not Status.QUEUED or not job.held:
            seen = f"loractl status {job_id} shows its state"
            again = f"loractl retry {job_id} queues it again" if Status.QUEUED in _after(job) else seen
            raise WrongState(f"job {job_id} {job.status.in_words}: nobody holds it", again)
        if (queued := _queue_again(tx, job, user)) is not None:
            return queued
    raise _changed(job_id)


def _queue_again(tx: Transaction, job: Job, user: str) -> Job | None:
    """None: it has changed meanwhile."""
    until = None if job.result_host is None else tx.now() + dt.timedelta(seconds=RESULT_FIRST_S)
    return change_row(tx, job, "retry", {"status": Status.QUEUED, **retried(), "result_until": until}, user)


def _after(job: Job) -> frozenset[Status]:
    """The states that a person may give the job."""
    return frozenset() if job.status is Status.RUNNING else frozenset(TRANSITIONS[job.status])


def edit(tx: Transaction, amendment: Amendment, user: str) -> Job:
    """Change what is asked of a job. Raises JobNotFound, WrongState when it has changed since it was looked at."""
    now, job = tx.now(), read_job(tx, amendment.job_id)
    if (job.status, job.attempt, job.spec) != amendment.seen:
        raise _changed(job.job_id)
    expected = {**seen(job), "awaits": job.awaits, "spec": job.spec, "adjustment": job.adjustment}
    tx.session.expunge(job)  # what is changed here in memory is written below
    amend(tx, job, amendment, now)
    new = {name: one.value for name, one in inspect(job).attrs.items() if one.history.has_changes()}
    edited = change_row(tx, job, "edited", new, user, f": {amendment.text}", expected)
    if edited is None:
        raise _changed(job.job_id)
    return edited


def _changed(job_id: int) -> WrongState:
    return WrongState(f"job {job_id} has changed meanwhile; try again")
