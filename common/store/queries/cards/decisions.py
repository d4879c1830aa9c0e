"""What the rule decides now: of all that waits, with all cards and the hosts that take more jobs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import Session

from loractl.common.job.status import Status
from loractl.common.placement.cards import Card
from loractl.common.placement.hosts import Newcomer, RefusedJoin, looked_at, open_bases, spoilt_bases
from loractl.common.placement.lines import Line, PassedOver, PassingLine, SubstitutedLine, Waiting
from loractl.common.placement.rule import Decision, place

from ...fleet import FleetView
from ...tables import LEASES, FleetRound, Job, Node
from ...transaction import Transaction
from ..lines import read_joiners, read_levels, read_oldest, read_order
from .nodes import FleetState, drained_targets, read_allowed, read_cards, read_charges, read_failures, read_fleet
from .packs import Packs, read_packs

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The cards as the rule sees them, and what it decides; read as far as the caller asks."""

    packs: Packs
    joiners: Sequence[Waiting]  # jobs with an open host on their base
    decisions: Iterator[Decision]


def decide(
    session: Session, cards: Sequence[Card], fleet: FleetState, now: dt.datetime, passed: PassedOver | None = None
) -> Outlook:
    """`cards`: those of the fleet, as the caller knows them better. `passed`: what the rule goes without."""
    packs = read_packs(session, cards, now)
    passed = passed or PassedOver()
    joiners = [job for job in _joiners(session, packs, now) if not passed.has(job)]
    levels: Iterable[Mapping[str, Line]] = read_levels(session, now, joiners=joiners)
    oldest = read_oldest(session, now)
    if passed.jobs or passed.users:
        levels = (
            {user: PassingLine(line, passed) for user, line in level.items() if user not in passed.users}
            for level in levels
        )
        oldest = PassingLine(oldest, passed)
    decisions = _placed(fleet, packs, levels, oldest, now, joins=bool(joiners))
    return Outlook(packs=packs, joiners=joiners, decisions=decisions)


def _placed(
    fleet: FleetState,
    packs: Packs,
    levels: Iterable[Mapping[str, Line]],
    oldest: Line,
    now: dt.datetime,
    *,
    joins: bool,
) -> Iterator[Decision]:
    return place(levels, packs.cards, fleet.charges, now, oldest, packs.newcomer, joins, fleet.rationed)


def _joiners(session: Session, packs: Packs, now: dt.datetime, changed: Waiting | None = None) -> list[Waiting]:
    """Waiting jobs that have an open host on their base, one of them in another form. Without any, the rule need not
    ask for joins."""
    models = {base.base_model for card in packs.cards if card.free for base in open_bases(card)}
    joiners = read_joiners(session, now, sorted(models)) if models else []
    if joiners:
        packs.read_rows(joiners)
    if changed is not None and changed.base_model in models:
        joiners = [*(job for job in joiners if job.job_id != changed.job_id), changed]
    return joiners


def read_view(tx: Transaction) -> FleetView:
    """The whole fleet at this moment, read at once, and what starts next."""
    session, now = tx.session, tx.now()
    fleet = read_fleet(session, now)
    outlook = decide(session, fleet.cards, fleet, now)
    decisions = tuple(outlook.decisions)
    return FleetView(
        now=now,
        nodes={node.node: node for node in session.scalars(select(Node).order_by(Node.node))},
        cards={card.node: card for card in sorted(outlook.packs.cards, key=lambda card: card.node)},
        drains=drained_targets(session, now),
        running={job.job_id: job for job in session.scalars(select(Job).where(Job.status == Status.RUNNING))},
        charges=fleet.charges,
        decisions=decisions,
        round_at=session.scalar(select(FleetRound.at).where(FleetRound.name == LEASES)),
        failures=tuple(read_failures(session, now)),
        refused_joins=_refused(session, outlook, decisions, now),
        allowed=read_allowed(session, now),
    )


def read_ready(tx: Transaction, limit: int) -> list[Waiting]:
    """The first jobs that could be claimed now, in the order in which the rule tries them; at most `limit`."""
    now = tx.now()
    return read_order(tx.session, now, read_charges(tx.session, now), limit)


def read_newcomers(tx: Transaction, waiting: Sequence[Waiting]) -> dict[int, Newcomer]:
    """Those of the waiting jobs that have an open host on their base, as the rule asks for them, by number."""
    now = tx.now()
    packs = read_packs(tx.session, read_cards(tx.session, now), now)
    models = {base.base_model for card in packs.cards for base in open_bases(card)}
    found = {job.job_id: packs.newcomer(job) for job in waiting if job.base_model in models}
    return {job_id: newcomer for job_id, newcomer in found.items() if newcomer is not None}


def _refused(
    session: Session, outlook: Outlook, decisions: Sequence[Decision], now: dt.datetime
) -> dict[tuple[int, str], RefusedJoin]:
    """The waiting jobs with a host on their base, and why they did not join it: by its numbers, or as it takes no
    more, or as they train alone."""
    models = {base.base_model for card in outlook.packs.cards for base in spoilt_bases(card)}
    models -= {job.base_model for job in outlook.joiners}
    others = read_joiners(session, now, sorted(models)) if models else []
    found: dict[tuple[int, str], RefusedJoin] = {}
    for decision in decisions:
        if decision.declined is not None:
            found[decision.declined.job_id, decision.declined.refused.node] = decision.declined.refused
    for job in (*outlook.joiners, *others):
        for method in job.methods:
            for looked in looked_at(outlook.packs.cards, job, method, outlook.packs.newcomer):
                if isinstance(looked, RefusedJoin):
                    found.setdefault((job.job_id, looked.node), looked)
    return found


def read_start(tx: Transaction, changed: Waiting, spec: JobSpec | None = None) -> str | None:
    """The card that the rule would give a waiting job now if it had this form, alone or next to others on its base;
    None: no card. `spec`: the form's job file, where it has another than its row."""
    session, now = tx.session, tx.now()
    fleet = read_fleet(session, now)
    packs = read_packs(session, fleet.cards, now)
    if spec is not None:
        packs.in_other_form[changed.job_id] = spec
    joiners = _joiners(session, packs, now, changed)
    levels = read_levels(session, now, changed, joiners)
    oldest = SubstitutedLine(read_oldest(session, now), changed)
    for decision in _placed(fleet, packs, levels, oldest, now, joins=bool(joiners)):
        if decision.placed is not None and decision.placed.job.job_id == changed.job_id:
            return decision.placed.node
    return None
