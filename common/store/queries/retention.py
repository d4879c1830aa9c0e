"""What may go, by the rows: results beyond the newest, attempts that are over, data that no job needs, past jobs."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Collection, Iterator

from sqlalchemy import ColumnElement, Select, Text, and_, cast, delete, exists, func, or_, select, update
from sqlalchemy.orm import aliased, load_only

from loractl.common.job.status import KEEPING, Status

from ..records import HELD_OUT_LOSS, Over, PastJob
from ..tables import Adapter, Attempt, Base, Event, Job, LogChunk, MetricPoint, Sweep
from ..transaction import Transaction
from .adapters import is_begun_from, is_tagged
from .backlog import open_methods
from .followers import is_named, read_named
from .lab_settings import refuse_stranger

GC = "loractl gc"

ENDED = tuple(status for status in Status if status.is_terminal)

_IDS_AT_ONCE = 500
"""The most jobs that one statement names; SQLite takes 32766 parameters, PostgreSQL 65535."""


_POINT_BYTES = 100
_ROW_BYTES = 2_000
"""About what a metric's point, and a job with its attempts, take in the database, indexes included."""


def _total(amount: ColumnElement[int], of: type[Base]) -> ColumnElement[int]:
    own = select(func.coalesce(amount, 0)).select_from(of).where(of.__table__.c.job_id == Job.job_id)
    return own.correlate(Job).scalar_subquery()


_PAST = (
    Job.job_id, Job.name, Job.user, Job.ended_at,
    _total(func.count() * _POINT_BYTES, MetricPoint).label("points_size"),
    (
        _total(func.sum(func.length(LogChunk.text)), LogChunk) + _total(func.sum(func.length(Event.text)), Event)
        + _total(func.count() * _POINT_BYTES, MetricPoint) + _ROW_BYTES
    ).label("size"),
)  # fmt: skip


def read_beyond_newest(tx: Transaction, keep: int) -> list[Job]:
    """Results beyond the `keep` newest of their user and name, oldest first; tagged results stay, and those from which
    open jobs begin. Only their numbers, users and names are read: rows are wide, and these may be all that there are.
    """
    place = func.row_number().over(partition_by=(Job.user, Job.name), order_by=(Job.ended_at.desc(), Job.job_id.desc()))
    placed = select(Job.job_id, place.label("place")).where(_has_result()).subquery()
    older = (placed.c.place > keep, ~is_tagged(), ~is_begun_from())
    found = select(Job).join(placed, placed.c.job_id == Job.job_id).where(*older).order_by(Job.job_id)
    return list(tx.session.scalars(found.options(load_only(Job.attempt, Job.user, Job.name))))


def read_over(tx: Transaction, job_ids: Collection[int], kept_since: dt.datetime | None = None) -> Over:
    """Which of these jobs, and which of their attempts, need no files any more.

    A job that failed since then keeps what a retry continues from.
    """
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


def read_needed_data(tx: Transaction, ended_since: dt.datetime, without: Collection[int] = ()) -> set[str]:
    """File names of the data sets of jobs that wait, run, have a result, or ended since then and may be retried.

    `without`: jobs with results that count as removed.
    """
    held, wanted = cast(Job.data, Text), or_(Job.status.not_in(ENDED), _has_result(), Job.ended_at >= ended_since)
    same = select(held, func.count()).where(wanted).group_by(held)  # many jobs have the same
    counts = Counter(dict(tx.session.execute(same).all()))
    for some in _parts(without):
        gone = same.where(Job.job_id.in_(some), Job.ended_at < ended_since)
        counts.subtract(dict(tx.session.execute(gone).all()))
    return {name for data, many in counts.items() if many for name in _names_in(data)}


def _names_in(data: str) -> list[str]:
    """File names of a row's data sets."""
    return [stored["uri"].rpartition("/")[2] for stored in json.loads(data).values()]


def remove_result(tx: Transaction, job_id: int, user: str, by: str = GC) -> bool:
    """Forget a job's adapter and report: their files may go then. False when it has none, it is tagged, or an
    open job begins from it.
    """
    if by != GC:
        refuse_stranger(tx, job_id, "remove the result of", user)
    gone = _drop_result(tx, job_id)
    if gone:
        tx.tell(job_id, None, "removed", f"adapter and report removed by {user} ({by})")
    return gone


def not_bound() -> Select[Job]:
    """Jobs whose results an earlier version stored: their rows don't have the hash of the manifest."""
    return select(Job).where(_has_result(), Job.manifest_sha256.is_(None)).order_by(Job.job_id)


def bind_result(tx: Transaction, job_id: int, manifest_sha256: str, user: str) -> bool:
    """Write the hash of a result's manifest into its row; False when it has none to bind, or has a hash already."""
    free = update(Job).where(Job.job_id == job_id, _has_result(), Job.manifest_sha256.is_(None))
    bound = tx.change(free.values(manifest_sha256=manifest_sha256)) == 1
    if bound:
        tx.tell(job_id, None, "bound", f"its stored result was bound to its row by {user}")
    return bound


def forget_checkpoint(tx: Transaction, job_id: int) -> int | None:
    """Forget an ended job's stored checkpoint. Returns its newest attempt: the files of those up to it may go then,
    and a retry's may not. None when the job has not ended.
    """
    ended_job = select(Job).where(Job.job_id == job_id, Job.status.in_(ENDED)).with_for_update(key_share=True)
    job = tx.session.scalars(ended_job).one_or_none()
    if job is None:
        return None
    job.checkpoint = job.begun_bf16 = None
    open_methods(job, tx.now())
    return job.attempt


