"""Endings: how an attempt ends, and whether its job ends with it or waits for the next one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from sqlalchemy import func, select, update

from loractl.common.job.status import (
    KEEPING,
    LAB_RETRY_DELAY_S,
    OUTCOMES,
    WORKER_LOST_LIMIT,
    Reason,
    Status,
    retry_delay_s,
)
from loractl.common.placement.lines import RESULT_FIRST_S
from loractl.common.placement.shares import decayed
from loractl.common.text import storable
from loractl.common.units import GIB

from ..attempt_columns import ended
from ..guard import become
from ..records import Claim, Progress, StoredResult
from ..tables import Adapter, Attempt, Event, Job, Use
from ..transaction import Transaction
from .heartbeats import record
from .need import need_more

REAPED = 50
"""Attempts that one transaction ends at most, so that heartbeats need not wait for it."""


def finish(
    tx: Transaction, claim: Claim, reason: Reason, message: str, progress: Progress, result: StoredResult | None
) -> Status | None:
    now = tx.now()
    job = tx.session.scalars(select(Job).where(Job.job_id == claim.job_id).with_for_update()).one()
    if job.token != claim.token or job.status is not Status.RUNNING:
        return _already_finished(tx, claim, reason, job)
    record(tx, claim, progress)  # first: the history has what was told before the end
    job.step, job.total_steps = progress.step or job.step, progress.total_steps or job.total_steps
    _end_attempt(tx, job, reason, message, now)
    if result is not None:
        _keep_result(tx, job, claim, result, now)
    return job.status


def reap(tx: Transaction, lease_s: float) -> list[Job]:
    """End the oldest expired leases, at most REAPED of them, unless another node does so now; returns their jobs."""
    if not tx.is_alone():
        return []
    now = tx.now()
    over = select(Job).where(Job.status == Status.RUNNING, Job.lease_expires_at < now)
    oldest = over.order_by(Job.lease_expires_at, Job.job_id).limit(REAPED).with_for_update(skip_locked=True)
    lost = sorted(tx.session.scalars(oldest), key=_turn)
    for job in lost:
        _end_attempt(tx, job, Reason.WORKER_LOST, f"{job.node} was silent for {lease_s:.0f} s", now)
    return lost


def reap_all(begin: Callable[[], Transaction], lease_s: float) -> list[tuple[int, int]]:
    """End all expired leases, a few in a transaction; (job_id, vram_class) of jobs that wait again."""
    lost: list[Job] = []
    while True:
        with begin() as tx:
            some = reap(tx, lease_s)
        lost += some
        if len(some) < REAPED:
            return [(job.job_id, job.vram_class) for job in lost if job.status is Status.QUEUED and not job.held]


def give_back(tx: Transaction, node: str) -> list[int]:
    now = tx.now()
    running = select(Job).where(Job.status == Status.RUNNING, Job.node == node)
    lost = sorted(tx.session.scalars(running.with_for_update(skip_locked=True)), key=_turn)
    for job in lost:
        _end_attempt(tx, job, Reason.WORKER_LOST, f"{node} was started anew", now)
    return [job.job_id for job in lost]


def _turn(job: Job) -> tuple[str, int]:
    """All who end several attempts at once charge their users in one order: else two could wait for each other."""
    return job.user, job.job_id


def _end_attempt(tx: Transaction, job: Job, reason: Reason, message: str, now: dt.datetime) -> None:
    """Close the running attempt and decide what becomes of the job."""
    message = storable(message)
    own = (Attempt.job_id == job.job_id) & (Attempt.attempt == job.attempt)
    tx.session.execute(update(Attempt).where(own).values(ended_at=now, reason=reason, message=message))
    _charge(tx, job, now)
    gave = job.vram_reserved
    for name, value in ended().items():
        setattr(job, name, value)
    job.reason, job.message = reason, message
    outcome = OUTCOMES[reason]
    may = outcome.retryable and not job.cancel_requested
    again = may and (not outcome.counts or job.retries_used < job.max_retries)
    if reason is Reason.OUT_OF_MEMORY and again:
        again, message = need_more(tx, job, gave or 0, message, now)
        job.message = message
    if again:
        _requeue(tx, job, reason, message, now)
    else:
        _end_job(tx, job, reason, message, now)


def _end_job(tx: Transaction, job: Job, reason: Reason, message: str, now: dt.datetime) -> None:
    asked = job.cancel_requested and reason is not Reason.OK
    become(job, Status.CANCELLED if asked else OUTCOMES[reason].status)
    job.reason = Reason.CANCELLED if asked else reason
    job.ended_at = now
    if job.reason in KEEPING:
        message += _kept(job)
    else:
        job.checkpoint = job.result_host = None  # the files are removed
    job.result_until = None
    tx.tell(job.job_id, job.attempt, job.status.value, message)


def _kept(job: Job) -> str:
    """What a failed job leaves, for the history."""
    if job.result_host is not None:
        what = f"its finished result stays on {job.result_host}"
    elif job.checkpoint is not None:
        what = f"its checkpoint of step {job.checkpoint['step']} stays in the artifact store"
    else:
        return ""
    return f"; {what} for loractl retry, until loractl gc takes it"


def _requeue(tx: Transaction, job: Job, reason: Reason, message: str, now: dt.datetime) -> None:
    """Let the job wait for its next attempt. Hold it when it may be the cause of its workers' loss."""
    become(job, Status.QUEUED)
    text = f"attempt {job.attempt} ended ({reason.value}): {message}"
    if OUTCOMES[reason].counts:
        job.retries_used += 1
        delay = retry_delay_s(job.retries_used)
        job.not_before = now + dt.timedelta(seconds=delay)
        text += f"; tried again in {delay:.0f} s, retry {job.retries_used} of {job.max_retries}"
    elif reason in (Reason.WORKER_LOST, Reason.GPU_ERROR):
        if _times_ended(tx, job.job_id, reason) >= WORKER_LOST_LIMIT:
            job.held = True
            what = "its worker was lost" if reason is Reason.WORKER_LOST else "its card failed"
            job.message = f"held: {what} {WORKER_LOST_LIMIT} times; it may be what kills them"
            text += "; held, loractl retry releases it"
        elif reason is Reason.GPU_ERROR:
            job.not_before = now + dt.timedelta(seconds=LAB_RETRY_DELAY_S)
    if job.result_host is not None:
        job.result_until = (job.not_before or now) + dt.timedelta(seconds=RESULT_FIRST_S)
    tx.tell(job.job_id, job.attempt, "held" if job.held else "requeued", text)


