"""A replay of jobs over cards on a virtual clock: when and where each starts, under the placement rule or another.

`loractl sim` replays a trace with it, `loractl why` the jobs that wait now. Nothing here reads a clock, a file or a
database.
"""

from __future__ import annotations

import datetime as dt
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from loractl.common.job.method import Method
from loractl.common.units import GIB

from .cards import Card, Occupant
from .lines import KeptLine, Line, Waiting
from .rule import Placement, place
from .shares import charge, decayed


@dataclass(frozen=True, kw_only=True)
class ReplayedJob:
    """A job to replay; it arrives at `waiting.since`."""

    waiting: Waiting
    seconds: float | None  # it takes so long with a card of its own; None: not known, it never ends


@dataclass(frozen=True, kw_only=True)
class ReplayedRun:
    """When and where a job ran."""

    node: str
    method: Method
    reserved: int  # bytes
    started: dt.datetime
    ended: dt.datetime | None  # None: it was still running when the replay stopped


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


def replay(
    jobs: Iterable[ReplayedJob],
    cards: Sequence[Card],
    now: dt.datetime,
    rule: Rule | None = None,
    *,
    contention: float = 0.0,
    until: int | None = None,
) -> Replay:
    """Replay from `now` on, with the jobs that run on the cards already, until nothing more happens.

    `rule`: PlacementRule() without one. `contention`: each of k jobs on a card runs at 1 / (1 + contention (k - 1)) of
    its speed; at 0 they don't slow each other, at 1 they take turns. `until`: stop once this job has started.
    """
    clock = _Clock(now=now, cards=cards, contention=contention)
    rule = PlacementRule() if rule is None else rule
    coming = sorted(jobs, key=lambda job: (job.waiting.since, job.waiting.job_id))
    seconds = {job.waiting.job_id: job.seconds for job in coming}
    arrivals = [max(0.0, (job.waiting.since - now).total_seconds()) for job in coming]
    arrived = 0
    while True:
        moment = clock.next_end()
        if arrived < len(coming) and (moment is None or arrivals[arrived] <= moment):
            moment = arrivals[arrived]
        if moment is None:
            break
        for job_id in clock.advance(moment):
            rule.ended(job_id, clock.at(moment))
        while arrived < len(coming) and arrivals[arrived] <= moment:
            rule.arrived(coming[arrived])
            arrived += 1
        for placed in rule.starts(list(clock.cards.values()), clock.at(moment)):
            clock.start(placed, seconds[placed.job.job_id])
        if until in clock.runs:
            break
    return Replay(runs=clock.runs, reserved=clock.reserved)


@dataclass(kw_only=True)
class _Running:
    """A job on its card: the work that is left, in seconds of a card of its own, as of some moment."""

    node: str
    left: float | None
    since: float
    speed: float = 1.0
    version: int = 0  # of its expected end

    @property
    def end(self) -> float | None:
        return None if self.left is None else self.since + self.left / self.speed


