"""How long jobs take under the order of before, under the rule's, and where long jobs give way: a replay of traces.

    python -m benchmarks.placement [TRACE.csv ...] [--cards 44,32,24,18,12] [--predictions exact,noisy,absent]
                                  [--jobs N] [--ablation] [--held-out]
    python -m benchmarks.placement --lab [--days 30]

TRACE: as benchmarks.traces reads it; without one, two made-up traces, or with --held-out two others, by which no
constant was chosen. The arrivals of each are spread so that 24 cards have a load of 0.92; more or fewer cards then
give another load. Cards come in sixes: 12, 24, 48, 12, 24 and 80 GiB. Each job
is given to one of 20 users by Zipf if the trace has fewer. Bound: the larger of the mean duration and the mean time
under shortest remaining first on one machine as fast as all cards together. Predictions are what is known of a job that
waits; what runs is measured by its trainer. By user: the least and the largest of the users' mean slowdowns. Share: the
same of what a user's mean time is of that with an equal share of the lab alone (the bound of these jobs, at a part of
its speed). Lost: the part of the jobs' own time that their stops add.

--lab: the jobs that have ended well in this many days (LORACTL_DATABASE_URL, or the home's database), on the
cards that it has now, as they were predicted then; next to others they are slower as that was measured. So an owner
sees what each order would have done.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from loractl.common.job.status import Status
from loractl.common.placement import preemption, rule
from loractl.common.placement.cards import Card, largest_gpu
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.placement.replay import PlacementRule, Replay, ReplayedJob, replay
from loractl.common.store.fleet import waiting_of
from loractl.common.store.store import Store
from loractl.common.units import GIB

from .traces import BEGIN, Predictions, TraceJob, load_of, parse_fleet, quantile, read_trace, to_replay

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
    parser.add_argument("--jobs", type=int, help="the first ones of each trace")
    parser.add_argument("--held-out", action="store_true", help="two traces by which no constant was chosen")
    parser.add_argument("--lab", action="store_true", help="replay this lab's own jobs on its cards")
    parser.add_argument("--days", type=float, default=30.0, help="of the lab's history")
    parser.add_argument("--longest", type=float, default=math.inf, help="seconds; longer jobs are left out")
    asked = parser.parse_args()
    if asked.lab:
        from loractl.scheduler.cli.session import open_session

        _, store = open_session()
        print_lab(store, asked.days)
        return
    traces = {path.name: read_trace(path) for path in asked.traces}
    made = {"sweeps": sweeps, "one heavy user": one_heavy_user}
    if asked.held_out:
        made = {"days and nights": days_and_nights, "a deadline": a_deadline}
    for name, jobs in (traces or {name: list(make()) for name, make in made.items()}).items():
        predictions = [Predictions(one) for one in asked.predictions.split(",")]
        contenders = ABLATION if asked.ablation else [BEFORE, *itertools.chain(*map(_ours, predictions))]
        some = [job for job in jobs if job.seconds <= asked.longest][: asked.jobs]
        _trace(name, some, asked.cards, contenders)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An order, and what it knows."""

    title: str
    known: Predictions = Predictions.EXACT
    by_share: bool = False
    yields: bool = False  # long jobs give way to much shorter ones
    changed: Mapping[str, float] = field(default_factory=dict)  # constants of the rule


BEFORE = Contender(title="before", known=Predictions.ABSENT, by_share=True)


def _ours(known: Predictions) -> list[Contender]:
    """Our order alone, and with giving way."""
    return [
        Contender(title=f"order, {known.value}", known=known),
        Contender(title=f"gives way, {known.value}", known=known, yields=True),
    ]


