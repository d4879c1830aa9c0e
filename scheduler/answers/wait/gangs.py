"""A job that several cards are to share, as it waits: which cards of a box it has room on, and which it waits for."""

from __future__ import annotations

from dataclasses import dataclass

from loractl.common.job.need import SharedNeed, least_need
from loractl.common.placement.cards import Card, room_at
from loractl.common.placement.gangs import Gathering, first_gathering, gang_of, may_share, takers
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import FleetView
from loractl.common.units import gib

ORDINALS = {2: "second", 3: "third", 4: "fourth"}


@dataclass(frozen=True, kw_only=True)
class GangWait:
    """What a job on several cards waits for."""

    sentence: str
    after: tuple[int, ...]  # the jobs that must end; empty: none, or that is not known


def shared_way(me: Waiting, view: FleetView) -> SharedNeed | None:
    """The way in which several cards are to share the job; None: one card is to have it."""
    return gang_of(me, view.cards.values()) if me.gangs else None


def gang_wait(me: Waiting, gang: SharedNeed, view: FleetView) -> GangWait:
    """The cards that the job waits for, in words: a second card of 20 GiB on heron."""
    found = gathering_of(me, gang, view)
    size = least_need(me.methods, gang.need)
    of_size = "" if size is None else f" of {gib(size)} GiB"
    if found is None:
        return GangWait(sentence=f"waits for {gang.cards} cards{of_size} of one box", after=())
    host = found.rooms[0][0].host
    full = [(card, room) for card, room in found.rooms if room.after]
    after = tuple(dict.fromkeys(job.job_id for _, room in full for job in room.after))
    if len(full) == 1 and gang.cards in ORDINALS:
        return GangWait(sentence=f"waits for a {ORDINALS[gang.cards]} card{of_size} on {host}", after=after)
    more = "more " if len(full) < gang.cards else ""
    return GangWait(sentence=f"waits for {len(full)} {more}cards{of_size} on {host}", after=after)


def gathering_of(me: Waiting, gang: SharedNeed, view: FleetView) -> Gathering | None:
    """The cards on which the job can start first; None: other programs hold too much of all."""
    found = first_gathering(me, gang, takers(me, gang, view.cards.values()), view.now)
    return None if found is None else found[1]


def part_on(me: Waiting, gang: SharedNeed, card: Card, view: FleetView) -> tuple[str, tuple[int, ...]] | None:
    """Whether a card has room for its share of the job, and who must end for that; None: it can't have a share."""
    size = least_need(me.methods, gang.need)
    if not may_share(card, me) or (room := room_at(card, size or max(1, card.capacity), view.now)) is None:
        return None
    return f"its share is {'–' if size is None else gib(size)} GiB, of {gang.cards} cards", tuple(
        job.job_id for job in room.after
    )
