"""The outcome of a simulation: how long jobs took and waited under each rule, and how full the cards were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from loractl.common.placement.cards import Card
from loractl.common.placement.clock import ReplayedJob, newcomers_of
from loractl.common.placement.hosts import KEEP_WARM_S, Newcomers
from loractl.common.placement.lines import vram_class
from loractl.common.placement.replay import PlacementRule, Replay, Rule, replay

from .baselines import best_fit, fifo, shortest_first
from .workload import BEGIN, Chosen, Passes, to_replay


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A rule, and how the nodes work under it."""

    title: str  # for people; a star marks a rule that knows what no real scheduler knows
    make: Callable[[Newcomers | None, Sequence[ReplayedJob]], Rule]
    hosts: bool = False  # trainers stay with their bases
    packs: bool = False  # jobs join others in them
    spares: bool = False  # spare trainers wait for jobs
    roomy: bool = False  # jobs do without recomputing if nobody else wants the memory


def _ours(newcomers: Newcomers | None, jobs: Sequence[ReplayedJob]) -> Rule:
    roomy = {job.waiting.job_id: [one.form for one in job.roomy] for job in jobs}
    return PlacementRule(newcomers=newcomers, roomy=roomy)


POLICIES: dict[str, Contender] = {
    "loractl": Contender(title="loractl", make=_ours, hosts=True, packs=True, spares=True, roomy=True),
    "recomputing": Contender(title="recomputing", make=_ours, hosts=True, packs=True, spares=True),
    "without_packs": Contender(title="without packs", make=_ours, hosts=True, spares=True, roomy=True),
    "without_hosts": Contender(title="without hosts", make=_ours, spares=True, roomy=True),
    "fifo": Contender(title="fifo", make=lambda *_: fifo()),
    "shortest_first": Contender(title="shortest first*", make=lambda *_: shortest_first()),
    "best_fit": Contender(title="best fit", make=lambda *_: best_fit()),
}
"""The policies compared, ours first."""

RULES = ("loractl", "fifo", "shortest_first", "best_fit")
"""The policies that differ in how they place jobs."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The settings of the nodes under our rule, as the options of `loractl worker`."""

    keep_warm_s: float = KEEP_WARM_S
    spare: bool = True
    passes: Passes | None = None  # None: no job joins others in a host
    roomy: bool = False  # forms_of gives what jobs take without recomputing; False: that is unknown


@dataclass(frozen=True, kw_only=True)
class Course:
    """A job from its arrival on. Seconds."""

    need: int  # bytes
    wait: float
    took: float  # from its arrival to its end
    warm: bool = False  # it started in a host that had its base
    joined: bool = False  # others trained there
    roomy: bool = False  # it did without recomputing


@dataclass(frozen=True, kw_only=True)
class RuleOutcome:
    """One rule's replay of a trace."""

    courses: tuple[Course, ...]
    makespan: float  # seconds from the first arrival to the last end
    reserved: tuple[tuple[float, int], ...]  # (seconds, bytes on all cards from then on)
    total: int  # bytes of all cards

    @property
    def largest_tenth(self) -> list[Course]:
        """Jobs that need at least as much as the 90th percentile of the needs."""
        bound = quantile([course.need for course in self.courses], 0.9)
        return [course for course in self.courses if course.need >= bound]

    @property
    def utilisation(self) -> float:
        """The share of all cards' memory that was reserved, over the whole replay."""
        ends = (*self.reserved, (self.makespan, 0))
        used = sum(size * (after - at) for (at, size), (after, _) in pairwise(ends))
        return used / (self.total * self.makespan) if self.makespan else 0.0

    @property
    def warm(self) -> float:
        """The share of all jobs that started in a host with their base."""
        return sum(course.warm for course in self.courses) / len(self.courses) if self.courses else 0.0

    @property
    def joined(self) -> float:
        """The share of all jobs that joined others in a host."""
        return sum(course.joined for course in self.courses) / len(self.courses) if self.courses else 0.0

    @property
    def roomy(self) -> float:
        """The share of all jobs that did without recomputing."""
        return sum(course.roomy for course in self.courses) / len(self.courses) if self.courses else 0.0

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
            "warm_starts": self.warm,
            "joins": self.joined,
            "roomy": self.roomy,
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
    load: float | None  # see load_of
    nodes: Nodes
    outcomes: Mapping[str, RuleOutcome]  # by policy; ours is "loractl"

    @property
    def later(self) -> list[float]:
        """Seconds by which each job ends later because jobs are given extra memory (negative: sooner), in order of
        arrival; empty if not asked for."""
        if (without := self.outcomes.get("recomputing")) is None:
            return []
        pairs = zip(self.outcomes["loractl"].courses, without.courses, strict=True)
        return [ours.took - theirs.took for ours, theirs in pairs]

    @property
    def how_loaded(self) -> str:
        """The beginning of a phrase, like "load 0.50, "; empty if the jobs are too few to have a load."""
        if self.load is None:
            return ""
        return "all at once, " if math.isinf(self.load) else f"load {self.load:.2f}, "

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
            "keep_warm_s": self.nodes.keep_warm_s,
            "spare": self.nodes.spare,
            "micro_batch": None if self.nodes.passes is None else self.nodes.passes.tokens,
            "base_models": len(self.chosen.base_models),
            "load": None if self.load is None or math.isinf(self.load) else self.load,
            "later": {"jobs": sum(one > 0 for one in self.later), "most_s": max(self.later)} if self.later else None,
            "policies": {name: outcome.as_json() for name, outcome in self.outcomes.items()},
        }