ABLATION = (
    Contender(title="order, exact"),
    Contender(title="without left", known=Predictions.ABSENT),
    Contender(title="without use", changed={"USE_S": 0.0}),
    Contender(title="use of four hours", changed={"USE_S": 4 * 3600.0}),
    Contender(title="without wait", changed={"HALF_LIFE_S": math.inf}),
    Contender(title="wait of 12 hours", changed={"HALF_LIFE_S": 12 * 3600.0}),
    Contender(title="wait of 3 days", changed={"HALF_LIFE_S": 3 * 86400.0}),
    Contender(title="no card kept", changed={"RESERVE_AFTER_S": math.inf}),
    Contender(title="gives way", yields=True),
    Contender(title=".. shares at once", yields=True, changed={"CONTENTION": 0.0}),
    Contender(title=".. twice as long", yields=True, changed={"RATIO": 2.0}),
    Contender(title=".. 8 times as long", yields=True, changed={"RATIO": 8.0}),
    Contender(title=".. undisturbed 0", yields=True, changed={"COST_SHARE": math.inf, "UNDISTURBED_S": 0.001}),
    Contender(title=".. never doubled", yields=True, changed={"_MOST_DOUBLED": 0}),
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
            asked = [replace(job, yields=True) for job in to_replay(jobs, compress, predictions=one.known)]
            with contextlib.ExitStack() as stack:
                for constant, value in one.changed.items():
                    owner = rule if hasattr(rule, constant) else preemption
                    stack.enter_context(mock.patch.object(owner, constant, value))
                decides = PlacementRule(by_share=one.by_share, yields=one.yields)
                done = replay(asked, cards, BEGIN, decides, contention=CONTENTION)
            print(f"{load:4.2f} {one.title:18}{measured(asked, done, cards)}", flush=True)


HEADER = (
    "load order                     mean     median        p99    longest  slowdown        by user         share"
    "  stops   lost"
)


def print_lab(store: Store, days: float) -> None:
    """Replay the lab's own jobs of the last days under each order."""
    now = store.now()
    jobs, cards = lab_jobs(store, now - dt.timedelta(days=days), now), lab_cards(store)
    held = [job for job in jobs if (job.waiting.least or 0) <= largest_gpu(cards)]
    if not held:
        print(f"There is nothing to replay: in {days:g} days no job has ended that a card of now holds.")
        return
    first = min(job.waiting.since for job in held)
    print(f"{len(held)} jobs of {len({job.waiting.user for job in held})} users in {days:g} days on {len(cards)} cards")
    if len(held) < len(jobs):
        print(f"Larger than every card, and not replayed: {len(jobs) - len(held)}.")
    print(HEADER)
    load = load_of(held, cards) or 0.0
    print(f"{load:4.2f} {'bound':18}{bound(held, cards):12,.0f}")
    for one in (BEFORE, Contender(title="order"), Contender(title="gives way", yields=True)):
        decides = PlacementRule(by_share=one.by_share, yields=one.yields)
        done = replay(held, cards, first, decides, contention=None)
        ended = [
            job for job in held if (run := done.runs.get(job.waiting.job_id)) is not None and run.ended is not None
        ]
        print(f"{load:4.2f} {one.title:18}{measured(ended, done, cards)}")
        if len(ended) < len(held):
            print(f"     {'':18}{len(held) - len(ended)} did not end: a label or a box that they need is not there now")


def lab_jobs(store: Store, since: dt.datetime, now: dt.datetime) -> list[ReplayedJob]:
    """The jobs that ended well since then, each with the time that its attempts had, and what was predicted of it."""
    took, predicted = dict[int, float](), dict[int, float | None]()
    for attempt, _ in sorted(store.attempts.runs(since, now), key=lambda run: run[0].attempt):
        if attempt.ended_at is not None:
            ran_s = (attempt.ended_at - attempt.started_at).total_seconds()
            took[attempt.job_id] = took.get(attempt.job_id, 0.0) + ran_s
            predicted.setdefault(attempt.job_id, attempt.seconds_predicted)
    rows = store.jobs.numbered(took).values()
    return [
        ReplayedJob(
            waiting=replace(
                waiting_of(vars(row), row.submitted_at), only_host=None, avoids=frozenset(), bf16=None, again=None,
                checkpoint_s=None, left_s=UNKNOWN_S if (known := predicted[row.job_id]) is None else known,
            ),
            seconds=took[row.job_id],
            yields=row.yields,
        )
        for row in sorted(rows, key=lambda row: row.job_id)
        if row.status is Status.SUCCEEDED
    ]  # fmt: skip


def lab_cards(store: Store) -> list[Card]:
    """The lab's cards, as if they were open and empty."""
    return [
        replace(card, running=(), outside=0, open=True, silent=False, stuck=False, left_s=None, window_s=None)
        for card in store.cards.fleet().cards.values()
    ]


def measured(jobs: Sequence[ReplayedJob], done: Replay, cards: Sequence[Card]) -> str:
    """Seconds from arrival to end, mean slowdown, those of the users with the best and the worst, the same of their
    times against an equal share, stops, and what they cost."""
    took, slow, by_user = list[float](), list[float](), dict[str, list[int]]()
    for number, job in enumerate(jobs):
        ended = done.runs[job.waiting.job_id].ended
        assert ended is not None and job.seconds is not None
        took.append((ended - job.waiting.since).total_seconds())
        slow.append(took[-1] / max(job.seconds, SHORT_S))
        by_user.setdefault(job.waiting.user, []).append(number)
    slows = [statistics.fmean(slow[number] for number in mine) for mine in by_user.values()]
    shares = [
        statistics.fmean(took[number] for number in mine) / bound([jobs[n] for n in mine], cards, len(by_user))
        for mine in by_user.values()
    ]
    times = (statistics.fmean(took), statistics.median(took), quantile(took, 0.99), max(took))
    runs = [(job, done.runs[job.waiting.job_id].stops) for job in jobs]
    work, lost = sum(job.seconds or 0.0 for job in jobs), sum(stops * job.stop_s for job, stops in runs)
    users = "".join(f"{f'{min(some):.1f} to {max(some):.1f}':>{width}}" for some, width in ((slows, 15), (shares, 14)))
    stopped = f"{sum(stops for _, stops in runs):7,}{lost / work:7.2%}"
    return "{:12,.0f}{:11,.0f}{:11,.0f}{:11,.0f}{:10.1f}".format(*times, statistics.fmean(slow)) + users + stopped


def fleet(count: int) -> list[Card]:
    return parse_fleet(",".join(f"{size}GiB" for size in itertools.islice(itertools.cycle(UNIT), count)))


def bound(jobs: Sequence[ReplayedJob], cards: Sequence[Card], parts: int = 1) -> float:
    """A mean time that no order goes below, on one of `parts` equal parts of the cards."""
    speed = sum(card.max_jobs / (1 + CONTENTION * (card.max_jobs - 1)) for card in cards) / parts
    begin = min(job.waiting.since for job in jobs)
    coming = sorted(((job.waiting.since - begin).total_seconds(), (job.seconds or 0.0) / speed) for job in jobs)
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


def days_and_nights() -> Iterator[TraceJob]:
    """15 people try short jobs by day, and leave one of 5 to 14 hours as they go home."""
    rng, jobs = random.Random(23), list[TraceJob]()
    for day in range(40):
        for user in range(15):
            if rng.random() < 0.5:
                continue
            gib = rng.choice((6, 10, 18, 22, 40))
            for _ in range(rng.randint(0, 8)):
                arrival, seconds = day * 86400 + rng.uniform(9, 18) * 3600, rng.lognormvariate(6.5, 1.0)
                jobs.append(TraceJob(arrival=arrival, need=gib * GIB, seconds=seconds, user=f"user{user}"))
            arrival, seconds = day * 86400 + rng.uniform(17, 20) * 3600, rng.uniform(5, 14) * 3600
            jobs.append(TraceJob(arrival=arrival, need=gib * GIB, seconds=seconds, user=f"user{user}"))
    return iter(sorted(jobs, key=lambda job: job.arrival))


def a_deadline() -> Iterator[TraceJob]:
    """8 people, lengths of a heavy tail; in the second half they submit four times as often."""
    rng, clock = random.Random(31), 0.0
    for number in range(1500):
        clock += rng.expovariate(1 / (2400 if number < 300 else 600))
        seconds = min(4 * 86400.0, 120.0 * rng.paretovariate(0.75))
        gib, user = rng.choice((5, 8, 11, 14, 20, 30, 60)), min(7, int(rng.expovariate(0.5)))
        yield TraceJob(arrival=clock, need=gib * GIB, seconds=seconds, user=f"user{user}")


if __name__ == "__main__":
    main()
