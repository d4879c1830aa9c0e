"""Other placement rules, to compare with ours in a replay. They place no real job."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loractl.common.placement.cards import Card, Occupant, largest_gpu, suits
from loractl.common.placement.lines import Lines, Waiting, in_turn
from loractl.common.placement.replay import PlacementRule, ReplayedJob
from loractl.common.placement.rule import Placement


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


class BlindRule(PlacementRule):
    """Our rule, as if it were not told when a card goes."""

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        return super().starts([replace(card, left_s=None, window_s=None) for card in cards], now)


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
