"""How long jobs take under the rule's order, and under the one of before: a replay of traces at several loads.

    python -m benchmarks.placement [TRACE.csv ...] [--cards 44,32,24,18,12] [--predictions exact,noisy,absent]
                                  [--ablation]

TRACE: as `loractl sim` reads it; without one, two made-up traces. The arrivals of each are spread so that 24 cards have
a load of 0.92; more or fewer cards then give another load. Cards come in sixes: 12, 24, 48, 12, 24 and 80 GiB. Each job
is given to one of 20 users by Zipf if the trace has fewer. Bound: the larger of the mean duration and the mean time
under shortest remaining first on one machine as fast as all cards together.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from loractl.common.placement import rule
from loractl.common.placement.cards import Card
from loractl.common.placement.replay import PlacementRule, Replay, ReplayedJob, replay
from loractl.common.units import GIB
from loractl.scheduler.simulation.outcome import load_of, quantile
from loractl.scheduler.simulation.workload import BEGIN, Predictions, TraceJob, parse_fleet, read_trace, to_replay

UNIT = (12, 24, 48, 12, 24, 80)
USERS = 20
CARDS, LOAD = 24, 0.92
CONTENTION = 0.5
SHORT_S = 600.0
"""A slowdown is the time from arrival to end by the duration, or by ten minutes for shorter jobs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--cards", default="44,32,24,18,12")
    parser.add_argument("--predictions", default="exact,noisy,absent")
    parser.add_argument("--ablation", action="store_true", help="without each term; predictions exact")
    parser.add_argument("--longest", type=float, default=math.inf, help="seconds; longer jobs are left out")
    asked = parser.parse_args()
    traces = {path.name: list(read_trace(path).jobs) for path in asked.traces}
    for name, jobs in (traces or {"sweeps": list(sweeps()), "one heavy user": list(one_heavy_user())}).items():
        predictions = [Predictions(one) for one in asked.predictions.split(",")]
        ours = [Contender(title=f"now, {one.value}", known=one) for one in predictions]
        contenders = ABLATION if asked.ablation else [BEFORE, *ours]
        _trace(name, [job for job in jobs if job.seconds <= asked.longest], asked.cards, contenders)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An order, and what it knows."""

    title: str
    known: Predictions = Predictions.EXACT
    by_share: bool = False
    changed: Mapping[str, float] = field(default_factory=dict)  # constants of the rule


BEFORE = Contender(title="before", known=Predictions.ABSENT, by_share=True)

ABLATION = (
    Contender(title="now, exact"),
    Contender(title="without left", known=Predictions.ABSENT),
    Contender(title="without use", changed={"USE_S": 0.0}),
    Contender(title="use of four hours", changed={"USE_S": 4 * 3600.0}),
    Contender(title="without wait", changed={"HALF_LIFE_S": math.inf}),
    Contender(title="wait of 12 hours", changed={"HALF_LIFE_S": 12 * 3600.0}),
    Contender(title="wait of 3 days", changed={"HALF_LIFE_S": 3 * 86400.0}),
    Contender(title="no card kept", changed={"RESERVE_AFTER_S": math.inf}),
)


def _trace(name: str, jobs: Sequence[TraceJob], counts: str, contenders: Sequence[Contender]) -> None:
    """Replay one trace on each number of cards."""
    jobs = _with_users(jobs)
    compress = LOAD / (load_of(to_replay(jobs, 1.0), fleet(CARDS)) or LOAD)
    print(f"{name}: {len(jobs)} jobs, {statistics.fmean(job.seconds for job in jobs):,.0f} s in the mean")
    print(HEADER)
    for count in map(int, counts.split(",")):
        cards = fleet(count)
        plain = to_replay(jobs, compress)
        load, least = load_of(plain, cards) or 0.0, bound(plain, cards)
        print(f"{load:4.2f} {'bound':18}{least:12,.0f}")
        for one in contenders:
            asked = to_replay(jobs, compress, predictions=one.known)
            with contextlib.ExitStack() as stack:
                for constant, value in one.changed.items():
                    stack.enter_context(mock.patch.object(rule, constant, value))
                done = replay(asked, cards, BEGIN, PlacementRule(by_share=one.by_share), contention=CONTENTION)
            print(f"{load:4.2f} {one.title:18}{measured(asked, done)}", flush=True)


HEADER = "load order                     mean     median        p99    longest  slowdown  worst user"


def measured(jobs: Sequence[ReplayedJob], done: Replay) -> str:
    """Seconds from arrival to end, mean slowdown, and that of the user with the worst."""
    took, slow, by_user = list[float](), list[float](), dict[str, list[float]]()
    for job in jobs:
        ended = done.runs[job.waiting.job_id].ended
        assert ended is not None and job.seconds is not None
        took.append((ended - job.waiting.since).total_seconds())
        slow.append(took[-1] / max(job.seconds, SHORT_S))
        by_user.setdefault(job.waiting.user, []).append(slow[-1])
    worst = max(statistics.fmean(mine) for mine in by_user.values())
    times = (statistics.fmean(took), statistics.median(took), quantile(took, 0.99), max(took))
    return "{:12,.0f}{:11,.0f}{:11,.0f}{:11,.0f}".format(*times) + f"{statistics.fmean(slow):10.1f}{worst:12.1f}"


def fleet(count: int) -> list[Card]:
    return parse_fleet(",".join(f"{size}GiB" for size in itertools.islice(itertools.cycle(UNIT), count)))


def bound(jobs: Sequence[ReplayedJob], cards: Sequence[Card]) -> float:
    """A mean time that no order goes below."""
    speed = sum(card.max_jobs / (1 + CONTENTION * (card.max_jobs - 1)) for card in cards)
    coming = [((job.waiting.since - BEGIN).total_seconds(), (job.seconds or 0.0) / speed) for job in jobs]
    left, total, now = list[tuple[float, float]](), 0.0, 0.0
    for (arrival, work), (until, _) in itertools.pairwise([*coming, (math.inf, 0.0)]):
        now = max(now, arrival)
        heapq.heappush(left, (work, arrival))
        while left and now < until:
            rest, came = heapq.heappop(left)
            if now + rest > until:
                heapq.heappush(left, (rest - (until - now), came))
                break
            now += rest
            total += now - came
        now = max(now, until) if left else now
    return max(statistics.fmean(job.seconds or 0.0 for job in jobs), total / len(jobs))


def _with_users(jobs: Sequence[TraceJob]) -> list[TraceJob]:
    if len({job.user for job in jobs}) > 2:
        return list(jobs)
    rng, weights = random.Random(5), [1 / (rank + 1) for rank in range(USERS)]
    users = rng.choices(range(USERS), weights, k=len(jobs))
    return [replace(job, user=f"user{user}") for job, user in zip(jobs, users, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """How the people of a made-up lab work."""

    seed: int
    heavy: float  # part of the submissions that one user makes
    sweeps: float  # of that user's, and a fifth of it of the others'
    jobs: int = 3000

    def trace(self) -> Iterator[TraceJob]:
        rng, clock, made = random.Random(self.seed), 0.0, 0
        while made < self.jobs:
            user = 0 if rng.random() < self.heavy else rng.randrange(1, 12)
            clock += rng.expovariate(1 / 1500)
            gib = rng.choice((5, 7, 9, 11, 16, 20)) if rng.random() < 0.9 else rng.choice((30, 44, 66))
            kind, lengths = rng.random(), list[float]()
            if kind < (self.sweeps if user == 0 else self.sweeps / 5):
                middle = rng.lognormvariate(7.0, 0.8)
                lengths = [middle * rng.lognormvariate(0, 0.3) for _ in range(rng.randint(10, 60))]
            elif kind < 0.95:
                lengths = [min(86400.0, rng.lognormvariate(8.3, 1.2))]
            else:
                lengths = [rng.uniform(1, 4) * 86400]
            for seconds in lengths:
                clock, made = clock + 5, made + 1
                yield TraceJob(arrival=clock, need=gib * GIB, seconds=seconds, user=f"user{user}")


def sweeps() -> Iterator[TraceJob]:
    """12 people; sweeps of 10 to 60 jobs of 20 minutes, single ones of hours, and one in twenty of days."""
    return Lab(seed=7, heavy=0.4, sweeps=0.25).trace()


def one_heavy_user() -> Iterator[TraceJob]:
    """One of 12 people submits three quarters, half of them sweeps."""
    return Lab(seed=11, heavy=0.75, sweeps=0.5).trace()


if __name__ == "__main__":
    main()
