"""A replay of jobs over cards on a virtual clock: when and where each starts, under the placement rule or another.

`loractl sim` replays a trace with it, `loractl why` the jobs that wait now. Nothing here reads a clock, a file or a
database.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loractl.common.job.method import RoomyForm
from loractl.common.units import GIB

from .card_hours import QuotaMeter
from .cards import Card, Occupant
from .clock import Clock, Presence, ReplayedJob, ReplayedRun
from .lines import KeptLine, Line, Openings, Waiting
from .roomy import with_room
from .rule import OLDEST_FIRST_AFTER_S, Placement, place
from .shares import charge, decayed


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What became of the jobs; one that never started has no run."""

    runs: dict[int, ReplayedRun]
    reserved: list[tuple[dt.datetime, int]]  # bytes on all cards from each moment on


class Rule(Protocol):
    """Decides which waiting jobs start."""

    def arrived(self, job: ReplayedJob) -> None:
        """The job begins to wait."""
        ...

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> Iterable[Placement]:
        """Jobs that start now, and so leave the queue."""
        ...

    def ended(self, job_id: int, now: dt.datetime) -> None:
        """A job has left its card: this rule started it, or it ran from the beginning."""
        ...

    def next_change(self, now: dt.datetime) -> dt.datetime | None:
        """When it may start a job although no job arrives or ends and no card comes; None: never."""
        ...


def replay(
    jobs: Iterable[ReplayedJob],
    cards: Sequence[Card],
    now: dt.datetime,
    rule: Rule | None = None,
    *,
    contention: float = 0.0,
    until: int | None = None,
    presences: Mapping[str, Presence] | None = None,
) -> Replay:
    """Replay from `now` on, with the jobs that the cards have already, until nothing more happens.

    `rule`: PlacementRule() without one. `contention`: each of k jobs on a card runs at 1 / (1 + contention (k - 1)) of
    its speed, its start too; at 0 they don't slow each other, at 1 they take turns. `until`: stop once this job has
    started. `presences`: when cards are there, by name; without one a card stays, or goes as it says itself. What runs
    when its card goes waits again.
    """
    clock = Clock(now=now, cards=cards, contention=contention, presences=presences)
    rule = PlacementRule() if rule is None else rule
    coming = sorted(jobs, key=lambda job: (job.waiting.since, job.waiting.job_id))
    known = {job.waiting.job_id: job for job in coming}
    arrivals = [max(0.0, (job.waiting.since - now).total_seconds()) for job in coming]
    patience_s = _patience_s(presences or {})
    arrived, waiting, last = 0, 0, 0.0
    while True:
        arrival = arrivals[arrived] if arrived < len(coming) else None
        change = rule.next_change(clock.now) if waiting else None
        moment = _first(clock.next_change(), arrival, None if change is None else (change - now).total_seconds())
        turn = clock.next_turn() if waiting or clock.busy else None
        if turn is not None and (turn <= last + patience_s if moment is None else turn < moment):
            moment = turn
        elif moment is not None:
            last = moment
        else:
            break
        for job_id in clock.advance(moment):
            rule.ended(job_id, clock.now)
            last = moment
        for job in clock.returned():
            known[job.waiting.job_id] = job
            rule.arrived(job)
            waiting += 1
        while arrived < len(coming) and arrivals[arrived] <= moment:
            rule.arrived(coming[arrived])
            arrived += 1
            waiting += 1
        for placed in rule.starts(clock.seen(), clock.now):
            clock.start(placed, known[placed.job.job_id])
            waiting -= 1
        if until in clock.runs:
            break
    return Replay(runs=clock.runs, reserved=clock.reserved)


def _first(*moments: float | None) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _patience_s(presences: Mapping[str, Presence]) -> float:
    """For how long cards may come and go while no job arrives, starts or ends: by then each card has come once more,
    and each job has waited for as long as the rule counts."""
    cycles = (one.cycle_s for one in presences.values() if one.shut_s is not None)
    return OLDEST_FIRST_AFTER_S + 2 * max(cycles, default=0.0)


