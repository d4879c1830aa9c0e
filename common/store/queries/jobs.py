"""Jobs as a person reads them: the rows, and their attempts, history, metrics and logs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import Select, or_, select
from sqlalchemy import text as sql

from loractl.common.errors import JobNotFound
from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Status
from loractl.common.memory.correction import Measured

from ..tables import Attempt, Event, Job, LogChunk, MetricPoint
from ..transaction import Transaction

_LARGEST = 2**31 - 1  # number of a job; a larger one no database takes


def read_job(tx: Transaction, job_id: int, *, lock: bool = False) -> Job:
    """One job as it is now; with `lock`, as it stays until the transaction ends. Raises JobNotFound."""
    known = 0 < job_id <= _LARGEST
    job = tx.session.get(Job, job_id, populate_existing=True, with_for_update=lock or None) if known else None
    if job is None:
        raise JobNotFound(job_id)
    return job


def matching(
    statuses: Sequence[Status],
    user: str | None,
    label: tuple[str, str] | None,
    ended_since: dt.datetime | None,
    sweep_id: int | None,
) -> Select[Job]:
    """Jobs that match every filter that is given, newest first."""
    query = select(Job).order_by(Job.job_id.desc())
    if statuses:
        query = query.where(Job.status.in_(statuses))
    if user:
        query = query.where(Job.user == user)
    if label:
        query = query.where(Job.labels[label[0]].as_string() == label[1])
    if ended_since:
        query = query.where(Job.ended_at >= ended_since)
    if sweep_id is not None:
        query = query.where(Job.sweep_id == sweep_id)
    return query


def attempts(job_id: int) -> Select[Attempt]:
    return select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)


def events(job_id: int) -> Select[Event]:
    return select(Event).where(Event.job_id == job_id).order_by(Event.event_id)


def metrics(job_id: int, name: str) -> Select[MetricPoint]:
    points = select(MetricPoint).where(MetricPoint.job_id == job_id, MetricPoint.name == name)
    return points.order_by(MetricPoint.attempt, MetricPoint.step)


def log(job_id: int, after: int) -> Select[LogChunk]:
    chunks = select(LogChunk).where(LogChunk.job_id == job_id, LogChunk.chunk_id > after)
    return chunks.order_by(LogChunk.chunk_id)


def read_measured(tx: Transaction, need_key: str | None, family: str | None, limit: int) -> list[Measured]:
    columns = (
        Attempt.device_name, Attempt.method, Job.family, Job.need_key, Attempt.vram_planned, Attempt.vram_reserved,
        Attempt.vram_process, Attempt.vram_peak, Attempt.reason,
    )  # fmt: skip
    query = select(*columns).join(Job, Job.job_id == Attempt.job_id).where(Attempt.device_kind == "nvml")
    query = query.where(Attempt.reason.in_([Reason.OK, Reason.OUT_OF_MEMORY]))
    if need_key is not None:
        query = query.where(or_(Job.need_key == need_key, (Job.family == family) if family else sql("1 = 0")))
    return [
        Measured(
            device_name=row.device_name or "unknown",
            method=Method(row.method),
            family=row.family,
            need_key=row.need_key,
            planned=row.vram_planned,
            reserved=row.vram_reserved,
            peak=row.vram_process or row.vram_peak,
            out_of_memory=row.reason is Reason.OUT_OF_MEMORY,
        )
        for row in tx.session.execute(query.order_by(Attempt.started_at.desc()).limit(limit))
    ]