def forget_finished(tx: Transaction, job_id: int, host: str, why: str) -> bool:
    """Forget what an ended job has left on a box: it may go then. False when the job has not ended."""
    ended_job = update(Job).where(Job.job_id == job_id, Job.status.in_(ENDED))
    if not tx.change(ended_job.values(result_until=None)):
        return False
    tx.change(ended_job.where(Job.result_host == host).values(result_host=None))
    tx.tell(job_id, None, "removed", f"what it left on {host} is removed: {why}")
    return True


def read_spent_logs(tx: Transaction) -> list[tuple[int, int, int]]:
    """Logs that are stored in full with their attempt's result: job, attempt and characters."""
    size = func.sum(func.length(LogChunk.text))
    stored = and_(Job.job_id == LogChunk.job_id, Job.attempt == LogChunk.attempt, Job.status == Status.SUCCEEDED)
    spent = select(Job.job_id, Job.attempt, size).join(LogChunk, stored).group_by(Job.job_id, Job.attempt)
    return [(job_id, attempt, size) for job_id, attempt, size in tx.session.execute(spent)]


def forget_log(tx: Transaction, job_id: int, attempt: int) -> None:
    """Remove an attempt's log lines."""
    own = (LogChunk.job_id == job_id) & (LogChunk.attempt == attempt)
    tx.session.execute(delete(LogChunk).where(own))


def read_past(tx: Transaction, ended_before: dt.datetime, without: Collection[int] = ()) -> list[PastJob]:
    """Jobs without a result that ended before that, by number; none of an open sweep, and none for which another job
    waits.

    `without`: jobs with results that count as removed.
    """
    found: dict[int, PastJob] = {}
    for some in (None, *_parts(without)):
        given = _may_go(ended_before) if some is None else _is_past(ended_before) & Job.job_id.in_(some)
        for row in tx.session.execute(select(*_PAST).where(given)):
            found[row.job_id] = PastJob(**row._mapping)
    return [found[job_id] for job_id in sorted(found.keys() - read_named(tx))]


def forget_jobs(tx: Transaction, job_ids: Collection[int], ended_before: dt.datetime) -> set[int]:
    """Remove such jobs with all their rows, and sweeps that have no member left; returns the jobs that went."""
    gone: set[int] = set()
    for some in _parts(set(job_ids) - read_named(tx)):
        going = select(Job.job_id).where(Job.job_id.in_(some), _may_go(ended_before))
        free = list(tx.session.scalars(going.with_for_update(skip_locked=True)))  # a look at one may not be committed
        # what hangs on a job goes with it, by its foreign key
        forgotten = delete(Job).where(Job.job_id.in_(free)).returning(Job.job_id)
        gone.update(tx.session.scalars(forgotten.execution_options(synchronize_session=False)))
    member = exists().where(Job.sweep_id == Sweep.sweep_id)
    tx.session.execute(delete(Sweep).where(~member), execution_options={"synchronize_session": False})
    tx.forget_locks()
    return gone


def read_courses(tx: Transaction, ended_before: dt.datetime) -> list[PastJob]:
    """Ended jobs that keep their result and have values of single steps, which the report has as well."""
    has_points = exists().where(MetricPoint.job_id == Job.job_id, _of_one_step())
    query = select(*_PAST).where(_is_past(ended_before), _has_result(), has_points).order_by(Job.job_id)
    return [PastJob(**row._mapping) for row in tx.session.execute(query)]


def forget_courses(tx: Transaction, job_ids: Collection[int]) -> None:
    """Remove the values of single steps; those that sweeps are judged by stay."""
    for some in _parts(job_ids):
        points = delete(MetricPoint).where(MetricPoint.job_id.in_(some), _of_one_step())
        tx.session.execute(points, execution_options={"synchronize_session": False})


def _is_past(ended_before: dt.datetime) -> ColumnElement[bool]:
    """An ended job that no member of its sweep is compared with any more."""
    other = aliased(Job)
    goes_on = exists().where(other.sweep_id == Job.sweep_id, other.status.not_in(ENDED)).correlate(Job)
    return and_(Job.status.in_(ENDED), Job.ended_at < ended_before, ~goes_on)


def _may_go(ended_before: dt.datetime) -> ColumnElement[bool]:
    return and_(_is_past(ended_before), ~_has_result(), ~is_tagged())


def _of_one_step() -> ColumnElement[bool]:
    """Not what a sweep's members are compared by."""
    return and_(MetricPoint.name != HELD_OUT_LOSS, ~MetricPoint.name.startswith("rung_", autoescape=True))


def _has_result() -> ColumnElement[bool]:
    return and_(Job.status == Status.SUCCEEDED, Job.report_uri.is_not(None))


def _drop_result(tx: Transaction, job_id: int) -> bool:
    """Forget a job's result; False when it has none, somebody has tagged it, or a job is to begin from it."""
    if is_named(tx, job_id):
        return False
    none = {"adapter_uri": None, "report_uri": None, "manifest_sha256": None}
    gone = update(Job).where(Job.job_id == job_id, _has_result(), ~is_tagged(), ~is_begun_from()).values(**none)
    if tx.session.execute(gone.returning(Job.job_id)).first() is None:
        return False
    tx.session.execute(delete(Adapter).where(Adapter.job_id == job_id))
    return True


def _parts(job_ids: Collection[int]) -> Iterator[list[int]]:
    ordered = sorted(job_ids)
    for first in range(0, len(ordered), _IDS_AT_ONCE):
        yield ordered[first : first + _IDS_AT_ONCE]
