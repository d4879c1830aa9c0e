"""The rivals of a waiting job: others that could take a card that suits it, and which of them go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loractl.common.placement.cards import Card, takes
from loractl.common.placement.gangs import may_share
from loractl.common.placement.lines import Waiting
from loractl.common.placement.rule import turn
from loractl.common.store.fleet import FleetView, waiting_of

from .starts import REPLAYED_JOBS

if TYPE_CHECKING:
    from loractl.common.store.tables import Job


def ahead_of(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """The ready jobs, in the rule's order, that the rule tries before it and that could take a card that suits it."""
    mine = turn(waiting_of(vars(job), view.now), view.charges)
    first = [other for other in rivals(job, view, waiting) if turn(other, view.charges) < mine]
    return sorted(first, key=lambda other: turn(other, view.charges))


def reaches(job: Job, waiting: Sequence[Waiting]) -> bool:
    """Whether the part of the rule's order that was read contains all that go before the job."""
    return len(waiting) <= REPLAYED_JOBS or any(other.job_id == job.job_id for other in waiting)


def rivals(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """Other ready jobs that could take a card that suits this one; if no card does, those that lack one as well."""
    me = waiting_of(vars(job), view.now)
    mine = _suiting(me, view)

    def wants(theirs: frozenset[str]) -> bool:
        return not mine.isdisjoint(theirs) if mine else not theirs

    return [other for other in waiting if other.job_id != me.job_id and wants(_suiting(other, view))]


def _suiting(job: Waiting, view: FleetView) -> frozenset[str]:
    """The open cards that the job could take. Hundreds of waiting jobs ask for the same, so the view keeps it."""
    form = (job.need, job.methods, job.requires, job.only_host, job.avoids, job.alone, job.gangs)
    found = view.suiting.get(form)
    if found is None:
        fleet = view.cards.values()

        def may_have(card: Card) -> bool:
            several = bool(job.gangs) and may_share(card, job)
            takes_it = card.open and (several or takes(card, job, fleet, view.round.largest))
            return takes_it and (job.bound or 0) <= card.usable

        found = view.suiting[form] = frozenset(card.node for card in fleet if may_have(card))
    return found
