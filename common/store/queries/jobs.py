"""Jobs as a person reads them: the rows, and their attempts, history, metrics and logs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select, type_coerce, union
from sqlalchemy import text as sql
from sqlalchemy.orm import aliased
from sqlalchemy.types import NullType

from loractl.common.errors import JobNotFound
from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Status
from loractl.common.memory.correction import ENGINE, Measured
from loractl.common.units import LAST_NUMBER

from ..columns import FIRST_TIME
from ..records import Choice, Page
from ..tables import (
    ON_SEVERAL_CARDS,
    PAUSED,
    WAITS,
    Attempt,
    Event,
    Job,
    JobLabel,
    LogChunk,
    MetricPoint,
    Sweep,
    Use,
    peak_of,
    ready_at,
)
from ..transaction import Transaction

_stored_priority = type_coerce(Job.priority, NullType())
"""As the row holds it: the next lower one is found by it, which may be out of an integer's bounds on SQLite."""

LOOKED_AT = 10
"""Attempts looked at for each one that is asked for: those on processors, or with others, teach no plan."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What an overview of the jobs needs: a few rows, and numbers for the rest."""

    running: list[Job]  # the oldest first
    waiting: list[Job]  # the page's, by priority, then the oldest first
    more_wait: bool  # after the page
    waiting_count: int  # all that wait
    ended: dict[Status, int]  # that succeeded and that failed since the asked moment
    sweep_ids: list[int]  # the newest sweeps with a job of these, newest last
    sweep_count: int  # all such sweeps


def read_job(tx: Transaction, job_id: int) -> Job:
    """One job as it is now. Raises JobNotFound."""
    job = tx.session.get(Job, job_id, populate_existing=True) if 0 < job_id <= LAST_NUMBER else None
    if job is None:
        raise JobNotFound(job_id)
    return job


def matching(
    *,
    statuses: Sequence[Status] = (),
    user: str | None = None,
    sweep_id: int | None = None,
) -> Select[Job]:
    """Jobs that match every given filter, newest first."""
    query = select(Job).where(*_chosen(Choice(user=user))).order_by(Job.job_id.desc())
    if statuses:
        query = query.where(Job.status.in_(statuses))
    return query if sweep_id is None else query.where(Job.sweep_id == sweep_id)


def read_numbered(tx: Transaction, job_ids: Collection[int]) -> dict[int, Job]:
    """Those of the jobs that exist, by number."""
    return {job.job_id: job for job in tx.session.scalars(select(Job).where(Job.job_id.in_(job_ids)))}


def read_users(tx: Transaction) -> list[str]:
    """Everybody who ever had a card, has one, or waits for one, by name."""
    unended = select(Job.user).where(Job.status.in_([Status.QUEUED, Status.RUNNING]))
    return sorted(tx.session.scalars(union(select(Use.user), unended)))


def newest(choice: Choice, page: Page) -> Select[Job]:
    """The page's jobs in any state, the newest first, and one more where there is one."""
    query, number = select(Job).where(*_chosen(replace(choice, label=None))), Job.job_id
    if choice.label is not None:  # by an index: rows are wide, and most lack it
        has = (JobLabel.key == choice.label[0], JobLabel.value == choice.label[1])
        if choice.user or choice.name:  # these have fewer jobs than a label may have
            query = query.where(exists().where(JobLabel.job_id == Job.job_id, *has))
        else:
            query, number = query.join(JobLabel, JobLabel.job_id == Job.job_id).where(*has), JobLabel.job_id
    query = query.order_by(number.desc()).limit(page.limit + 1)
    return query if page.after is None else query.where(number < page.after)


def read_glance(
    tx: Transaction, choice: Choice, page: Page, ended_since: dt.datetime, *, alone: bool = False, most_sweeps: int = 20
) -> Glance:
    """What runs, a page of what waits, and numbers for the rest.

    `alone`: the page has no members of sweeps. Raises JobNotFound for a page after a job that does not exist.
    """
    chosen = _chosen(choice)
    waiting = _read_waiting(tx, choice, page, alone)
    count = select(func.count()).select_from(Job).where(WAITS, *chosen)
    # no GROUP BY: SQLite would walk over all jobs by their status for it
    outcomes = (Status.SUCCEEDED, Status.FAILED)
    ended = select(*(func.count().filter(Job.status == status) for status in outcomes)).select_from(Job)
    numbers = tx.session.execute(ended.where(Job.ended_at >= ended_since, *chosen)).one()
    running = select(Job).where(Job.status == Status.RUNNING, *chosen).order_by(Job.job_id)
    sweep_count, sweep_ids = _read_live_sweeps(tx, choice, most_sweeps)
    return Glance(
        running=list(tx.session.scalars(running)),
        waiting=waiting[: page.limit],
        more_wait=len(waiting) > page.limit,
        waiting_count=tx.session.scalar(count) or 0,
        ended=dict(zip(outcomes, numbers, strict=True)),
        sweep_ids=sweep_ids,
        sweep_count=sweep_count,
    )


