"""Endings: how an attempt ends, and whether its job ends with it or waits for the next one."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import replace

from sqlalchemy import exists, or_, select, update

from loractl.common.job.adjustment import Adjustment, adjusted, without_room
from loractl.common.job.method import Method
from loractl.common.job.status import (
    KEEPING,
    LAB_FAILURE_LIMIT,
    LAB_RETRY_DELAY_S,
    OUTCOMES,
    Blamed,
    Reason,
    Status,
    retry_delay_s,
)
from loractl.common.placement.cards import TIME_GROWTH
from loractl.common.placement.duration import UNKNOWN_S, seconds_left
from loractl.common.placement.gangs import GangShare
from loractl.common.placement.lines import RESULT_FIRST_S
from loractl.common.placement.shares import decayed, within_need
from loractl.common.units import GIB

from ..guard import become, ended, move
from ..records import Claim, Progress, StoredResult
from ..tables import Adapter, Attempt, Job, Node, Use, peak_of
from ..transaction import SKIP_LOCKED, Transaction
from .backlog import line_up, node_labels, open_methods
from .cards.nodes import note_failure, note_success
from .cards.shares import read_beside, running_on, silent
from .changes import forget_wishes, is_asked_to_stop
from .durations import predict_again
from .followers import release_followers
from .heartbeats import is_of_attempt, record, storable_progress
from .need import need_more
from .outbox.notices import tell_of_job
from .usage import record as record_usage

AVOIDED_S = 1800.0
"""How long a job avoids what failed it: after that it takes the card rather than wait for a busy one."""

WITHOUT_BASE_S = 24 * 3600.0
"""How long it avoids a box without its base model: half an hour rarely brings a model there."""

REAPED = 50
"""Attempts that one transaction ends at most, so that heartbeats need not wait for it."""

_HELD = {
    Reason.WORKER_LOST: "its worker was lost {} times in a row; the job may kill its workers",
    Reason.KILLED: "its trainer was killed {} times in a row, by a person or a program like earlyoom",
    Reason.GPU_ERROR: "its card failed {} times in a row; the job may cause it",
    Reason.DISK_FULL: "the disk of its box was full {} times in a row",
    Reason.STORE_FAILED: "the artifact store failed it {} times in a row",
    Reason.BASE_MISSING: "its base model was missing on the boxes that took it",
}


def finish(
    tx: Transaction,
    claim: Claim,
    reason: Reason,
    message: str,
    progress: Progress,
    result: StoredResult | None = None,
    *,
    card: str | None = None,
) -> Status | None:
    """End the attempt; the job succeeds, fails, is cancelled, or waits for its next attempt.

    `card`: which of several failed.
    Returns the job's status afterwards, or None when the lease was lost: then nothing was written.
    """
    if (reason is Reason.OK) != (result is not None):
        raise ValueError("a result goes with reason ok, and only with it")
    now = tx.now()
    job = tx.session.scalars(select(Job).where(Job.job_id == claim.job_id).with_for_update(key_share=True)).one()
    if job.token != claim.token or job.status is not Status.RUNNING:
        return _already_finished(tx, claim, reason, job)
    progress, left_out = storable_progress(progress)
    record(tx, claim, progress, left_out)  # first: the history has what was reported before the end
    job.step, job.total_steps = progress.step or job.step, progress.total_steps or job.total_steps
    if reason is Reason.PREEMPTED:
        message += _for_what(tx, job)
        job.stops += 1
        _go_on_alike(tx, job, claim, now)
    left_s = _left_s(tx, job, now)
    if result is not None:  # first: a job that its end releases may begin from it
        _keep_result(tx, job, claim, result, now)
    _end_attempt(tx, job, reason, message, now, card=card)
    if reason is Reason.PREEMPTED:  # by this it gave way: by less it could take its card back
        job.work_left_s = max(job.work_left_s, left_s)
    return job.status


def _for_what(tx: Transaction, job: Job) -> str:
    """Why a job gave way to another, for people."""
    other = None if job.preempted_by is None else tx.session.get(Job, job.preempted_by)
    if other is None:
        return ""
    urgent = job.preemptible and other.priority > job.priority
    return ", which has a higher priority" if urgent else ", which is much shorter"


def _left_s(tx: Transaction, job: Job, now: dt.datetime) -> float:
    """What is left of the running attempt by its last beat, as `placement.preemption.left_s` has it."""
    ran_s = 0.0 if job.started_at is None else (now - job.started_at).total_seconds()
    if job.eta_seconds is None:
        return max(UNKNOWN_S, ran_s)
    silent_s = 0.0 if job.lease_expires_at is None else tx.lease_s - (job.lease_expires_at - now).total_seconds()
    return seconds_left(job.eta_seconds, max(0.0, silent_s))


def _go_on_alike(tx: Transaction, job: Job, claim: Claim, now: dt.datetime) -> None:
    """Let the next attempt train by the same method and in the same micro-batches, which round alike: by another method
    it would begin again. Until memory runs out, see `need_more`."""
    if job.checkpoint is None:
        return
    job.methods = [claim.method.value]
    own = tx.session.get(Attempt, (job.job_id, job.attempt))
    adjustment = Adjustment.read(job.adjustment)
    learned = adjustment != without_room(claim.spec, claim.adjustment)  # out-of-memory has changed the pieces since
    on_gpu = own is not None and own.device_kind == "nvml" and not claim.shares
    if on_gpu and job.roomy is not None and not learned:
        pieces = adjusted(claim.spec, claim.adjustment).training
        rows, times = pieces.per_device_train_batch_size, pieces.gradient_accumulation_steps
        job.adjustment = replace(adjustment, micro_batch=rows, accumulation=times).as_json()
    line_up(job, node_labels(job), now)


def reap(tx: Transaction) -> list[Job]:
    """End the oldest expired leases, at most REAPED of them, unless another node does so now; returns their jobs."""
    if not tx.is_alone():
        return []
    now = tx.now()
    beside = exists().where(
        Attempt.job_id == Job.job_id, Attempt.attempt == Job.attempt, Attempt.lease_expires_at >= now
    )
    over = select(Job).where(Job.status == Status.RUNNING, Job.lease_expires_at < now, ~beside)
    oldest = over.order_by(Job.lease_expires_at, Job.job_id).limit(REAPED).with_for_update(**SKIP_LOCKED)
    lost = _without_beaten(tx, sorted(tx.session.scalars(oldest), key=_turn), now)
    for job in lost:
        _end_lost(tx, job, f"{job.node} was silent for {tx.lease_s:.0f} s", now)
    return lost + _reap_gangs(tx, now)


def _without_beaten(tx: Transaction, lost: list[Job], now: dt.datetime) -> list[Job]:
    """The jobs whose attempts sent no heartbeat after their rows were locked. Such a heartbeat is written to the
    attempt's own row. This locks that row too, so a later heartbeat waits, and is refused."""
    if not lost:
        return []
    own = (Attempt.job_id == Job.job_id) & (Attempt.attempt == Job.attempt)
    leases = select(Job.job_id, Attempt.lease_expires_at).join(Attempt, own)
    leases = leases.where(Job.job_id.in_([job.job_id for job in lost])).with_for_update(of=Attempt, key_share=True)
    held = {job_id for job_id, until in tx.session.execute(leases) if until is not None and until >= now}
    return [job for job in lost if job.job_id not in held]


