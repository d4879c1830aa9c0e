"""What a replay came to: how long jobs took and waited, by what they needed, and how full the cards were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loractl.common.placement.cards import Card
from loractl.common.placement.replay import Replay, ReplayedJob
from loractl.common.placement.sizes import vram_class

from .workload import BEGIN


@dataclass(frozen=True, kw_only=True)
class Course:
    """A job from its arrival on. Seconds."""

    need: int  # bytes
    wait: float
    took: float  # from its arrival to its end


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One rule's replay of a trace."""

    courses: tuple[Course, ...]
    makespan: float  # seconds from the first arrival to the last end
    reserved: tuple[tuple[float, int], ...]  # (seconds, bytes on all cards from then on)
    total: int  # bytes of all cards

    @property
    def largest_tenth(self) -> list[Course]:
        """Jobs that need as much as the one at nine tenths of the needs, or more."""
        bound = quantile([course.need for course in self.courses], 0.9)
        return [course for course in self.courses if course.need >= bound]

    @property
    def utilisation(self) -> float:
        """The part of all cards' memory that was reserved, over the whole replay."""
        ends = (*self.reserved, (self.makespan, 0))
        used = sum(size * (after - at) for (at, size), (after, _) in pairwise(ends))
        return used / (self.total * self.makespan) if self.makespan else 0.0

    def by_class(self) -> dict[int, list[Course]]:
        """The courses by VRAM class, in GiB."""
        classes: dict[int, list[Course]] = {}
        for course in sorted(self.courses, key=lambda c: c.need):
            classes.setdefault(vram_class(course.need), []).append(course)
        return classes


def outcome_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card], replayed: Replay) -> Outcome:
    """Measure a replay from BEGIN on in which every job came to its end."""
    courses, last = [], BEGIN
    for job in jobs:
        run, since = replayed.runs[job.waiting.job_id], job.waiting.since
        assert run.ended is not None
        last = max(last, run.ended)
        courses.append(
            Course(
                need=job.waiting.least or 0,
                wait=(run.started - since).total_seconds(),
                took=(run.ended - since).total_seconds(),
            )
        )
    return Outcome(
        courses=tuple(courses),
        makespan=(last - BEGIN).total_seconds(),
        reserved=tuple(((at - BEGIN).total_seconds(), size) for at, size in replayed.reserved),
        total=sum(card.total for card in cards),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def load_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card]) -> float:
    """How busy the jobs would keep the cards, were each alone on one; above 1 whole cards can't keep up.

    Of the middle nine tenths of arrivals, which leaves a trace's long ends out. The cards that bind decide: all of
    them, or those that hold the larger jobs.
    """
    middle = jobs[len(jobs) // 20 : len(jobs) - len(jobs) // 20]
    span = (middle[-1].waiting.since - middle[0].waiting.since).total_seconds() if middle else 0.0
    if not span:
        return math.inf
    shares = []
    for below in {0, *(card.capacity for card in cards)}:
        work = sum(job.seconds or 0.0 for job in middle if (job.waiting.least or 0) > below)
        if work:
            shares.append(work / span / sum(card.capacity > below for card in cards))
    return max(shares, default=0.0)