def _read_waiting(tx: Transaction, choice: Choice, page: Page, alone: bool) -> list[Job]:
    """The page's waiting jobs and one more where there is one: a priority at a time, as an index has them."""
    highest, found = None, list[Job]()
    if page.after is not None:
        highest = tx.session.scalar(select(_stored_priority).where(Job.job_id == read_job(tx, page.after).job_id))
    for priority in _levels(tx, highest):
        query = select(Job).where(WAITS, _stored_priority == priority, *_chosen(choice)).order_by(Job.job_id)
        if priority == highest:
            query = query.where(Job.job_id > page.after)
        if alone:
            query = query.where(Job.sweep_id.is_(None))
        found += tx.session.scalars(query.limit(page.limit + 1 - len(found)))
        if len(found) > page.limit:
            break
    return found


def _levels(tx: Transaction, highest: Any) -> Iterator[Any]:
    """The priorities of waiting jobs, from the highest down."""
    level = select(func.max(_stored_priority)).where(WAITS)
    priority = tx.session.scalar(level if highest is None else level.where(_stored_priority <= highest))
    while priority is not None:
        yield priority
        priority = tx.session.scalar(level.where(_stored_priority < priority))


def _read_live_sweeps(tx: Transaction, choice: Choice, most: int) -> tuple[int, list[int]]:
    """How many sweeps have a job that runs or waits; and the newest of them by number."""
    alive = Job.status.in_([Status.QUEUED, Status.RUNNING])
    live = exists().where(Job.sweep_id == Sweep.sweep_id, alive, *_chosen(choice))
    newest = tx.session.scalars(select(Sweep.sweep_id).where(live).order_by(Sweep.sweep_id.desc())).all()
    return len(newest), sorted(newest[:most])


def _chosen(choice: Choice) -> list[ColumnElement[bool]]:
    conditions = []
    if choice.user:
        conditions.append(Job.user == choice.user)
    if choice.name:
        conditions.append(Job.name == choice.name)
    if choice.label:
        has = (JobLabel.key == choice.label[0], JobLabel.value == choice.label[1])
        conditions.append(Job.job_id.in_(select(JobLabel.job_id).where(*has)))
    if choice.status:
        conditions.append(Job.status == choice.status)
    return conditions


def attempts(job_id: int) -> Select[Attempt]:
    """A job's attempts, the first one first."""
    return select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)


def events(job_id: int) -> Select[Event]:
    """A job's history, in its order."""
    return select(Event).where(Event.job_id == job_id).order_by(Event.event_id)


def metrics(job_id: int, name: str) -> Select[MetricPoint]:
    """The points of one metric, by attempt and step."""
    points = select(MetricPoint).where(MetricPoint.job_id == job_id, MetricPoint.name == name)
    return points.order_by(MetricPoint.attempt, MetricPoint.step)


def log(job_id: int, after: int = 0, most: int | None = None) -> Select[LogChunk]:
    """Up to `most` log chunks of all attempts, with a chunk_id above `after`."""
    chunks = select(LogChunk).where(LogChunk.job_id == job_id, LogChunk.chunk_id > after)
    return chunks.order_by(LogChunk.chunk_id).limit(most)


def read_log_end(tx: Transaction, job_id: int, chunks: int) -> list[LogChunk]:
    """The last chunks of a job's log, in their order."""
    last = select(LogChunk).where(LogChunk.job_id == job_id).order_by(LogChunk.chunk_id.desc()).limit(chunks)
    return list(tx.session.scalars(last))[::-1]


def ended(since: dt.datetime, limit: int) -> Select[Job]:
    """The jobs that ended last, the newest first."""
    return select(Job).where(Job.ended_at >= since).order_by(Job.ended_at.desc()).limit(limit)


def read_course(tx: Transaction, job_ids: Collection[int], name: str, most: int) -> list[MetricPoint]:
    """A metric of each job in its order, thinned to about `most` points a job; the last one is always there."""
    order = (MetricPoint.attempt, MetricPoint.step)
    mine = MetricPoint.job_id
    numbered = (
        select(
            MetricPoint,
            func.row_number().over(partition_by=mine, order_by=[column.desc() for column in order]).label("back"),
            func.count().over(partition_by=mine).label("count"),
        )
        .where(MetricPoint.job_id.in_(job_ids), MetricPoint.name == name)
        .subquery()
    )
    every, point = numbered.c.count // most + 1, aliased(MetricPoint, numbered)
    kept = select(point).where((numbered.c.back - 1) % every == 0)
    return list(tx.session.scalars(kept.order_by(point.job_id, point.attempt, point.step)))


