"""How much a waiting job asks for, and how cards and jobs are named in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.job.method import Parallel, least_need
from loractl.common.placement.gangs import gang_of
from loractl.common.store.fleet import FleetView, waiting_of

if TYPE_CHECKING:
    from loractl.common.store.tables import Job


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
    gang = gang_of(me, view.cards.values()) or (me.gangs[0] if me.gangs and not me.alone else None)
    if gang is None:
        return CardsAsked(bytes=me.least if me.gangs else job.vram_needed)
    return CardsAsked(bytes=least_need(me.methods, gang.need), cards=gang.cards, parallel=gang.parallel)


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


def numbers(jobs: Sequence[int]) -> str:
    """Jobs for a sentence, like "job 3", "jobs 3 and 1", "jobs 3, 1 and 4 more"."""
    more = f", {jobs[1]} and {len(jobs) - 2} more" if len(jobs) > 2 else f" and {jobs[1]}" if len(jobs) > 1 else ""
    return f"{'job' if len(jobs) == 1 else 'jobs'} {jobs[0]}{more}"


def when_they_end(jobs: Sequence[int]) -> str:
    """The jobs that must end, like "jobs 3 and 1 end"."""
    return f"{numbers(jobs)} {'ends' if len(jobs) == 1 else 'end'}"
