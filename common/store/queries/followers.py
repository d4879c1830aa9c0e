"""Jobs after jobs: which one a job waits for, and which jobs start when one has ended.

A blocked job's row names the first job of its `after` that is not over. Its list is walked once: jobs before that one
are over.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, String, and_, cast, exists, func, or_, select
from sqlalchemy.orm import aliased

from loractl.common.job.status import Status
from loractl.common.job.sweep import no_best

from ..columns import part_of
from ..tables import WAITS, Job, after_of, sweep_of
from ..transaction import SKIP_LOCKED, Transaction
from .outbox.notices import tell_of_job
from .sweeps import read_sweeps

AT_ONCE = 100
"""Blocked jobs that one round lets go, at most."""


def first_awaited(tx: Transaction, after: Sequence[int], *, any_end: bool) -> int | None:
    """The first of these jobs that is not over; None: all are. One that is not there is not over."""
    ends = _ENDED if any_end else (Status.SUCCEEDED,)
    over = set(tx.session.scalars(select(Job.job_id).where(Job.job_id.in_(after), Job.status.in_(ends))))
    return next((job_id for job_id in after if job_id not in over), None)


def release_followers(tx: Transaction, ended: Job) -> None:
    """Release the jobs that waited for this one, which has just ended. A row that somebody keeps locked is left to the
    fleet's round."""
    tx.session.flush()
    followers = _blocked().where(Job.awaits == ended.job_id)
    _go_on(tx, followers if ended.status is Status.SUCCEEDED else followers.where(_ANY))


def release_left(tx: Transaction) -> None:
    """Release followers that `release_followers` missed: a person or an earlier version ended the job, or it ended
    during the follower's submit, or gc has removed it and a retry brought back the wait."""
    _go_on(tx, _left())


def has_left(tx: Transaction) -> bool:
    """Whether a job that nobody holds waits for that alone."""
    return tx.session.scalar(_left().with_only_columns(Job.job_id).where(~Job.held).limit(1)) is not None


def read_followers(tx: Transaction, *job_ids: int) -> list[int]:
    """The blocked jobs that are to start after these, directly or after others that are, by number."""
    found = set(job_ids)
    for follower, after in _lists(tx):  # a job waits for those before it alone
        if not found.isdisjoint(after):
            found.add(follower)
    return sorted(found.difference(job_ids))


def read_named(tx: Transaction) -> set[int]:
    """The jobs for which a blocked one waits, or will."""
    return {job_id for _, after in _lists(tx) for job_id in after}


def is_named(tx: Transaction, job_id: int) -> bool:
    """Whether a blocked job waits for this one, or will."""
    return any(job_id in after for _, after in _lists(tx, part_of(Job.spec, "after").contains(str(job_id))))


def begin_from_best(tx: Transaction, job: Job, sweep_id: int) -> None:
    """Name the member with the least held-out loss whose adapter is stored; hold the job where there is none."""
    view = next(iter(read_sweeps(tx, [sweep_id], settings=False)), None)
    best = None if view is None else view.stored_best
    if best is not None:
        job.ancestor = best.job_id
        tx.tell(job.job_id, None, "begins", f"begins from job {best.job_id}, the best of sweep {sweep_id}")
        return
    why = f"no member of sweep {sweep_id} has a held-out loss and a stored adapter; loractl cancel drops the job"
    if view is not None and view.unlike is not None:
        why = f"{no_best(view)}; loractl cancel drops the job, and loractl edit names a member"
    job.ancestor, job.held, job.message = None, True, f"held: {why}"
    tx.tell(job.job_id, None, "held", why)
    tell_of_job(tx, job)


_ENDED = tuple(status for status in Status if status.is_terminal)
_ANY = cast(part_of(Job.spec, "after_any"), String).in_(("true", "1"))  # SQLite's JSON has 1


def _blocked() -> Select[Job]:
    """Above 0: the databases take the index of blocked jobs for that."""
    return select(Job).where(WAITS, Job.awaits > 0)


@functools.cache  # building it takes as long as running it
def _left() -> Select[Job]:
    ended = aliased(Job)
    succeeded = exists().where(ended.job_id == Job.awaits, ended.status == Status.SUCCEEDED)
    over = exists().where(ended.job_id == Job.awaits, ended.status.in_(_ENDED))
    gone = ~exists().where(ended.job_id == Job.awaits)
    return _blocked().where(or_(succeeded, gone, and_(_ANY, over)))


def _lists(tx: Transaction, *also: ColumnElement[bool]) -> list[tuple[int, list[int]]]:
    """The blocked jobs by number, each with those that it is to start after. Of their specs that part alone is read: of
    15,000 jobs all of it took 270 MiB."""
    blocked = select(Job.job_id, Job.spec["after"]).where(WAITS, Job.awaits > 0, *also).order_by(Job.job_id)
    return [(job_id, after_of({"after": after})) for job_id, after in tx.session.execute(blocked)]


def _go_on(tx: Transaction, blocked: Select[Job]) -> None:
    now = tx.now()
    # the first of each job that has ended, then the second of each: a job with many followers holds up no others
    turn = func.row_number().over(partition_by=Job.awaits, order_by=Job.job_id).label("turn")
    turns = blocked.with_only_columns(Job.job_id, Job.awaits, turn).subquery()
    some = select(Job).join(turns, turns.c.job_id == Job.job_id).order_by(turns.c.turn, Job.job_id).limit(AT_ONCE)
    # PostgreSQL asks again what it has locked, of the row that is locked alone: a person may have changed it since
    some = some.where(Job.status == Status.QUEUED, Job.awaits == turns.c.awaits)
    for job in tx.session.scalars(some.with_for_update(of=Job, **SKIP_LOCKED)).all():
        job_id = job.job_id
        tx.apart(job_id, lambda job=job: _next(tx, job, now))  # type: ignore[misc]


def _next(tx: Transaction, job: Job, now: dt.datetime) -> None:
    over, after = job.awaits, job.after
    left = after[after.index(over) + 1 :] if over in after else []
    any_end = job.after_any
    there = set(tx.session.scalars(select(Job.job_id).where(Job.job_id.in_(after))))
    job.awaits = first_awaited(tx, [one for one in left if one in there], any_end=any_end)
    if job.awaits is not None:
        return
    if gone := [one for one in after if one not in there]:
        why = f"job {gone[0]}, which it was to start after, is not there any more"
        job.held, job.message = True, f"held: {why}"
        tx.tell(job.job_id, None, "held", f"{why}; loractl release lets it start")
        tell_of_job(tx, job)
        return
    if (sweep_id := sweep_of(job.spec)) is not None:
        begin_from_best(tx, job, sweep_id)
    if (patience := job.spec.get("lora_patience")) is not None and job.lora_until is not None:
        job.lora_until = now + dt.timedelta(seconds=patience)  # it begins to wait for a card now
    tx.tell(job.job_id, None, "released", f"job {over} {'has ended' if any_end else 'has succeeded'}")
