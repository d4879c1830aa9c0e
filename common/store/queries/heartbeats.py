"""Heartbeats: what a running attempt reports of itself while it holds the lease, and the files that it leaves in the
cache of its box for later jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from sqlalchemy import ColumnElement, Select, Table, delete, exists, insert, select, update

from loractl.common.artifacts import checkpoint_prefix
from loractl.common.job.adjustment import without_room

from ..columns import misfits, part_of
from ..fleet import takes_bf16
from ..guard import EXPECTED, REACHED, mine
from ..records import Beat, Claim, Progress, StoredCheckpoint, rung_points
from ..tables import ASKED_TO_STOP, GIVES_WAY_TO, Attempt, Event, Job, KeptFile, LogChunk, MetricPoint, Node, Wish
from ..transaction import SKIP_LOCKED, NewRow, Transaction
from .need import plan_again
from .sweeps import read_verdict

_REPORTED = ("stage", *REACHED, *EXPECTED)
_MEASURED = (
    "vram_peak", "vram_allocated", "vram_process", "base_bytes", "resumed_from_step", "prepared_s", "trained_s",
    "trained_steps", "neighbours",
)  # fmt: skip
"""The part of it that the attempt's own row keeps."""

_LEFT_OUT = "left out"


def beat(tx: Transaction, claim: Claim, progress: Progress) -> Beat:
    """Extend the lease and write what is new: progress, metrics, events, log lines.

    A member of a sweep that reaches a rung is compared in this transaction, and may be told to stop.
    """
    progress, left_out = storable_progress(progress)
    values = {name: value for name in _REPORTED if (value := getattr(progress, name)) is not None}
    limit = part_of(Job.spec, "resources", "time_limit")  # not the whole spec at each beat
    asked = exists().where(Wish.job_id == claim.job_id).label("cancel_requested")
    wishes = (asked, Job.preempted_by, limit.label("time_limit"))
    free = select(Job.job_id).where(Job.job_id == claim.job_id).with_for_update(**SKIP_LOCKED)
    alive = mine(claim).where(Job.job_id.in_(free)).returning(*wishes)
    row = tx.session.execute(alive.values(lease_expires_at=tx.now_in(tx.lease_s), **values)).first()
    if row is None:
        return _beat_beside(tx, claim)
    record(tx, claim, progress, left_out)
    return Beat(
        accepted=True,
        cancel_requested=row.cancel_requested,
        # asked only then, whether that still helps: SQLite can't say it with the beat itself
        preempted_by=row.preempted_by and tx.session.scalar(select(GIVES_WAY_TO).where(Job.job_id == claim.job_id)),
        pruned=read_verdict(tx, claim, rung_points(claim, progress)),
        time_limit=_seconds(row.time_limit),
    )


def _beat_beside(tx: Transaction, claim: Claim) -> Beat:
    """A beat while somebody's transaction has the job's row locked: the attempt's own row holds the lease, which nobody
    but workers can lock. Refused where the attempt has ended."""
    running = (*_own(claim), Attempt.token == claim.token, Attempt.ended_at.is_(None))
    if not tx.change(update(Attempt).where(*running).values(lease_expires_at=tx.now_in(tx.lease_s))):
        return Beat(accepted=False)
    wished = select(ASKED_TO_STOP, GIVES_WAY_TO)
    asked, preempted_by = tx.session.execute(wished.where(Job.job_id == claim.job_id)).one()
    return Beat(accepted=True, recorded=False, cancel_requested=asked, preempted_by=preempted_by)


