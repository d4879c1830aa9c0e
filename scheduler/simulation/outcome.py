"""The outcome of a simulation: how long jobs took and waited under each rule, and how full the cards were."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from loractl.common.placement.card_hours import QuotaMeter
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import vram_class
from loractl.common.placement.replay import PlacementRule, Presence, Replay, ReplayedJob, ReplayedRun, Rule, replay
from loractl.common.placement.shares import Allowance

from .baselines import BlindRule, best_fit, fifo, shortest_first
from .workload import BEGIN, Chosen, Predictions, to_replay


@dataclass(frozen=True, kw_only=True)
class Briefing:
    """What a rule is told before a replay."""

    jobs: Sequence[ReplayedJob]
    totals: Mapping[str, int]  # bytes of each card
    quotas: Mapping[str, Allowance]  # by user


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A rule, and how the nodes work under it."""

    title: str  # for people; a star marks a rule that knows what no real scheduler knows
    make: Callable[[Briefing], Rule]
    fork_server: bool = False  # trainers are forks of a process that has imported all
    roomy: bool = False  # jobs do without recomputing if nobody else wants the memory


def _ours(briefing: Briefing, rule: type[PlacementRule] = PlacementRule) -> PlacementRule:
    roomy = {job.waiting.job_id: [one.form for one in job.roomy] for job in briefing.jobs}
    meter = QuotaMeter(briefing.quotas, briefing.totals) if briefing.quotas else None
    return rule(roomy=roomy, meter=meter)


_FULL = {"fork_server": True, "roomy": True}
"""All that our nodes can do."""

POLICIES: dict[str, Contender] = {
    "loractl": Contender(title="loractl", make=_ours, **_FULL),
    "without_quotas": Contender(
        title="without quotas", make=lambda briefing: _ours(replace(briefing, quotas={})), **_FULL
    ),
    "blind": Contender(title="blind", make=lambda briefing: _ours(briefing, BlindRule), **_FULL),
    "recomputing": Contender(title="recomputing", make=_ours, fork_server=True),
    "fifo": Contender(title="fifo", make=lambda _: fifo()),
    "shortest_first": Contender(title="shortest first*", make=lambda _: shortest_first()),
    "best_fit": Contender(title="best fit", make=lambda _: best_fit()),
}
"""The policies compared, ours first."""

RULES = ("loractl", "fifo", "shortest_first", "best_fit")
"""The policies that differ in how they place jobs."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The settings of the nodes under our rule, as the options of `loractl worker`."""

    fork_server: bool = True
    roomy: bool = False  # forms_of gives what jobs take without recomputing; False: that is unknown
    presences: Mapping[str, Presence] = field(default_factory=dict)  # of cards that come and go, by name


@dataclass(frozen=True, kw_only=True)
class Course:
    """A job that has ended, from its arrival on. Seconds."""

    need: int  # bytes
    wait: float
    took: float  # from its arrival to its end
    roomy: bool = False  # it did without recomputing
    job_id: int = 0
    user: str = ""


