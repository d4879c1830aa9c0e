"""What the rule decides now, of all that waits and with all cards."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from loractl.common.job.status import Status
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import Line, PassedOver, PassingLine, SubstitutedLine, Waiting
from loractl.common.placement.rule import Decision, place

from ...fleet import FleetView
from ...tables import LEASES, FleetRound, Job, Node
from ...transaction import Transaction
from ..lines import read_levels, read_oldest, read_order
from .nodes import FleetState, drained_targets, read_allowed, read_charges, read_failures, read_fleet


def decide(
    session: Session, cards: Sequence[Card], fleet: FleetState, now: dt.datetime, passed: PassedOver | None = None
) -> Iterator[Decision]:
    """What the rule decides, read as far as the caller asks.

    `cards`: those of the fleet, as the caller knows them better. `passed`: what the rule goes without.
    """
    levels: Iterable[Mapping[str, Line]] = read_levels(session, now)
    oldest = read_oldest(session, now)
    if passed is not None and (passed.jobs or passed.users):
        levels = (
            {user: PassingLine(line, passed) for user, line in level.items() if user not in passed.users}
            for level in levels
        )
        oldest = PassingLine(oldest, passed)
    return place(levels, cards, fleet.charges, now, oldest, fleet.rationed)


def read_view(tx: Transaction) -> FleetView:
    """The whole fleet at this moment, read at once, and what starts next."""
    session, now = tx.session, tx.now()
    fleet = read_fleet(session, now)
    return FleetView(
        now=now,
        nodes={node.node: node for node in session.scalars(select(Node).order_by(Node.node))},
        cards={card.node: card for card in sorted(fleet.cards, key=lambda card: card.node)},
        drains=drained_targets(session, now),
        running={job.job_id: job for job in session.scalars(select(Job).where(Job.status == Status.RUNNING))},
        charges=fleet.charges,
        decisions=tuple(decide(session, fleet.cards, fleet, now)),
        round_at=session.scalar(select(FleetRound.at).where(FleetRound.name == LEASES)),
        failures=tuple(read_failures(session, now)),
        allowed=read_allowed(session, now),
    )


def read_ready(tx: Transaction, limit: int) -> list[Waiting]:
    """The first jobs that could be claimed now, in the order in which the rule tries them; at most `limit`."""
    now = tx.now()
    return read_order(tx.session, now, read_charges(tx.session, now), limit)


def read_start(tx: Transaction, changed: Waiting) -> str | None:
    """The card that the rule would give a waiting job now if it had this form; None: no card."""
    session, now = tx.session, tx.now()
    fleet = read_fleet(session, now)
    levels, oldest = read_levels(session, now, changed), SubstitutedLine(read_oldest(session, now), changed)
    for decision in place(levels, fleet.cards, fleet.charges, now, oldest, fleet.rationed):
        if decision.placed is not None and decision.placed.job.job_id == changed.job_id:
            return decision.placed.node
    return None