def read_counts(tx: Transaction) -> dict[tuple[Status, str], int]:
    """How many jobs are in each state, and why: of a waiting one held, retry or ready; of a running one its stage; of
    an ended one its reason; empty where there is none."""
    now = tx.now()
    count = select(func.count()).select_from(Job)
    # by an index: few jobs are held or in backoff
    paused = select(Job.held, func.count()).where(WAITS, sql(PAUSED), or_(Job.held, Job.not_before > now))
    waits = {"held" if held else "retry": many for held, many in tx.session.execute(paused.group_by(Job.held))}
    waits["held"] = waits.get("held", 0) + (tx.session.scalar(count.where(WAITS, Job.awaits > 0, ~Job.held)) or 0)
    waits["ready"] = (tx.session.scalar(count.where(WAITS)) or 0) - sum(waits.values())
    counts = {(Status.QUEUED, why): many for why, many in waits.items() if many}
    stages = select(Job.status, Job.stage, func.count()).where(Job.status == Status.RUNNING)
    ended = select(Job.status, Job.reason, func.count()).where(Job.ended_at.is_not(None))
    # by the reason first: by the status SQLite would walk over all jobs
    for alike in (stages.group_by(Job.status, Job.stage), ended.group_by(Job.reason, Job.status)):
        counts |= {(status, str(why or "")): many for status, why, many in tx.session.execute(alike)}
    return counts


def read_oldest_ready(tx: Transaction) -> dt.datetime | None:
    """From when the oldest job that could be claimed now waits; None: there is none."""
    return tx.session.scalar(select(Job.waits_from).where(ready_at(tx.now())).order_by(Job.job_id).limit(1))


def read_runs(tx: Transaction, since: dt.datetime, until: dt.datetime) -> list[tuple[Attempt, dt.datetime]]:
    """The attempts that began or ended after `since`, up to `until`, and from when the job of each waited."""
    lately = or_(
        and_(Attempt.started_at > since, Attempt.started_at <= until),
        and_(Attempt.ended_at > since, Attempt.ended_at <= until),
    )
    runs = select(Attempt, Job.waits_from).join(Job, Job.job_id == Attempt.job_id).where(lately)
    return [(attempt, waits_from) for attempt, waits_from in tx.session.execute(runs)]


def read_measured(
    tx: Transaction, need_key: str | None = None, family: str | None = None, limit: int = 1000
) -> list[Measured]:
    """Attempts on real GPUs that ended well or out of memory, the newest first: all, or those of the `limit` newest
    jobs of the key and of the family.
    """
    every = select(Job.job_id, Job.family, Job.need_key)
    asked = every.subquery()
    if need_key is not None:
        ran = every.order_by(Job.job_id.desc()).limit(limit)
        alike = ran.where(sql("attempt > 0"), Job.need_key == need_key).subquery()
        related = ran.where(Job.ended_at.is_not(None), Job.family == family).subquery()
        asked = union(select(alike), *([select(related)] if family else [])).subquery()
    columns = (
        Attempt.device_name, Attempt.method, asked.c.family, asked.c.need_key, Attempt.vram_planned,
        Attempt.vram_reserved, Attempt.device_kind, Attempt.vram_process, Attempt.vram_peak, Attempt.reason,
        Attempt.roomy,
    )  # fmt: skip
    query = select(*columns).join(asked, asked.c.job_id == Attempt.job_id).where(Attempt.device_kind == "nvml")
    query = query.where(Attempt.reason.in_([Reason.OK, Reason.OUT_OF_MEMORY]), Attempt.method.in_(list(Method)))
    query = query.where(Attempt.engine == ENGINE)
    query = query.where(~ON_SEVERAL_CARDS)  # none of them holds a whole job
    if need_key is None:
        newest = select(Attempt.started_at).order_by(Attempt.started_at.desc()).offset(LOOKED_AT * limit).limit(1)
        query = query.where(Attempt.started_at >= func.coalesce(newest.scalar_subquery(), FIRST_TIME))
    return [
        Measured(
            device_name=row.device_name or "unknown",
            method=Method(row.method),
            family=row.family,
            need_key=row.need_key,
            planned=row.vram_planned,
            reserved=row.vram_reserved,
            peak=peak_of(row) or None,
            out_of_memory=row.reason is Reason.OUT_OF_MEMORY,
            roomy=bool(row.roomy),
        )
        for row in tx.session.execute(query.order_by(Attempt.started_at.desc()).limit(limit))
    ]
