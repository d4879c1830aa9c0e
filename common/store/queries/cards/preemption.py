"""Preemption: running jobs give way to a waiting one of higher priority when nothing else makes room for it."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator, Sequence

from sqlalchemy import func, or_, select, update

from loractl.common.job.status import Status
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import Queue, Waiting
from loractl.common.placement.preemption import give_way
from loractl.common.placement.rule import turns_in

from ...tables import WAITS, Job
from ...transaction import SKIP_LOCKED, Transaction
from ..lines import StoredQueue
from .decisions import decide
from .nodes import FleetState, read_fleet
from .shares import running_on

AT_ONCE = 8
"""Waiting jobs that one round tries to start: each asks the whole rule once more."""


def preempt(tx: Transaction) -> tuple[int, ...]:
    """Ask running jobs to give way to one of higher priority when nothing else helps; returns the jobs asked."""
    lowest = _lowest_willing(tx) if tx.is_alone() else None
    if lowest is None:
        return ()
    now = tx.now()
    fleet = read_fleet(tx.session, now, tx.lease_s)
    cards, queue = fleet.cards, StoredQueue(tx.session, now)
    starting = {d.placed.job.job_id for d in decide(queue, cards, fleet, now) if d.placed is not None}
    waiting = (job for job in _first_waiting(queue, fleet, now, lowest) if job.job_id not in starting)
    ways = ((job, way) for job in waiting if (way := give_way(job, cards)) is not None)
    for job, (node, going) in itertools.islice(ways, AT_ONCE):
        if _would_start(job, queue, [card.without(going) for card in cards], fleet, now):
            return going if _ask(tx, job.job_id, job.priority, node, going) else ()
    return ()


def _lowest_willing(tx: Transaction) -> int | None:
    """The lowest priority of running jobs that give way; None: none helps, or one is on the way out already."""
    willing = select(Job.priority, Job.preempted_by).where(Job.status == Status.RUNNING, Job.preemptible)
    running = tx.session.execute(willing).all()
    if not running or any(row.preempted_by is not None for row in running):
        return None
    lowest, highest = min(row.priority for row in running), select(func.max(Job.priority))
    waits = tx.session.scalar(highest.where(WAITS))
    return lowest if waits is not None and waits > lowest else None


def _first_waiting(queue: Queue, fleet: FleetState, now: dt.datetime, above: int) -> Iterator[Waiting]:
    """The first ready job of each user and priority, in the rule's order: one that can't start hides no other's."""
    labels, met = [card.labels for card in fleet.cards if card.open], set[tuple[str, int]]()
    for job in sorted(queue.firsts(), key=turns_in(fleet.by_share, fleet.charges, now)):
        could = job.bound is not None and any(job.requires <= mine for mine in labels)
        if could and job.priority > above and (job.user, job.priority) not in met:
            met.add((job.user, job.priority))
            yield job


def _would_start(job: Waiting, queue: Queue, cards: Sequence[Card], fleet: FleetState, now: dt.datetime) -> bool:
    """Whether the rule gives the job one of the cards as they are then: not where its user is at a limit, or others go
    before it or have the card kept for them."""
    then = decide(queue, cards, fleet, now)
    return any(d.placed is not None and d.placed.job.job_id == job.job_id for d in then)


def _ask(tx: Transaction, job_id: int, priority: int, node: str, going: Sequence[int]) -> bool:
    """Ask those that run on the node to give way to the job. False when one of them is ending at this moment."""
    here = or_(*(or_(Job.node == one, Job.job_id.in_(running_on(one))) for one in node.split(" and ")))
    still = select(Job.job_id).where(Job.job_id.in_(going), Job.status == Status.RUNNING, here)
    locked = tx.session.scalars(still.order_by(Job.job_id).with_for_update(**SKIP_LOCKED)).all()
    if len(locked) < len(going):
        return False
    tx.session.execute(update(Job).where(Job.job_id.in_(going)).values(preempted_by=job_id))
    for going_id in going:
        tx.tell(going_id, None, "preempt", f"asked to give way to job {job_id} (priority {priority})")
    tx.tell(job_id, None, "preempt", f"takes the room of {_listed(going)} on {node}")
    return True


def _listed(job_ids: Sequence[int]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(map(str, job_ids))}"