def _reap_gangs(tx: Transaction, now: dt.datetime) -> list[Job]:
    """End jobs on several cards if one, not the first, has a silent node: a job with that card alone would end too."""
    gone = dict(silent(tx.session, now - dt.timedelta(seconds=tx.lease_s), REAPED))
    if not gone:
        return []
    running = select(Job).where(Job.job_id.in_(gone), Job.status == Status.RUNNING).with_for_update(**SKIP_LOCKED)
    lost = sorted(tx.session.scalars(running), key=_turn)
    for job in lost:
        card = gone[job.job_id]
        _end_lost(tx, job, f"{card} was silent for {tx.lease_s:.0f} s", now, card)
    return lost


def reap_all(begin: Callable[[], Transaction]) -> list[tuple[int, int]]:
    """End all expired leases, a few in a transaction; (job_id, vram_class) of jobs that wait again."""
    lost: list[Job] = []
    while True:
        with begin() as tx:
            some = reap(tx)
        lost += some
        if len(some) < REAPED:
            return [(job.job_id, job.vram_class) for job in lost if job.status is Status.QUEUED and not job.held]


def give_back(tx: Transaction, node: str) -> list[int]:
    """End what runs on a node as worker_lost at once. A node calls it when it starts: it has no attempts yet."""
    now = tx.now()
    here = or_(Job.node == node, Job.job_id.in_(running_on(node)))
    running = select(Job).where(Job.status == Status.RUNNING, here)
    lost = sorted(tx.session.scalars(running.with_for_update(**SKIP_LOCKED)), key=_turn)
    for job in lost:
        _end_lost(tx, job, f"{node} was restarted", now, node)
    return [job.job_id for job in lost]


def _turn(job: Job) -> tuple[str, int]:
    """One order for all who end several attempts at once and charge their users: else two could wait for each other."""
    return job.user, job.job_id