@dataclass(frozen=True, kw_only=True)
class RuleOutcome:
    """One rule's replay of a trace."""

    courses: tuple[Course, ...]
    unfinished: int = 0  # jobs that had not ended when the replay did; most of them never started
    stops: int = 0  # attempts whose card went
    in_vain: int = 0  # of these, while they loaded
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
            "mean_jct_s": mean(took) if took else None,
            "p99_jct_s": quantile(took, 0.99) if took else None,
            "mean_wait_s": mean(waits) if waits else None,
            "p99_wait_s": quantile(waits, 0.99) if waits else None,
            "largest_tenth_p99_wait_s": quantile(waits_of(self.largest_tenth), 0.99) if waits else None,
            "makespan_s": self.makespan,
            "vram_utilisation": self.utilisation,
            "roomy": self.roomy,
            "unfinished": self.unfinished,
            "stops": self.stops,
            "starts_in_vain": self.in_vain,
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
    quotas: Mapping[str, Allowance] = field(default_factory=dict)  # by user

    @property
    def later(self) -> list[float]:
        """Seconds by which each job ends later because jobs are given extra memory (negative: sooner), in order of
        arrival; empty if not asked for."""
        if (without := self.outcomes.get("recomputing")) is None:
            return []
        theirs = {course.job_id: course.took for course in without.courses}
        ours = self.outcomes["loractl"].courses
        return [course.took - theirs[course.job_id] for course in ours if course.job_id in theirs]

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
            "slow": self.chosen.slow,
            "left_out": workload.left_out,
            "users_are": workload.users_are,
            "fleet": [self._card_json(card) for card in self.cards],
            "compress": self.compress,
            "contention": self.contention,
            "fork_server": self.nodes.fork_server,
            "load": None if self.load is None or math.isinf(self.load) else self.load,
            "later": {"jobs": sum(one > 0 for one in self.later), "most_s": max(self.later)} if self.later else None,
            "quotas": [waits.as_json() for waits in self.by_user] if self.quotas else None,
            "policies": {name: outcome.as_json() for name, outcome in self.outcomes.items()},
        }

    def _card_json(self, card: Card) -> dict[str, Any]:
        presence = self.nodes.presences.get(card.node)
        open_s, shut_s = (None, None) if presence is None else (presence.open_s, presence.shut_s)
        return {"vram": card.total, "max_jobs": card.max_jobs, "open_s": open_s, "shut_s": shut_s}

    @property
    def by_user(self) -> list[QuotaWaits]:
        """How long the jobs of each user with a quota wait, and last those of all others."""
        waits = [self._waits_of(user, quota, {user}) for user, quota in self.quotas.items()]
        others = {job.user for job in self.chosen.jobs} - self.quotas.keys()
        return [*waits, self._waits_of(None, None, others)] if others else waits

    def _waits_of(self, user: str | None, quota: Allowance | None, users: Collection[str]) -> QuotaWaits:
        ours, free = (
            waits_of([course for course in self.outcomes[name].courses if course.user in users])
            for name in ("loractl", "without_quotas")
        )
        jobs = sum(job.user in users for job in self.chosen.jobs)
        return QuotaWaits(
            user=user, quota=quota, jobs=jobs, unfinished=jobs - len(ours), mean_wait_s=mean(ours) if ours else None,
            p99_wait_s=quantile(ours, 0.99) if ours else None, mean_wait_without_s=mean(free) if free else None,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuotaWaits:
    """How long the jobs of a user with a quota wait, or those of all others. Seconds; None: none of them ended."""

    user: str | None  # None: all that have none
    quota: Allowance | None
    jobs: int
    unfinished: int
    mean_wait_s: float | None
    p99_wait_s: float | None
    mean_wait_without_s: float | None  # if nobody had a quota

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names, with the quota's own among them."""
        names = ("card_hours", "window_s", "soft")
        quota = {name: None if self.quota is None else getattr(self.quota, name) for name in names}
        return {**{name: value for name, value in vars(self).items() if name != "quota"}, **quota}


def policies_for(nodes: Nodes, quotas: Mapping[str, Allowance] | None = None) -> tuple[str, ...]:
    """The policies that may differ."""
    idle = {"recomputing"} if not nodes.roomy else set()
    idle |= {"without_quotas"} if not quotas else set()
    idle |= {"blind"} if not nodes.presences else set()
    return tuple(name for name in POLICIES if name not in idle)


def simulate(
    chosen: Chosen,
    cards: Sequence[Card],
    compress: float,
    contention: float,
    nodes: Nodes | None = None,
    policies: Iterable[str] | None = None,
    quotas: Mapping[str, Allowance] | None = None,
    predictions: Predictions = Predictions.NOISY,
) -> Simulation:
    """Replay the chosen jobs under each policy; `nodes`: like the defaults of `loractl worker`."""
    nodes, outcomes = nodes or Nodes(), {}
    totals = {card.node: card.total for card in cards}
    for name in policies_for(nodes, quotas) if policies is None else policies:
        policy = POLICIES[name]
        forks, roomy = policy.fork_server and nodes.fork_server, policy.roomy and nodes.roomy
        jobs = to_replay(chosen.jobs, compress, forks=forks, roomy=roomy, predictions=predictions)
        rule = policy.make(Briefing(jobs=jobs, totals=totals, quotas=quotas or {}))
        replayed = replay(jobs, cards, BEGIN, rule, contention=contention, presences=nodes.presences)
        outcomes[name] = outcome_of(jobs, cards, replayed)
    return Simulation(
        chosen=chosen,
        cards=tuple(cards),
        compress=compress,
        contention=contention,
        nodes=nodes,
        load=load_of(to_replay(chosen.jobs, compress), cards, nodes.presences),
        outcomes=outcomes,
        quotas=quotas or {},
    )


def outcome_of(jobs: Sequence[ReplayedJob], cards: Sequence[Card], replayed: Replay) -> RuleOutcome:
    """Measure a replay from BEGIN on."""
    ran = [(job, replayed.runs[job.waiting.job_id]) for job in jobs if job.waiting.job_id in replayed.runs]
    ended = [(job, run, run.ended) for job, run in ran if run.ended is not None]
    makespan = (max((end for *_, end in ended), default=BEGIN) - BEGIN).total_seconds()
    return RuleOutcome(
        courses=tuple(_course(job, run, end) for job, run, end in ended),
        unfinished=len(jobs) - len(ended),
        stops=sum(run.attempts - (run.ended is not None) for _, run in ran),
        in_vain=sum(run.in_vain for _, run in ran),
        makespan=makespan,
        reserved=tuple(
            (seconds, size) for at, size in replayed.reserved if (seconds := (at - BEGIN).total_seconds()) <= makespan
        ),
        total=sum(card.total for card in cards),
    )


def _course(job: ReplayedJob, run: ReplayedRun, end: dt.datetime) -> Course:
    waiting, least = job.waiting, job.waiting.least or 0
    return Course(
        need=least,
        wait=(run.started - waiting.since).total_seconds(),
        took=(end - waiting.since).total_seconds(),
        roomy=run.reserved > least,
        job_id=waiting.job_id,
        user=waiting.user,
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


def load_of(
    jobs: Sequence[ReplayedJob], cards: Sequence[Card], presences: Mapping[str, Presence] | None = None
) -> float | None:
    """How busy the jobs would keep the cards if each were alone on one; above 1, whole cards can't keep up. None for a
    few jobs: the minutes in which they happen to arrive give no rate.

    Measured over the middle nine tenths of arrivals, which leaves out a trace's long ends. The scarcest cards decide:
    all of them, or those that hold the larger jobs. A card that comes and goes counts for its part of the time.
    """
    if len(jobs) < RATED:
        return None
    middle = jobs[len(jobs) // RATED : len(jobs) - len(jobs) // RATED]
    span = (middle[-1].waiting.since - middle[0].waiting.since).total_seconds()
    if not span:
        return math.inf
    last_s = (jobs[-1].waiting.since - BEGIN).total_seconds()
    there = {card.node: _part_there((presences or {}).get(card.node), last_s) for card in cards}
    shares = []
    for below in {0, *(card.capacity for card in cards)}:
        work = sum(job.seconds or 0.0 for job in middle if (job.waiting.least or 0) > below)
        if work:
            shares.append(work / span / sum(there[card.node] for card in cards if card.capacity > below))
    return max(shares, default=0.0)


def _part_there(presence: Presence | None, last_s: float) -> float:
    """The part of the time until the last arrival for which a card is there."""
    if presence is None:
        return 1.0
    if presence.shut_s is None:
        return min(1.0, presence.open_s / last_s) if last_s else 1.0
    return presence.open_s / presence.cycle_s