def _times_ended(tx: Transaction, job_id: int, reason: Reason) -> int:
    """Attempts that ended this way since a person last queued the job again. The history's order counts: a clock may be
    set back."""
    retried = select(func.max(Event.event_id)).where(Event.job_id == job_id, Event.kind == "retry")
    began = func.coalesce(retried.scalar_subquery(), 0)
    since = select(Event.attempt).where(Event.job_id == job_id, Event.kind == "started", Event.event_id > began)
    so = (Attempt.job_id == job_id) & (Attempt.reason == reason) & Attempt.attempt.in_(since)
    return tx.session.scalar(select(func.count()).select_from(Attempt).where(so)) or 0


def _charge(tx: Transaction, job: Job, now: dt.datetime) -> None:
    """Charge the attempt's part of its card to its user."""
    if job.started_at is None or not job.vram_reserved:
        return
    had = job.vram_reserved / GIB * (now - job.started_at).total_seconds() / 3600
    use = tx.session.get(Use, job.user, with_for_update=True)
    past = 0.0 if use is None else decayed(use.gib_hours, (now - use.at).total_seconds())
    tx.put(Use, "user", {"user": job.user, "gib_hours": past + had, "at": now})


def _keep_result(tx: Transaction, job: Job, claim: Claim, result: StoredResult, now: dt.datetime) -> None:
    job.adapter_uri, job.report_uri = result.adapter_uri, result.report_uri
    job.manifest_sha256 = result.manifest_sha256
    tx.session.add(
        Adapter(
            job_id=job.job_id,
            attempt=claim.attempt,
            name=job.name,
            base_model=job.base_model,
            method=claim.method.value,
            uri=result.adapter_uri,
            size=result.adapter_size,
            sha256=result.adapter_sha256,
            created_at=now,
        )
    )


def _already_finished(tx: Transaction, claim: Claim, reason: Reason, job: Job) -> Status | None:
    """Our own commit may have landed though its answer was lost: then the attempt's row says so."""
    attempt = tx.session.get(Attempt, (claim.job_id, claim.attempt))
    own = attempt is not None and attempt.token == claim.token and attempt.reason is reason
    return job.status if own else None
