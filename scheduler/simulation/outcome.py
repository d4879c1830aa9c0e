"""The outcome of a simulation: how long jobs took and waited under each rule, and how full the cards were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loractl.common.placement.cards import Card
from loractl.common.placement.replay import PlacementRule, Replay, ReplayedJob, Rule, replay
from loractl.common.placement.sizes import vram_class

from .baselines import best_fit, fifo, shortest_first
from .workload import BEGIN, Chosen, to_replay

RULES: dict[str, Callable[[], Rule]] = {
    "loractl": PlacementRule,
    "fifo": fifo,
    "shortest_first": shortest_first,
    "best_fit": best_fit,
}
"""The rules that are compared, ours first."""

TITLES = {"loractl": "loractl", "fifo": "fifo", "shortest_first": "shortest first*", "best_fit": "best fit"}
"""A rule's name for people. A star marks a rule that knows what no real scheduler knows."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A job from its arrival on. Seconds."""

    need: int  # bytes
    wait: float
    took: float  # from its arrival to its end


@dataclass(frozen=True, kw_only=True)
class RuleOutcome:
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

    def as_json(self) -> dict[str, Any]:
        took, waits = [c.took for c in self.courses], waits_of(self.courses)
        return {
            "mean_jct_s": mean(took),
            "p99_jct_s": quantile(took, 0.99),
            "mean_wait_s": mean(waits),
            "p99_wait_s": quantile(waits, 0.99),
            "largest_tenth_p99_wait_s": quantile(waits_of(self.largest_tenth), 0.99),
            "makespan_s": self.makespan,
            "vram_utilisation": self.utilisation,
            "waits_by_class": {
                str(size): {
                    "jobs": len(courses),
                    "mean_wait_s": mean(waits_of(courses)),
                    "p99_wait_s": quantile(waits_of(courses), 0.99),
                }
                for size, courses in self.by_class().items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was replayed, and its outcome under each rule."""

    chosen: Chosen
    cards: tuple[Card, ...]
    compress: float
    contention: float
    load: float  # see load_of
    outcomes: Mapping[str, RuleOutcome]  # by rule; ours is "loractl"

    def as_json(self) -> dict[str, Any]:
        """The simulation as JSON values. Seconds and bytes."""
        workload = self.chosen.workload
        return {
            "jobs": len(self.chosen.jobs),
            "never": self.chosen.never,
            "longer": self.chosen.longer,
            "left_out": workload.left_out,
            "users_are": workload.users_are,
            "fleet": [{"vram": card.total, "max_jobs": card.max_jobs} for card in self.cards],
            "compress": self.compress,
            "contention": self.contention,
            "load": self.load if math.isfinite(self.load) else None,
            "policies": {name: outcome.as_json() for name, outcome in self.outcomes.items()},
        }


def simulate(
    chosen: Chosen, cards: Sequence[Card], compress: float, contention: float, rules: Iterable[str] = tuple(RULES)
) -> Simulation:
    """Replay the chosen jobs under each rule."""
    jobs, outcomes = to_replay(chosen.jobs, compress), {}
    for name in rules:
        replayed = replay(jobs, cards, BEGIN, RULES[name](), contention=contention)
        outcomes[name] = outcome_of(jobs, cards, replayed)
    return Simulation(
        chosen=chosen,
        cards=tuple(cards),
        compress=compress,
        contention=contention,
        load=load_of(jobs, cards),
        outcomes=outcomes,
    )


def outcome_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card], replayed: Replay) -> RuleOutcome:
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
    return RuleOutcome(
        courses=tuple(courses),
        makespan=(last - BEGIN).total_seconds(),
        reserved=tuple(((at - BEGIN).total_seconds(), size) for at, size in replayed.reserved),
        total=sum(card.total for card in cards),
    )


def waits_of(courses: Sequence[Course]) -> list[float]:
    return [course.wait for course in courses]


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