def _end_lost(tx: Transaction, job: Job, message: str, now: dt.datetime, card: str | None = None) -> None:
    """End a lost attempt, on several cards for the loss of this one. A job that can't be ended in order fails: it must
    not keep the others from being ended."""
    job_id, attempt = job.job_id, job.attempt
    if tx.apart(job_id, lambda: _end_attempt(tx, job, Reason.WORKER_LOST, message, now, card=card)):
        return
    text = f"{message}; its attempt could not be ended in order"
    over = {**ended(), "reason": Reason.BAD_SPEC, "message": text, "ended_at": now}
    tx.change(move(job_id, Status.RUNNING, Status.FAILED).values(**over))
    own = (Attempt.job_id == job_id) & (Attempt.attempt == attempt)
    tx.session.execute(update(Attempt).where(own).values(ended_at=now, reason=Reason.WORKER_LOST, message=message))
    tx.session.refresh(job)
    tx.tell(job_id, attempt, Status.FAILED.value, text)
    tell_of_job(tx, job)


def _close_attempt(tx: Transaction, job: Job, reason: Reason, message: str, now: dt.datetime) -> None:
    own = (Attempt.job_id == job.job_id) & (Attempt.attempt == job.attempt)
    over = {"ended_at": now, "reason": reason, "message": message}
    tx.session.execute(update(Attempt).where(own).values(**over))
    for name, value in ended().items():
        setattr(job, name, value)


def _end_attempt(
    tx: Transaction,
    job: Job,
    reason: Reason,
    message: str,
    now: dt.datetime,
    *,
    card: str | None = None,
) -> None:
    """Close the running attempt and decide what becomes of the job. `card`: which one of several failed, if one did."""
    gave, card = job.vram_reserved, card or job.node or ""
    asked = is_asked_to_stop(tx, job.job_id)
    parts, start = _parts(tx, job, now), job.started_at
    _charge(tx, job, parts, now)
    if reason is Reason.DRAINED:
        _learn_time(tx, job, now)
    _close_attempt(tx, job, reason, message, now)
    job.reason, job.message = reason, message
    outcome = OUTCOMES[reason]
    if outcome.blames is not None:
        if outcome.blames is not Blamed.BASE:
            note_failure(tx, job, card, reason, message, now)
        if outcome.blames is not Blamed.BASE or _lacked_base(job, _box(card)):  # a job looks into each box once
            _count_in_a_row(tx, job)
    elif reason is Reason.OK:
        beside = read_beside(tx.session, [job.job_id]).get(job.job_id, [])
        note_success(tx, [job.node or "", *(share.node for share in beside)])
    elif outcome.counts:
        job.lab_failures = 0
    may = outcome.retryable and not asked
    again = may and (not outcome.counts or job.retries_used < job.spec.get("max_retries", 0))
    if reason is Reason.OUT_OF_MEMORY and again:
        again, message = need_more(tx, job, card, gave or 0, message, now)
        job.message = message
    if again:
        _requeue(tx, job, card, reason, message, now)
    else:
        _end_job(tx, job, reason, message, now, asked=asked and reason is not Reason.OK)
    if start is not None:
        record_usage(tx, job, parts, start, now)
    predict_again(tx, job, now)


def _learn_time(tx: Transaction, job: Job, now: dt.datetime) -> None:
    """What a card's end says of the time to a first checkpoint. A stop before it says nothing."""
    until = tx.session.scalar(select(Node.until).where(Node.node == job.node))
    if until is None or now < until or job.started_at is None:
        return
    if not is_of_attempt(job.checkpoint, job.job_id, job.attempt):
        job.checkpoint_s = max(job.checkpoint_s or 0.0, TIME_GROWTH * (now - job.started_at).total_seconds())


def _end_job(tx: Transaction, job: Job, reason: Reason, message: str, now: dt.datetime, *, asked: bool) -> None:
    become(job, Status.CANCELLED if asked else OUTCOMES[reason].status)
    job.reason = Reason.CANCELLED if asked else reason
    job.ended_at = now
    if asked and reason is not Reason.CANCELLED:  # else it would read as if that had ended it
        job.message = message = f"cancelled while it ran; {message}"
    if job.reason in KEEPING:
        message += _kept(job)
    else:
        job.checkpoint = job.begun_bf16 = job.result_host = None  # the files are removed
        open_methods(job, now)
    job.result_until = None
    forget_wishes(tx, job.job_id)
    tx.tell(job.job_id, job.attempt, job.status.value, message)
    tell_of_job(tx, job)
    release_followers(tx, job)


def _kept(job: Job) -> str:
    """What a failed job leaves, for the history."""
    if job.result_host is not None:
        what = f"its finished result stays on {job.result_host}"
    elif job.checkpoint is not None:
        what = f"its checkpoint of step {job.checkpoint['step']} stays in the artifact store"
    else:
        return ""
    return f"; {what} for loractl retry, until loractl gc removes it"