class PlacementRule:
    """The rule of `place`, with each user's charge as the database would keep it.

    `charges`: GiB hours by user at `since`, what runs there included; without them no user has used anything yet.
    `roomy`: what jobs may have beyond their needs, by number. `meter`: the card hours of users with a quota; without it
    nobody has one.
    """

    def __init__(
        self,
        charges: Mapping[str, float] | None = None,
        since: dt.datetime | None = None,
        running: Iterable[Occupant] = (),
        roomy: Mapping[int, Sequence[RoomyForm]] | None = None,
        meter: QuotaMeter | None = None,
    ) -> None:
        self._meter = meter
        self._roomy = roomy or {}
        self._levels: dict[int, dict[str, KeptLine]] = {}
        self._all = KeptLine()
        self._past: dict[str, tuple[float, dt.datetime]] = {}
        self._running: dict[int, tuple[str, int, dt.datetime, bool]] = {}  # user, bytes, from when, started here
        if since is not None:
            self._past = {user: (amount, since) for user, amount in (charges or {}).items()}
            for job in running:  # one on several cards is on each of them
                _, before, *_ = self._running.get(job.job_id, ("", 0))
                self._running[job.job_id] = (job.user, before + job.reserved, since, False)

    def arrived(self, job: ReplayedJob) -> None:
        waiting = job.waiting
        self._levels.setdefault(waiting.priority, {}).setdefault(waiting.user, KeptLine()).add(waiting)
        self._all.add(waiting)

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        if not len(self._all) or not any(card.room for card in cards):
            return []
        rationed = frozenset[str]() if self._meter is None else self._meter.rationed
        levels, oldest = self._read_levels(), self._all.reader()
        decisions = place(levels, cards, self.charges(now), now, oldest, rationed)
        placed = [decision.placed for decision in decisions if decision.placed is not None]
        for placement in placed:
            job = placement.job
            size = sum(share.bytes for share in placement.shares)
            self._running[job.job_id] = (job.user, size, now, True)
            if self._meter is not None:
                self._meter.began(placement, now)
        by_node, given = {card.node: card for card in cards}, list[Placement]()
        for placement in placed:
            self._drop(placement.job)
            card = by_node[placement.node]
            given.append(self._with_room(placement, card))
            job, size = placement.job, given[-1].reserved
            by_node[card.node] = card.with_job(Occupant(job_id=job.job_id, user=job.user, reserved=size))
        return given

    def _with_room(self, placed: Placement, card: Card) -> Placement:
        """The placement with the room that nobody else wants. Jobs that start after it still count as waiting then:
        each node claims for itself."""
        labels = frozenset({card.labels})

        def wanted(free: int) -> bool:
            openings = Openings(gpu=free, processor=(0, 0), unknown=False, labels=labels)
            return self._all.reader().next(openings) is not None

        return with_room(placed, card, self._roomy.get(placed.job.job_id, ()), wanted)

    def ended(self, job_id: int, now: dt.datetime) -> None:
        if job_id not in self._running:
            return
        user, size, since, _ = self._running.pop(job_id)
        if self._meter is not None:
            self._meter.ended(job_id, now)
        past = self._decayed(user, now)
        self._past[user] = (past + size / GIB * (now - since).total_seconds() / 3600, now)

    def next_change(self, now: dt.datetime) -> dt.datetime | None:
        """When a user whose jobs wait for a quota is below it again."""
        if self._meter is None:
            return None
        return self._meter.below_at({user for level in self._levels.values() for user in level}, now)

    def charges(self, now: dt.datetime) -> dict[str, float]:
        """GiB hours that count against each user, as `nodes.read_charges` has them."""
        running: dict[str, list[tuple[int, float]]] = {}
        known: dict[str, float] = {}
        for user, size, since, here in self._running.values():
            seconds = (now - since).total_seconds()
            if here:
                running.setdefault(user, []).append((size, seconds))
            else:  # its earlier use is in the given charges
                known[user] = known.get(user, 0.0) + size / GIB * seconds / 3600
        users = self._past.keys() | running.keys() | known.keys()
        found = {u: charge(self._decayed(u, now) + known.get(u, 0.0), running.get(u, ())) for u in users}
        if self._meter is None:
            return found
        return found | {user: quota.on(found.get(user, 0.0)) for user, quota in self._meter.at(now).items()}

    def _read_levels(self) -> Iterator[dict[str, Line]]:
        for priority in sorted(self._levels, reverse=True):
            yield {user: line.reader() for user, line in self._levels[priority].items()}

    def _decayed(self, user: str, now: dt.datetime) -> float:
        amount, at = self._past.get(user, (0.0, now))
        return decayed(amount, (now - at).total_seconds())

    def _drop(self, job: Waiting) -> None:
        self._all.remove(job)
        lines = self._levels[job.priority]
        lines[job.user].remove(job)
        if not len(lines[job.user]):
            del lines[job.user]
        if not lines:
            del self._levels[job.priority]