def _own(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt


def _seconds(limit: str | float | None) -> float | None:
    """SQLite gives a number as it is, PostgreSQL its text."""
    return None if limit is None else float(limit)


def keep_checkpoint(tx: Transaction, claim: Claim, checkpoint: StoredCheckpoint) -> bool:
    """Name a stored checkpoint as the one that a later attempt goes on from; False when the lease is lost."""
    known = select(Job.checkpoint, Job.started_at, Node.self_test).outerjoin(Node, Node.node == Job.node)
    row = tx.session.execute(known.where(Job.job_id == claim.job_id)).one()
    took: dict[str, Any] = {"begun_bf16": takes_bf16(row.self_test) if claim.spec.training.dtype == "auto" else None}
    seconds = 0.0 if row.started_at is None else (tx.now() - row.started_at).total_seconds()
    if seconds > 0 and not is_of_attempt(row.checkpoint, claim.job_id, claim.attempt):  # else the clock has gone back
        took |= {"checkpoint_s": seconds}
    return tx.change(mine(claim).values(checkpoint=vars(checkpoint), **took)) == 1


def is_of_attempt(checkpoint: Mapping[str, Any] | None, job_id: int, attempt: int) -> bool:
    """Whether a row's stored checkpoint is this attempt's."""
    return checkpoint is not None and checkpoint["prefix"].startswith(checkpoint_prefix(job_id, attempt, ""))


def storable_progress(progress: Progress) -> tuple[Progress, list[str]]:
    """What of it the columns can hold, and what not, for people: a measurement stops neither a lease nor an end."""
    jobs, attempts, points = (cast(Table, one.__table__) for one in (Job, Attempt, MetricPoint))
    asked = {
        **{name: (jobs, name, getattr(progress, name)) for name in _REPORTED},
        **{name: (attempts, name, getattr(progress, name)) for name in _MEASURED},
        "need": (jobs, "planned", progress.need and vars(progress.need)),
        "roomy": (jobs, "roomy", progress.roomy and progress.roomy.as_json()),
        "running": (attempts, "vram_planned", progress.running),
        "adjustment": (jobs, "adjustment", progress.adjustment and progress.adjustment.as_json()),
    }
    wrong = [name for name, (table, column, value) in asked.items() if misfits(table, {column: value})]
    told = [f"{name} {getattr(progress, name)}"[:_SHOWN] for name in wrong]
    metrics = []
    for step, name, value in progress.metrics:
        if misfits(points, {"step": step, "name": name, "value": value}):
            told.append(f"{name} {value} of step {step}"[:_SHOWN])
        else:
            metrics.append((step, name, value))
    if not told:
        return progress, []
    without: dict[str, Any] = dict.fromkeys(wrong)
    return replace(progress, **without, metrics=tuple(metrics)), told


_SHOWN = 100
"""Characters of a value in the history."""


def record(tx: Transaction, claim: Claim, progress: Progress, left_out: Sequence[str] = ()) -> None:
    """Write the append-only part of a heartbeat; the caller has checked the token in this transaction.

    `left_out`: what `storable_progress` took away. The history has the first of it.
    """
    if left_out:
        said = select(Event.event_id).where(Event.job_id == claim.job_id, Event.kind == _LEFT_OUT)
        if tx.session.scalar(said.where(Event.attempt == claim.attempt).limit(1)) is None:
            tx.tell(claim.job_id, claim.attempt, _LEFT_OUT, f"no number that can be kept: {', '.join(left_out[:5])}")
    _record_metrics(tx, claim, progress)
    for kind, text in progress.events:
        tx.tell(claim.job_id, claim.attempt, kind, text)
    if progress.log:
        tx.session.execute(insert(LogChunk).values(job_id=claim.job_id, attempt=claim.attempt, text=progress.log))
    if progress.adjustment is not None:
        change = mine(claim).values(adjustment=without_room(claim.spec, progress.adjustment).as_json())
        tx.session.execute(change.execution_options(synchronize_session="fetch"))
    if progress.result_host is not None:
        change = mine(claim).values(result_host=progress.result_host or None)
        tx.session.execute(change.execution_options(synchronize_session="fetch"))
    if progress.withdrawn is not None:
        named = part_of(Job.checkpoint, "prefix") == progress.withdrawn  # not one that was stored meanwhile
        change = mine(claim).where(named).values(checkpoint=None, begun_bf16=None)
        tx.session.execute(change.execution_options(synchronize_session="fetch"))
    if progress.need is not None:
        plan_again(tx, claim, progress.need, progress.roomy, progress.running)
    if progress.kept:
        keep(tx, claim, progress.kept)
    measured = {name: value for name in _MEASURED if (value := getattr(progress, name)) is not None}
    if measured:
        tx.session.execute(update(Attempt).where(*_own(claim)).values(**measured))


def _record_metrics(tx: Transaction, claim: Claim, progress: Progress) -> None:
    """Evaluations at a rung have their own metric names, so that a reader need not know the number of steps."""
    rungs = [(point.step, point.metric, point.loss) for point in rung_points(claim, progress)]
    points = [
        {"job_id": claim.job_id, "attempt": claim.attempt, "step": step, "name": name, "value": value}
        for step, name, value in (*progress.metrics, *rungs)
    ]
    if points:
        tx.add_new(MetricPoint, points)


MOST_KEPT = 128
"""Files of a box: every order lists them. A sweep leaves one to three."""


def kept_files(host: str) -> Select[KeptFile]:
    """What a box keeps of jobs that run no more, the newest first."""
    return select(KeptFile).where(KeptFile.host == host).order_by(KeptFile.at.desc(), KeptFile.key).limit(MOST_KEPT)


def _of_this_box(new: NewRow) -> ColumnElement[bool]:
    return KeptFile.host == new["host"]


def keep(tx: Transaction, claim: Claim, kept: Sequence[tuple[str, str]]) -> None:
    """Write down what an attempt has left, in place of what had the same key. The box's oldest make room for it.

    The caller has checked the token in this transaction.
    """
    mine = select(Attempt.node).where(Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt)
    host = tx.session.scalars(mine).one().rpartition(":")[0]
    for key, sha256 in sorted(kept):  # in one order: two attempts may leave the same
        row = {"key": key, "host": host, "sha256": sha256, "job_id": claim.job_id, "at": tx.now()}
        tx.put(KeptFile, "key", row, _of_this_box)
    beyond = kept_files(host).with_only_columns(KeptFile.key).limit(None).offset(MOST_KEPT)
    tx.session.execute(
        delete(KeptFile).where(KeptFile.key.in_(beyond.with_for_update(skip_locked=True))),
        execution_options={"synchronize_session": False},
    )
