"""What the rule decides now, of all that waits and with all cards; and which running jobs stop for a waiting one when
nothing else makes room for it."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from loractl.common.job.status import Stage, Status
from loractl.common.placement.cards import STOP_COST_S, Card, Yields
from loractl.common.placement.duration import UNKNOWN_S, Basis
from loractl.common.placement.lines import Queue, Waiting
from loractl.common.placement.preemption import Preemption, first_stop, left_s
from loractl.common.placement.rule import Decision, place
from loractl.common.units import duration

from ...fleet import LEAVES_IN_S, FleetView, GivingWay
from ...tables import GIVES_WAY_TO, LEASES, WAITS, Attempt, FleetRound, Job, LabSetting, Node
from ...transaction import SKIP_LOCKED, Transaction
from ..lab_settings import GIVE_WAY, OFF
from ..lines import StoredQueue, read_order
from .nodes import FleetState, drained_targets, read_allowed, read_charges, read_failures, read_fleet
from .shares import running_on


def decide(queue: Queue, cards: Sequence[Card], fleet: FleetState, now: dt.datetime) -> Iterator[Decision]:
    """What the rule decides. `cards`: those of the fleet, as the caller knows them better."""
    return place(queue, cards, fleet.charges, now, fleet.by_share)


def read_view(tx: Transaction) -> FleetView:
    """The whole fleet at this moment, read at once, and what starts next."""
    session, now = tx.session, tx.now()
    fleet, queue = read_fleet(session, now), StoredQueue(session, now, at_once=2)
    queue.firsts()  # all, for what waits on: the rule asks for less
    giving_way = read_giving_way(session, now)
    cards = giving_way.on(fleet.cards)
    decisions = tuple(decide(queue, fleet.cards, fleet, now))
    if (asked := next_stop(session, queue, cards, fleet, giving_way, now)) is not None:
        cards = [leaving(card, asked, now) for card in cards]
    starting = {one.placed.job.job_id for one in decisions if one.placed is not None}
    return FleetView(
        now=now,
        nodes={node.node: node for node in session.scalars(select(Node).order_by(Node.node))},
        cards={card.node: card for card in sorted(cards, key=lambda card: card.node)},
        drains=drained_targets(session, now),
        running={job.job_id: job for job in session.scalars(select(Job).where(Job.status == Status.RUNNING))},
        charges=fleet.charges,
        by_share=fleet.by_share,
        firsts=tuple(_left(queue, starting)),
        decisions=decisions,
        round_at=session.scalar(select(FleetRound.at).where(FleetRound.name == LEASES)),
        failures=tuple(read_failures(session, now)),
        allowed=read_allowed(session, now),
        giving_way=giving_way,
    )


def _left(queue: Queue, starting: Collection[int]) -> Iterator[Waiting]:
    """The firsts of what waits once some have started."""
    met = set(starting)
    for first in queue.firsts():
        job: Waiting | None = first
        while job is not None and job.job_id in met:
            job = queue.after(job) if job.job_id in starting else None
        if job is not None:
            met.add(job.job_id)
            yield job


def read_behind(tx: Transaction, job: Waiting) -> list[Waiting]:
    """The next jobs of its line."""
    return StoredQueue(tx.session, tx.now(), at_once=2).behind(job)


def read_ready(tx: Transaction, limit: int) -> list[Waiting]:
    """The first jobs that could be claimed now, in the order in which the rule tries them; at most `limit`."""
    now = tx.now()
    return read_order(tx.session, now, read_charges(tx.session, now), limit)


def preempt(tx: Transaction) -> tuple[int, ...]:
    """Ask running jobs to give way to a waiting one when nothing else helps it; returns the jobs asked."""
    if not tx.is_alone() or not _may_help(tx):
        return ()
    now = tx.now()
    fleet, giving_way = read_fleet(tx.session, now, tx.lease_s), read_giving_way(tx.session, now)
    cards = giving_way.on(fleet.cards)
    found = next_stop(tx.session, StoredQueue(tx.session, now), cards, fleet, giving_way, now)
    if found is None:
        return ()
    going = {one.job_id: one for card in cards for one in card.running if one.job_id in found.going}
    return found.going if _ask(tx, found, {number: left_s(one, now) for number, one in going.items()}) else ()


def next_stop(
    session: Session,
    queue: Queue,
    cards: Sequence[Card],
    fleet: FleetState,
    giving_way: GivingWay,
    now: dt.datetime,
) -> Preemption | None:
    """Which jobs a round asks to stop now. `cards`: with what decides it."""

    def may_ask(job: Waiting) -> bool:
        return session.scalar(select(Job.yields).where(Job.job_id == job.job_id)) is True

    return first_stop(
        queue, cards, fleet.charges, now,
        by_share=fleet.by_share, yields=giving_way.is_on, least_s=giving_way.least_s, may_ask=may_ask,
    )  # fmt: skip


def leaving(card: Card, asked: Preemption, now: dt.datetime) -> Card:
    """The card once its jobs have been asked to stop."""
    soon = now + dt.timedelta(seconds=LEAVES_IN_S)
    running = [
        replace(one, gives_way_to=asked.job.job_id, ends=soon) if one.job_id in asked.going else one
        for one in card.running
    ]
    return replace(card, running=tuple(running))


def _may_help(tx: Transaction) -> bool:
    """Whether a running job may be stopped for one that waits, by the least that says so. None is on the way out."""
    willing = select(Job.priority, Job.preempted_by, Job.preemptible, Job.yields)
    some = or_(Job.preemptible, Job.yields, Job.preempted_by.is_not(None))
    running = tx.session.execute(willing.where(Job.status == Status.RUNNING, some)).all()
    going = sum(row.preempted_by is not None for row in running)
    if not running or (going and _withdraw(tx) < going):
        return False
    highest = tx.session.scalar(select(func.max(Job.priority)).where(WAITS))
    return highest is not None and any(row.yields or row.priority < highest for row in running)


def _withdraw(tx: Transaction) -> int:
    """Withdraw the stops that help nobody any more, as heartbeats already have it; how many these were."""
    over = select(Job).where(Job.status == Status.RUNNING, Job.preempted_by.is_not(None), GIVES_WAY_TO.is_(None))
    jobs = tx.session.scalars(over.order_by(Job.job_id).with_for_update(**SKIP_LOCKED)).all()
    for job in jobs:
        tx.tell(job.job_id, None, "preempt", f"need not give way to job {job.preempted_by} any more")
        job.preempted_by = None
    return len(jobs)


_SET = select(LabSetting.value).where(LabSetting.name == GIVE_WAY)
_YIELDING = select(
    Job.job_id,
    Job.stops,
    Job.started_at,
    Job.eta_seconds,
    Attempt.prepared_s,
    Attempt.trained_s,
    Attempt.trained_steps,
    Attempt.seconds_predicted,
    Attempt.predicted_by,
).outerjoin(Attempt, (Attempt.job_id == Job.job_id) & (Attempt.attempt == Job.attempt))
_YIELDING = _YIELDING.join(Node, (Node.node == Job.node) & ~Node.keeps_jobs)
# what evaluates or stores is nearly done, and what prepares has not begun
_YIELDING = _YIELDING.where(Job.status == Status.RUNNING, Job.yields, Job.stage == Stage.TRAINING)


def read_giving_way(session: Session, now: dt.datetime) -> GivingWay:
    """What decides whether running jobs yield to much shorter ones."""
    rows = session.execute(_YIELDING).all()
    said = session.scalar(_SET) or ""
    return GivingWay(
        is_on=said != OFF,
        least_s=float(said) if _SECONDS.fullmatch(said) else None,
        jobs={row.job_id: _yields(row, now) for row in rows},
    )


_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


def _yields(row: Any, now: dt.datetime) -> Yields:
    """A stop costs what its attempt needed to load, and about the time to store a checkpoint and to end a step, which
    nobody cuts off."""
    step_s = row.trained_s / row.trained_steps if row.trained_s and row.trained_steps else 0.0
    cost_s = STOP_COST_S if row.prepared_s is None else row.prepared_s + LEAVES_IN_S + step_s
    slowed = 1.0
    if row.predicted_by is Basis.LIKE and row.seconds_predicted and row.eta_seconds is not None:
        slowed = max(1.0, ((now - row.started_at).total_seconds() + row.eta_seconds) / row.seconds_predicted)
    return Yields(stops=row.stops, cost_s=cost_s, slowed=slowed)


def count_never_yielding(tx: Transaction) -> int:
    """Waiting and running jobs that yield to no shorter one."""
    there = select(func.count()).where(Job.status.in_((Status.QUEUED, Status.RUNNING)), ~Job.yields)
    return tx.session.scalar(there) or 0


def _ask(tx: Transaction, asked: Preemption, left: Mapping[int, float]) -> bool:
    """Ask those that run on the node to give way to the job. False when one of them is ending at this moment."""
    here = or_(*(or_(Job.node == one, Job.job_id.in_(running_on(one))) for one in asked.node.split(" and ")))
    still = select(Job.job_id).where(Job.job_id.in_(asked.going), Job.status == Status.RUNNING, here)
    locked = tx.session.scalars(still.order_by(Job.job_id).with_for_update(**SKIP_LOCKED)).all()
    job = asked.job
    waits = tx.session.scalar(select(Job.job_id).where(Job.job_id == job.job_id, WAITS))
    if len(locked) < len(asked.going) or waits is None:
        return False
    change = update(Job).where(Job.job_id.in_(asked.going))
    tx.session.execute(change.values(preempted_by=job.job_id))
    for going in asked.going:
        why = f"priority {job.priority}"
        if asked.is_shorter:
            mine = "nobody knows, so an hour," if job.left_s == UNKNOWN_S else duration(job.left_s)
            why = f"much shorter: {mine} against {duration(left[going])} left"
        tx.tell(going, None, "preempt", f"asked to give way to job {job.job_id} ({why})")
    tx.tell(job.job_id, None, "preempt", f"takes the room of {_listed(asked.going)} on {asked.node}")
    return True


def _listed(job_ids: Sequence[int]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(map(str, job_ids))}"
