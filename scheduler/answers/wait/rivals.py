"""The rivals of a waiting job: others that could take a card that suits it, and which of them go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loractl.common.placement.cards import Card, takes
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import FleetView, waiting_of

from .cards import could_ever_hold
from .starts import REPLAYED_JOBS

if TYPE_CHECKING:
    from loractl.common.store.tables import Job


def ahead_of(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """Those of the ready jobs that the rule tries before it and that could take a card which suits it, in its order."""
    me = waiting_of(vars(job), view.now)

    def before(other: Waiting) -> bool:
        if other.priority != me.priority:
            return other.priority > me.priority
        if other.user == me.user:
            return other.job_id < me.job_id
        theirs, mine = view.charges.get(other.user, 0.0), view.charges.get(me.user, 0.0)
        return theirs < mine or (theirs == mine and other.job_id < me.job_id)

    first = [other for other in rivals(job, view, waiting) if before(other)]
    return sorted(first, key=lambda o: (-o.priority, view.charges.get(o.user, 0.0), o.job_id))


def reaches(job: Job, waiting: Sequence[Waiting]) -> bool:
    """Whether the beginning of the rule's order that was read holds all that go before the job."""
    return len(waiting) <= REPLAYED_JOBS or any(other.job_id == job.job_id for other in waiting)


def rivals(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """Other ready jobs that could take a card which suits this one."""
    me, fleet = waiting_of(vars(job), view.now), view.cards.values()

    def may_take(other: Waiting, card: Card) -> bool:
        return takes(card, other, fleet, view.largest) and could_ever_hold(other, card)

    cards = [card for card in view.cards.values() if card.open and may_take(me, card)]
    return [o for o in waiting if o.job_id != me.job_id and any(may_take(o, card) for card in cards)]
