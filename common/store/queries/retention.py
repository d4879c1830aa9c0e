"""Which files may go, by the rows: results beyond the newest, attempts that are over, data that no job needs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterator

from sqlalchemy import ColumnElement, Select, and_, delete, func, or_, select, update

from loractl.common.job.status import KEEPING, Status

from ..records import Over, SpentLog
from ..tables import Adapter, Attempt, Job, LogChunk
from ..transaction import Transaction
from .adapters import is_tagged

ENDED = tuple(status for status in Status if status.is_terminal)

_IDS_AT_ONCE = 500
"""The most jobs that one statement names; SQLite takes 32766 parameters, PostgreSQL 65535."""


def beyond_newest(keep: int) -> Select[Job]:
    """Results beyond the `keep` newest of their user and name, oldest first; tagged ones stay."""
    place = func.row_number().over(partition_by=(Job.user, Job.name), order_by=(Job.ended_at.desc(), Job.job_id.desc()))
    placed = select(Job.job_id, place.label("place")).where(_has_result()).subquery()
    return (
        select(Job)
        .join(placed, placed.c.job_id == Job.job_id)
        .where(placed.c.place > keep, ~is_tagged())
        .order_by(Job.job_id)
    )


def read_over(tx: Transaction, job_ids: Collection[int], kept_since: dt.datetime | None) -> Over:
    known: set[int] = set()
    jobs: set[int] = set()
    attempts: set[tuple[int, int]] = set()
    for some in _parts(job_ids):
        columns = (Job.job_id, Job.status, Job.reason, Job.ended_at)
        for job in tx.session.execute(select(*columns).where(Job.job_id.in_(some))):
            known.add(job.job_id)
            keeps = kept_since is not None and job.reason in KEEPING and (job.ended_at or kept_since) >= kept_since
            if job.status.is_terminal and not keeps:
                jobs.add(job.job_id)
        accepted = and_(_has_result(), Job.attempt == Attempt.attempt)
        over = select(Attempt.job_id, Attempt.attempt).join(Job, Job.job_id == Attempt.job_id)
        over = over.where(Attempt.job_id.in_(some), Attempt.ended_at.is_not(None), ~accepted)
        attempts.update((job_id, attempt) for job_id, attempt in tx.session.execute(over))
    return Over(known=frozenset(known), jobs=frozenset(jobs), attempts=frozenset(attempts))


def read_needed_data(tx: Transaction, ended_since: dt.datetime, without: Collection[int]) -> set[str]:
    """File names of the data sets of jobs that wait, run, have a result, or ended since then and may be retried.

    `without`: jobs with results that count as removed.
    """
    needed: set[str] = set()
    wanted = or_(Job.status.not_in(ENDED), _has_result(), Job.ended_at >= ended_since)
    for job in tx.session.execute(select(Job.job_id, Job.data, Job.ended_at).where(wanted)):
        if job.job_id in without and job.ended_at is not None and job.ended_at < ended_since:
            continue
        needed.update(stored["uri"].rpartition("/")[2] for stored in job.data.values() if stored)
    return needed


def remove_result(tx: Transaction, job_id: int, user: str, by: str) -> bool:
    gone = _drop_result(tx, job_id)
    if gone:
        tx.tell(job_id, None, "removed", f"adapter and report removed by {user} ({by})")
    return gone


def not_bound() -> Select[Job]:
    return select(Job).where(_has_result(), Job.manifest_sha256.is_(None)).order_by(Job.job_id)


def bind_result(tx: Transaction, job_id: int, manifest_sha256: str, user: str) -> bool:
    free = update(Job).where(Job.job_id == job_id, _has_result(), Job.manifest_sha256.is_(None))
    bound = tx.change(free.values(manifest_sha256=manifest_sha256)) == 1
    if bound:
        tx.tell(job_id, None, "bound", f"its stored result was bound to its row by {user}")
    return bound


def forget_checkpoint(tx: Transaction, job_id: int) -> bool:
    ended_job = update(Job).where(Job.job_id == job_id, Job.status.in_(ENDED))
    return tx.change(ended_job.values(checkpoint=None)) == 1


def forget_finished(tx: Transaction, job_id: int, host: str) -> bool:
    ended_job = update(Job).where(Job.job_id == job_id, Job.status.in_(ENDED))
    tx.change(ended_job.where(Job.result_host == host).values(result_host=None))
    return tx.change(ended_job.values(result_until=None)) == 1


def read_spent_logs(tx: Transaction) -> list[SpentLog]:
    """Logs that are stored in full with their attempt's result."""
    size = func.sum(func.length(LogChunk.text))
    stored = and_(Job.job_id == LogChunk.job_id, Job.attempt == LogChunk.attempt, Job.status == Status.SUCCEEDED)
    spent = select(Job.job_id, Job.attempt, size).join(LogChunk, stored).group_by(Job.job_id, Job.attempt)
    return [
        SpentLog(job_id=job_id, attempt=attempt, size=chars) for job_id, attempt, chars in tx.session.execute(spent)
    ]


def forget_log(tx: Transaction, log: SpentLog) -> None:
    own = (LogChunk.job_id == log.job_id) & (LogChunk.attempt == log.attempt)
    tx.session.execute(delete(LogChunk).where(own))


def _has_result() -> ColumnElement[bool]:
    return and_(Job.status == Status.SUCCEEDED, Job.report_uri.is_not(None))


def _drop_result(tx: Transaction, job_id: int) -> bool:
    """Forget a job's result; False when it has none, or somebody has tagged it."""
    none = {"adapter_uri": None, "report_uri": None, "manifest_sha256": None}
    gone = update(Job).where(Job.job_id == job_id, _has_result(), ~is_tagged()).values(**none)
    if tx.session.execute(gone.returning(Job.job_id)).first() is None:
        return False
    tx.session.execute(delete(Adapter).where(Adapter.job_id == job_id))
    return True


def _parts(job_ids: Collection[int]) -> Iterator[list[int]]:
    ordered = sorted(job_ids)
    for first in range(0, len(ordered), _IDS_AT_ONCE):
        yield ordered[first : first + _IDS_AT_ONCE]