class _Clock:
    """The cards and their jobs over time. Times are seconds since the replay began."""

    def __init__(self, *, now: dt.datetime, cards: Sequence[Card], contention: float) -> None:
        self._began = now
        self.cards = {card.node: card for card in cards}
        self._contention = contention
        self.runs: dict[int, ReplayedRun] = {}
        self.reserved: list[tuple[dt.datetime, int]] = [
            (now, sum(job.reserved for card in cards for job in card.running))
        ]
        self._jobs: dict[int, _Running] = {}
        self._ends: list[tuple[float, int, int]] = []  # when, job_id, version
        self._moment = 0.0
        for card in cards:
            speed = self._speed(len(card.running))
            for job in card.running:
                # its expected end was measured while others shared the card: its time alone follows from that
                left = None if job.ends is None else max(0.0, (job.ends - now).total_seconds()) * speed
                self._jobs[job.job_id] = _Running(node=card.node, left=left, since=0.0, speed=speed)
                self._expect(job.job_id)

    def at(self, moment: float) -> dt.datetime:
        return self._began + dt.timedelta(seconds=moment)

    def next_end(self) -> float | None:
        while self._ends:
            when, job_id, version = self._ends[0]
            if job_id in self._jobs and self._jobs[job_id].version == version:
                return when
            heapq.heappop(self._ends)
        return None

    def advance(self, moment: float) -> list[int]:
        """Let time pass; the jobs that have ended by then, in the order of their ends."""
        self._moment = moment
        gone = []
        while (when := self.next_end()) is not None and when <= moment:
            _, job_id, _ = heapq.heappop(self._ends)
            card = self.cards[self._jobs.pop(job_id).node]
            if job_id in self.runs:
                self.runs[job_id] = replace(self.runs[job_id], ended=self.at(when))
            self._count(-next(job.reserved for job in card.running if job.job_id == job_id))
            self._set(card, tuple(job for job in card.running if job.job_id != job_id))
            gone.append(job_id)
        return gone

    def start(self, placed: Placement, seconds: float | None) -> None:
        job, now = placed.job, self.at(self._moment)
        card = self.cards[placed.node]
        self.runs[job.job_id] = ReplayedRun(
            node=card.node, method=placed.method, reserved=placed.reserved, started=now, ended=None
        )
        self._jobs[job.job_id] = _Running(node=card.node, left=seconds, since=self._moment)
        ends = None if seconds is None else now + dt.timedelta(seconds=seconds)
        occupant = Occupant(job_id=job.job_id, user=job.user, reserved=placed.reserved, ends=ends)
        self._expect(job.job_id)
        self._count(placed.reserved)
        self._set(card, (*card.running, occupant))

    def _set(self, card: Card, running: tuple[Occupant, ...]) -> None:
        """Change what runs on the card, and with it the speed of all jobs there."""
        speed = self._speed(len(running))
        paced = []
        for occupant in running:
            job = self._jobs[occupant.job_id]
            if job.speed != speed:
                if job.left is not None:
                    job.left = max(0.0, job.left - (self._moment - job.since) * job.speed)
                job.since, job.speed, job.version = self._moment, speed, job.version + 1
                self._expect(occupant.job_id)
                occupant = replace(occupant, ends=None if job.end is None else self.at(job.end))
            paced.append(occupant)
        self.cards[card.node] = replace(card, running=tuple(paced))

    def _speed(self, jobs: int) -> float:
        return 1.0 / (1.0 + self._contention * max(0, jobs - 1))

    def _expect(self, job_id: int) -> None:
        job = self._jobs[job_id]
        if job.end is not None:
            heapq.heappush(self._ends, (job.end, job_id, job.version))

    def _count(self, change: int) -> None:
        """Note the bytes that are reserved from now on."""
        now = self.at(self._moment)
        total = self.reserved[-1][1] + change
        if self.reserved[-1][0] == now:
            self.reserved.pop()
        self.reserved.append((now, total))


class PlacementRule:
    """The rule of `place`, with each user's charge as the database would keep it.

    `charges`: GiB hours by user at `since`, what runs there included; without them no user has used anything yet.
    """

    def __init__(
        self,
        charges: Mapping[str, float] | None = None,
        since: dt.datetime | None = None,
        running: Iterable[Occupant] = (),
    ) -> None:
        self._levels: dict[int, dict[str, KeptLine]] = {}
        self._all = KeptLine()
        self._past: dict[str, tuple[float, dt.datetime]] = {}
        self._running: dict[int, tuple[str, int, dt.datetime, bool]] = {}  # user, bytes, from when, started here
        if since is not None:
            self._past = {user: (amount, since) for user, amount in (charges or {}).items()}
            self._running = {job.job_id: (job.user, job.reserved, since, False) for job in running}

    def arrived(self, job: ReplayedJob) -> None:
        waiting = job.waiting
        self._levels.setdefault(waiting.priority, {}).setdefault(waiting.user, KeptLine()).add(waiting)
        self._all.add(waiting)

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        if not len(self._all) or not any(card.open and card.slots and card.free for card in cards):
            return []
        decisions = place(self._read_levels(), cards, self.charges(now), now, self._all.reader())
        placed = [decision.placed for decision in decisions if decision.placed is not None]
        for placement in placed:
            job = placement.job
            self._running[job.job_id] = (job.user, placement.reserved, now, True)
            self._drop(job)
        return placed

    def ended(self, job_id: int, now: dt.datetime) -> None:
        if job_id not in self._running:
            return
        user, size, since, _ = self._running.pop(job_id)
        past = self._decayed(user, now)
        self._past[user] = (past + size / GIB * (now - since).total_seconds() / 3600, now)

    def charges(self, now: dt.datetime) -> dict[str, float]:
        """GiB hours that count against each user, as `fleet.read_charges` has them."""
        running: dict[str, list[tuple[int, float]]] = {}
        known: dict[str, float] = {}
        for user, size, since, here in self._running.values():
            seconds = (now - since).total_seconds()
            if here:
                running.setdefault(user, []).append((size, seconds))
            else:  # its earlier use is in the given charges
                known[user] = known.get(user, 0.0) + size / GIB * seconds / 3600
        users = self._past.keys() | running.keys() | known.keys()
        return {u: charge(self._decayed(u, now) + known.get(u, 0.0), running.get(u, ())) for u in users}

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
