"""A job on several cards: which cards of a box have room for it, which it waits for, and how they are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.job.method import Parallel, SharedNeed, least_need
from loractl.common.placement.gangs import Gathering, first_gathering, takers
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import FleetView, waiting_of
from loractl.common.units import gib

if TYPE_CHECKING:
    from loractl.common.store.tables import Job

ORDINALS = {2: "second", 3: "third", 4: "fourth"}


@dataclass(frozen=True, kw_only=True)
class CardsAsked:
    """How much a waiting job asks for."""

    bytes: int | None  # of its card, or of each of several; None: unknown
    cards: int = 1
    parallel: Parallel = Parallel.NONE

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return {**vars(self), "parallel": self.parallel.value}


def asked_of(job: Job, view: FleetView) -> CardsAsked:
    """What a waiting job asks of the current fleet."""
    me = waiting_of(vars(job), view.now)
    gang = view.round.gang_of(me) or (me.gangs[0] if me.gangs and not me.alone else None)
    if gang is None:
        return CardsAsked(bytes=me.least if me.gangs else job.vram_needed)
    return CardsAsked(bytes=least_need(me.methods, gang.need), cards=gang.cards, parallel=gang.parallel)


def gang_wait(me: Waiting, gang: SharedNeed, view: FleetView) -> tuple[str, str]:
    """What the job waits for, as a word and a sentence: a second card of 20 GiB on heron when job 12 ends."""
    found = gathering_of(me, gang, view)
    size = least_need(me.methods, gang.need)
    of_size = "" if size is None else f" of {gib(size)} GiB"
    if found is None:
        return "memory", f"waits for {gang.cards} cards{of_size} of one box"
    full = [(card, room) for card, room in found.rooms if room.after] or found.rooms
    after = tuple(dict.fromkeys(job.job_id for _, room in full for job in room.after))
    more = "more " if len(full) < gang.cards else ""
    second = len(full) == 1 and gang.cards in ORDINALS
    wanted = f"a {ORDINALS[gang.cards]} card" if second else f"{len(full)} {more}cards"
    ends = f" when {when_they_end(after)}" if after else ""
    only_slot = size is not None and all(card.free >= size for card, _ in full)
    return "busy" if only_slot else "memory", f"waits for {wanted}{of_size} on {found.rooms[0][0].host}{ends}"


def gathering_of(me: Waiting, gang: SharedNeed, view: FleetView) -> Gathering | None:
    """The cards on which the job can start first; None: other programs hold too much of all cards."""
    found = first_gathering(me, gang, takers(me, gang, view.cards.values()), view.now)
    return None if found is None else found[1]


def in_words(cards: Sequence[str]) -> str:
    """Cards, or jobs, for a sentence, like "heron:0, heron:1 and heron:2"."""
    *first, last = cards
    return f"{', '.join(first)} and {last}" if first else last


def in_short(cards: Sequence[str]) -> str:
    """Cards for a table: several of one box like "heron 0, 1", one by its name."""
    boxes = {card.rpartition(":")[0] for card in cards}
    if len(cards) < 2 or len(boxes) > 1:
        return ", ".join(cards)
    indexes = sorted((card.rpartition(":")[2] for card in cards), key=lambda index: (len(index), index))
    return f"{boxes.pop()} {', '.join(indexes)}"


def when_they_end(jobs: Sequence[int]) -> str:
    """The jobs that must end, like "jobs 3 and 1 end"."""
    more = f", {jobs[1]} and {len(jobs) - 2} more" if len(jobs) > 2 else f" and {jobs[1]}" if len(jobs) > 1 else ""
    return f"{'job' if len(jobs) == 1 else 'jobs'} {jobs[0]}{more} {'ends' if len(jobs) == 1 else 'end'}"
