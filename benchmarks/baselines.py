"""Other placement rules next to ours on a fleet of your choice, in a replay. They place no real job.

    python -m benchmarks.baselines TRACE.csv --fleet 2x12GiB,2x24GiB,48GiB,80GiB [--longest SECONDS]

TRACE: a CSV with the columns arrival, vram, duration and user (0,20GiB,2h,ada), perhaps priority and base_size; or
openb's list of pods. Jobs arrive as the trace says. The columns are those of benchmarks.placement, and so is what two
jobs on a card cost each other. fifo: whole cards by age, the first blocks the rest. shortest first*: whole cards; it
knows how long each job takes, which no real scheduler does. best fit: shared cards by age.
"""

from __future__ import annotations

import argparse
import datetime as dt
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from loractl.common.placement.cards import Card, Occupant, largest_gpu, suits
from loractl.common.placement.lines import Lines, Waiting, in_turn
from loractl.common.placement.replay import PlacementRule, ReplayedJob, Rule, replay
from loractl.common.placement.rule import Placement

from .placement import CONTENTION, HEADER, measured
from .traces import BEGIN, load_of, parse_fleet, read_trace, to_replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE")
    parser.add_argument("--fleet", required=True, metavar="SIZES")
    parser.add_argument("--longest", type=float, default=math.inf, help="seconds; longer jobs are left out")
    asked = parser.parse_args()
    cards, jobs = parse_fleet(asked.fleet), [job for job in read_trace(asked.trace) if job.seconds <= asked.longest]
    held = [job for job in jobs if job.need <= largest_gpu(cards)]
    replayed = [replace(job, yields=True) for job in to_replay(held, 1.0)]
    load = load_of(replayed, cards) or 0.0
    print(f"{len(held)} jobs; larger than every card, and not replayed: {len(jobs) - len(held)}")
    print(HEADER)
    rules: dict[str, Rule] = {
        "loractl": PlacementRule(yields=True),
        "fifo": fifo(),
        "shortest first*": shortest_first(),
    }
    for title, rule in {**rules, "best fit": best_fit()}.items():
        done = replay(replayed, cards, BEGIN, rule, contention=CONTENTION)
        print(f"{load:4.2f} {title:18}{measured(replayed, done, cards)}", flush=True)


class GreedyRule:
    """Each job, in order, takes the card that it fills best.

    `shares`: several jobs on a card, up to its `max_jobs`, else one. `blocks`: a job that does not fit holds up all
    behind it, else it is passed over. `shortest`: the order is by duration, which no real scheduler knows, else by
    arrival.
    """

    def __init__(self, *, shares: bool, blocks: bool, shortest: bool = False) -> None:
        self._shares = shares
        self._blocks = blocks
        self._shortest = shortest
        self._waiting = Lines(order=self._rank)
        self._seconds: dict[int, float] = {}

    def _rank(self, job: Waiting) -> tuple[float, int]:
        return self._seconds[job.job_id] if self._shortest else 0.0, job.job_id

    def arrived(self, job: ReplayedJob) -> None:
        self._seconds[job.waiting.job_id] = math.inf if job.seconds is None else job.seconds
        self._waiting.add(job.waiting)

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        at_hand = {c.node: c if self._shares else replace(c, max_jobs=1) for c in cards if c.open}
        largest, placed = largest_gpu(cards), dict[int, Placement]()
        for job in in_turn(self._waiting, self._waiting.firsts(), self._rank, lambda job: job.job_id in placed):
            placement = _fill(job, at_hand.values(), largest)
            if placement is not None:
                placed[job.job_id] = placement
                occupant = Occupant(job_id=job.job_id, user=job.user, reserved=placement.reserved)
                at_hand[placement.node] = at_hand[placement.node].with_job(occupant)
            elif self._blocks:
                break
        for placement in placed.values():
            self._waiting.remove(placement.job)
        return list(placed.values())

    def stops(self, cards: Sequence[Card], now: dt.datetime) -> tuple[int, ...]:
        """No job gives way."""
        return ()

    def ended(self, job_id: int, now: dt.datetime) -> None:
        """Nothing depends on it."""

    def next_change(self, now: dt.datetime) -> dt.datetime | None:
        """None: it knows no quotas."""
        return None


def fifo() -> GreedyRule:
    """First in, first out on whole cards: how a lab without a scheduler queues, and Slurm without its backfill."""
    return GreedyRule(shares=False, blocks=True)


def shortest_first() -> GreedyRule:
    """The shortest job first on whole cards."""
    return GreedyRule(shares=False, blocks=False, shortest=True)


def best_fit() -> GreedyRule:
    """Best fit on shared cards by age, without priority, share or reservation."""
    return GreedyRule(shares=True, blocks=False)


def _fill(job: Waiting, cards: Iterable[Card], largest: int) -> Placement | None:
    """The preferred method that some card holds now, on the card that it fills best."""
    usable = [card for card in cards if card.slots and suits(card, job, largest)]
    for method in job.methods:
        size = job.need.of(method)
        holding = [c for c in usable if (not c.running if size is None else size <= c.free)]
        if holding:
            card = min(holding, key=lambda c: (c.free, c.node))
            return Placement(job=job, node=card.node, method=method, reserved=card.free if size is None else size)
    return None


if __name__ == "__main__":
    main()