def _requeue(tx: Transaction, job: Job, card: str, reason: Reason, message: str, now: dt.datetime) -> None:
    """Let the job wait for its next attempt. Hold it when it may be the cause of its workers' loss."""
    become(job, Status.QUEUED)
    if job.checkpoint is None:
        open_methods(job, now)
    text = f"attempt {job.attempt} ended ({reason.value}): {message}"
    if OUTCOMES[reason].counts:
        job.retries_used += 1
        delay = retry_delay_s(job.retries_used)
        job.not_before = now + dt.timedelta(seconds=delay)
        text += f"; tried again in {delay:.0f} s, retry {job.retries_used} of {job.spec['max_retries']}"
    elif OUTCOMES[reason].blames is not None:
        _avoid(job, card, reason, now)
        held = _why_held(tx, job, card, message)
        if held is not None:
            job.held, job.message = True, held
            text += "; held, loractl release lets it start"
            text += f"; its finished result stays on {job.result_host}" if job.result_host is not None else ""
        elif reason is not Reason.WORKER_LOST:
            job.not_before = now + dt.timedelta(seconds=LAB_RETRY_DELAY_S)
    if job.result_host is not None:
        job.result_until = (job.not_before or now) + dt.timedelta(seconds=RESULT_FIRST_S)
    tx.tell(job.job_id, job.attempt, "held" if job.held else "requeued", text)
    if job.held:
        tell_of_job(tx, job)


def _avoid(job: Job, card: str, reason: Reason, now: dt.datetime) -> None:
    """Make the job's next attempts avoid what failed this one. A box that has its finished result may still take it:
    the rule gives it to that one alone."""
    blamed = card if OUTCOMES[reason].blames is Blamed.CARD else _box(card)
    seconds = WITHOUT_BASE_S if reason is Reason.BASE_MISSING else AVOIDED_S
    until = now + dt.timedelta(seconds=seconds)
    job.avoids = {**(job.avoids or {}), blamed: {"reason": reason.value, "until": until.isoformat()}}


def _lacked_base(job: Job, box: str) -> bool:
    return bool((job.avoids or {}).get(box, {}).get("reason") == Reason.BASE_MISSING.value)


def _box(card: str) -> str:
    return card.rpartition(":")[0]


def _count_in_a_row(tx: Transaction, job: Job) -> None:
    """One more failure in a row. A further checkpoint since the last one begins a new row."""
    attempt = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    resumed = 0 if attempt is None else attempt.resumed_from_step or 0
    reached = max(resumed, (job.checkpoint or {}).get("step") or 0)
    further = job.lab_step is not None and reached > job.lab_step
    job.lab_failures = 1 if further else job.lab_failures + 1
    job.lab_step = max(reached, job.lab_step or 0)


def _why_held(tx: Transaction, job: Job, card: str, message: str) -> str | None:
    """Why the job is held: the lab failed it so often in a row that it may be the cause. None: it is not."""
    if job.lab_failures < LAB_FAILURE_LIMIT:
        return None
    blamed = [reason for reason, meaning in OUTCOMES.items() if meaning.blames is not None]
    ended = select(Attempt.reason).where(Attempt.job_id == job.job_id, Attempt.reason.in_(blamed))
    last = tx.session.scalars(ended.order_by(Attempt.attempt.desc()).limit(job.lab_failures)).all()
    same = {reason for reason in last if reason is not None}
    text = _HELD[same.pop()] if len(same) == 1 else "the lab failed it {} times in a row"
    return f"held: {text.format(job.lab_failures)}; the last on {card}: {message}"


def _charge(tx: Transaction, job: Job, parts: Sequence[GangShare], now: dt.datetime) -> None:
    """Charge the attempt's part of its card to its user."""
    if job.started_at is None or not job.vram_reserved:
        return
    hours = max(0.0, (now - job.started_at).total_seconds()) / 3600  # the clock may have gone back
    had = sum(part.bytes for part in parts) / GIB * hours
    tx.add_new(Use, [{"user": job.user, "gib_hours": 0.0, "at": now}])  # there is a row to lock at a first end, too
    use = tx.session.get_one(Use, job.user, with_for_update=True, populate_existing=True)
    use.gib_hours, use.at = decayed(use.gib_hours, (now - use.at).total_seconds()) + had, now


def _parts(tx: Transaction, job: Job, now: dt.datetime) -> list[GangShare]:
    """Bytes of each card that the attempt had. What was measured counts where it is more than what was reserved."""
    own = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    beside = read_beside(tx.session, [job.job_id]).get(job.job_id, [])
    others = [GangShare(node=share.node, bytes=share.bytes) for share in beside]
    reserved = job.vram_reserved or 0
    if own is not None and not beside:
        reserved = max(reserved, peak_of(own))
    if own is not None and own.roomy:
        reserved = within_need(reserved, job.vram_qlora if job.method == Method.QLORA.value else job.vram_lora)
    return [GangShare(node=job.node or "", bytes=reserved), *others]


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