def policies_for(chosen: Chosen, nodes: Nodes) -> tuple[str, ...]:
    """The policies that may differ on these jobs: without base models hosts change nothing."""
    idle = {"recomputing"} if not nodes.roomy else set()
    idle |= {"without_packs"} if nodes.passes is None else set()
    idle |= {"without_packs", "without_hosts"} if not chosen.base_models else set()
    return tuple(name for name in POLICIES if name not in idle)


def simulate(
    chosen: Chosen,
    cards: Sequence[Card],
    compress: float,
    contention: float,
    nodes: Nodes | None = None,
    policies: Iterable[str] | None = None,
) -> Simulation:
    """Replay the chosen jobs under each policy; `nodes`: like the defaults of `loractl worker`."""
    nodes, outcomes = nodes or Nodes(), {}
    known = [replace(card, contention=contention) for card in cards]
    for name in policies_for(chosen, nodes) if policies is None else policies:
        policy = POLICIES[name]
        passes = nodes.passes if policy.packs else None
        spare, roomy = policy.spares and nodes.spare, policy.roomy and nodes.roomy
        jobs = to_replay(chosen.jobs, compress, spare=spare, passes=passes, roomy=roomy)
        keep_warm_s = nodes.keep_warm_s if policy.hosts else 0.0
        rule = policy.make(None if passes is None else newcomers_of(jobs), jobs)
        replayed = replay(jobs, known, BEGIN, rule, contention=contention, keep_warm_s=keep_warm_s)
        outcomes[name] = outcome_of(jobs, cards, replayed)
    return Simulation(
        chosen=chosen,
        cards=tuple(cards),
        compress=compress,
        contention=contention,
        nodes=nodes,
        load=load_of(to_replay(chosen.jobs, compress), cards),
        outcomes=outcomes,
    )


def outcome_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card], replayed: Replay) -> RuleOutcome:
    """Measure a replay from BEGIN on in which every job ended."""
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
                warm=run.warm,
                joined=run.joined,
                roomy=run.reserved > (job.waiting.least or 0) and not run.joined,
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
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


RATED = 20
"""From this number of jobs on, the middle nine tenths leave some out, and arrivals have a rate."""


def load_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card]) -> float | None:
    """How busy the jobs would keep the cards if each were alone on one; above 1, whole cards can't keep up. None for a
    few jobs: the minutes in which they happen to arrive give no rate.

    Measured over the middle nine tenths of arrivals, which leaves out a trace's long ends. The scarcest cards decide:
    all of them, or those that hold the larger jobs.
    """
    if len(jobs) < RATED:
        return None
    middle = jobs[len(jobs) // RATED : len(jobs) - len(jobs) // RATED]
    span = (middle[-1].waiting.since - middle[0].waiting.since).total_seconds()
    if not span:
        return math.inf
    shares = []
    for below in {0, *(card.capacity for card in cards)}:
        work = sum(job.seconds or 0.0 for job in middle if (job.waiting.least or 0) > below)
        if work:
            shares.append(work / span / sum(card.capacity > below for card in cards))
    return max(shares, default=0.0)
