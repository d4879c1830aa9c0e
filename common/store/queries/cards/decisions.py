"""What the rule decides now, of all that waits and with all cards."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterator, Sequence

from sqlalchemy import select

from loractl.common.job.status import Status
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import Queue, Waiting
from loractl.common.placement.rule import Decision, place

from ...fleet import FleetView
from ...tables import LEASES, FleetRound, Job, Node
from ...transaction import Transaction
from ..lines import StoredQueue, read_order
from .nodes import FleetState, drained_targets, read_allowed, read_charges, read_failures, read_fleet
from .preemption import leaving, next_stop, read_giving_way


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
