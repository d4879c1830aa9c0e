"""A replay: the rule is asked, the next planned end comes, its bytes are free, and the rule is asked again.

`benchmarks.placement` replays a trace with it, `loractl why` and `status` the jobs that wait now. Nothing here reads a
clock, a file or a database.
"""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol

from loractl.common.job.method import Method
from loractl.common.units import GIB

from .card_hours import QuotaMeter
from .cards import STOP_COST_S, TIME_GROWTH, Card, Occupant, Yields
from .duration import CONTENTION
from .lines import ANY_ROOM, Lines, Waiting
from .preemption import first_stop, next_look
from .rule import Placement, place
from .shares import START_CHARGE_S, decayed


@dataclass(frozen=True, kw_only=True)
class ReplayedJob:
    """A job to replay; it arrives at `waiting.since`."""

    waiting: Waiting
    seconds: float | None  # from its first step on, with a card of its own; None: not known, it never ends
    start_s: float = 0.0  # before its first step: imports, the base, the rows
    yields: bool = False  # gives way to much shorter jobs
    stop_s: float = STOP_COST_S  # of its card, lost each time that it gives way: checkpoint, load, steps run again
    stops: int = 0  # times that it gave way already


@dataclass(frozen=True, kw_only=True)
class ReplayedRun:
    """When and where a job ran."""

    node: str
    method: Method
    reserved: int  # bytes
    started: dt.datetime  # first, of one that gave way
    ended: dt.datetime | None  # None: it was still running when the replay stopped
    beside: tuple[str, ...] = ()  # its other cards
    stops: int = 0  # times that it gave way


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What became of the jobs; one that never started has no run."""

    runs: dict[int, ReplayedRun]  # in the order of their first starts
    reserved: list[tuple[dt.datetime, int]]  # bytes on all cards from each moment on


class Rule(Protocol):
    """Decides which waiting jobs start."""

    def arrived(self, job: ReplayedJob) -> None:
        """The job begins to wait."""
        ...

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> Iterable[Placement]:
        """Jobs that start now, and so leave the queue."""
        ...

    def stops(self, cards: Sequence[Card], now: dt.datetime) -> Sequence[int]:
        """Jobs that give way now, after all that starts has started: each leaves its card, and waits again."""
        ...

    def ended(self, job_id: int, now: dt.datetime) -> None:
        """A job has left its card: this rule started it, or it ran from the beginning."""
        ...

    def next_change(self, now: dt.datetime) -> dt.datetime | None:
        """When it may start a job although no job arrives or ends; None: never."""
        ...


def replay(
    jobs: Iterable[ReplayedJob],
    cards: Sequence[Card],
    now: dt.datetime,
    rule: Rule | None = None,
    *,
    contention: float | None = 0.0,
    until: Callable[[Mapping[int, ReplayedRun]], bool] | None = None,
    lasts: Callable[[Waiting], float | None] = lambda job: None,
    running: Mapping[int, ReplayedJob] | None = None,
) -> Replay:
    """Replay from `now` on, with the jobs that the cards have already, until nothing more happens.

    `rule`: PlacementRule() without one. `contention`: each of k jobs on a card runs at 1 / (1 + contention (k - 1)) of
    its speed, its start too; at 0 they don't slow each other, at 1 they take turns; None: as each card has it. `until`:
    stop once this holds of the jobs that have started. `lasts`: seconds for a job that only the rule knows; None: it
    never ends. `running`: jobs that the cards have already, by number, as they wait again once they give way; one that
    is not among them is not followed after that.
    """
    rule = rule or PlacementRule()
    fleet = ReplayedFleet(cards, now, contention=contention, running=running)
    coming = deque(sorted(jobs, key=lambda job: (job.waiting.since, job.waiting.job_id)))
    waiting = dict[int, ReplayedJob]()
    moment: float | None = 0.0
    while moment is not None:
        for job_id in fleet.advance(moment):
            rule.ended(job_id, fleet.now)
        while coming and fleet.seconds(coming[0].waiting.since) <= moment:
            job = coming.popleft()
            waiting[job.waiting.job_id] = job
            rule.arrived(job)
        going: Sequence[int] = (0,)
        while going:
            for placed in rule.starts(fleet.seen(), fleet.now):
                if (number := placed.job.job_id) not in waiting:
                    waiting[number] = ReplayedJob(waiting=placed.job, seconds=lasts(placed.job))
                fleet.start(placed, waiting.pop(number))
            for number in (going := rule.stops(fleet.seen(), fleet.now)):
                rest = fleet.stop(number)
                rule.ended(number, fleet.now)
                if rest is not None:
                    waiting[number] = rest
                    rule.arrived(rest)
        if until is not None and until(fleet.runs):
            break
        arrival, change = coming[0].waiting.since if coming else None, rule.next_change(fleet.now)
        known = [fleet.seconds(at) for at in (arrival, change) if at is not None]
        moment = min([*known, end] if (end := fleet.next_end()) is not None else known, default=None)
    return Replay(runs=fleet.runs, reserved=fleet.reserved)


@dataclass(kw_only=True)
class _Running:
    """A job on its cards: the work that is left, in seconds of cards of its own, as of some moment."""

    nodes: tuple[str, ...]
    left: float | None  # None: it never ends
    since: float = 0.0
    asked: ReplayedJob | None = None  # None: it ran before the replay, which knows no more of it
    began: float = 0.0
    trains_s: float | None = None  # of the work, from its first step on
    speed: float = 1.0

    @property
    def end(self) -> float | None:
        return None if self.left is None else self.since + self.left / self.speed

    def left_at(self, moment: float) -> float | None:
        return None if self.left is None else max(0.0, self.left - (moment - self.since) * self.speed)


class ReplayedFleet:
    """The cards and what runs there at one moment. Times are seconds since the replay began."""

    def __init__(
        self,
        cards: Sequence[Card],
        now: dt.datetime,
        *,
        contention: float | None = 0.0,
        running: Mapping[int, ReplayedJob] | None = None,
    ) -> None:
        self.cards = {card.node: card for card in cards}
        self.jobs: dict[int, _Running] = {}
        self.runs: dict[int, ReplayedRun] = {}
        self.reserved = [(now, sum(card.taken for card in cards))]
        self._began, self._moment, self._contention = now, 0.0, contention
        for card in cards:
            for one in card.running:
                left = None if one.ends is None else self.seconds(one.ends)
                others = self.jobs[one.job_id].nodes if one.job_id in self.jobs else ()
                self.jobs[one.job_id] = _Running(nodes=(*others, card.node), left=left)
        for number, job in self.jobs.items():
            job.speed, job.asked = self._speed(job), (running or {}).get(number)
            if job.left is not None:
                # its expected end was measured while others shared the card: its time alone follows from that
                job.left *= job.speed
            job.trains_s = job.left

    def seconds(self, at: dt.datetime) -> float:
        return max(0.0, (at - self._began).total_seconds())

    @property
    def now(self) -> dt.datetime:
        return self._at(self._moment)

    def _at(self, moment: float) -> dt.datetime:
        return self._began + dt.timedelta(seconds=moment)

    def next_end(self) -> float | None:
        return min((end for job in self.jobs.values() if (end := job.end) is not None), default=None)

    def advance(self, moment: float) -> Iterator[int]:
        """Let time pass; the jobs that have left their cards by then, in this order."""
        while (end := self.next_end()) is not None and end <= moment:
            job_id = min(job_id for job_id, job in self.jobs.items() if job.end == end)
            self._moment = end
            self._leave(job_id)
            yield job_id
        self._moment = moment

    def seen(self) -> list[Card]:
        """The cards as the rule sees them, with what is left of their time."""
        return [card if card.left_s is None else self._timed(card, card.left_s) for card in self.cards.values()]

    def _timed(self, card: Card, goes: float) -> Card:
        left_s = goes - self._moment
        return replace(card, left_s=left_s, open=card.open and left_s > 0)

    def start(self, placed: Placement, asked: ReplayedJob) -> None:
        """Let the job run on the cards that it got."""
        job, before = placed.job, self.runs.get(placed.job.job_id)
        self.runs[job.job_id] = ReplayedRun(
            node=placed.node,
            method=placed.method,
            reserved=placed.reserved,
            started=self.now if before is None else before.started,
            ended=None,
            beside=tuple(share.node for share in placed.beside),
            stops=asked.stops,
        )
        trains_s = asked.seconds
        running = self.jobs[job.job_id] = _Running(
            nodes=tuple(share.node for share in placed.shares),
            left=None if trains_s is None else asked.start_s + trains_s,
            since=self._moment,
            asked=asked,
            began=self._moment,
            trains_s=trains_s,
        )
        yields = Yields(stops=asked.stops, cost_s=asked.stop_s)
        for share in placed.shares:
            ends = None if running.end is None else self._at(running.end)  # later, where an earlier card is shared
            occupant = Occupant(
                job_id=job.job_id, user=job.user, reserved=share.bytes, priority=job.priority, ends=ends,
                began=self.now, since=job.since, yields=yields if asked.yields else None,
            )  # fmt: skip
            self._put(self.cards[share.node].with_job(occupant))

    def stop(self, job_id: int) -> ReplayedJob | None:
        """Let a job give way; what waits again of it, its length measured now. None: it is followed no further."""
        job, run = self.jobs[job_id], self.runs.get(job_id)
        left = job.left_at(self._moment)
        self._leave(job_id)
        if job.asked is None or left is None or job.trains_s is None:
            return None
        if run is not None:
            self.runs[job_id] = replace(run, stops=run.stops + 1)
        rest = _rest(job.asked, left, job.trains_s, self._moment - job.began, self.now)
        seconds = (rest.seconds or 0.0) + rest.stop_s
        waiting = replace(rest.waiting, left_s=rest.start_s + seconds)
        return replace(rest, seconds=seconds, waiting=waiting, stops=rest.stops + 1)

    def _leave(self, job_id: int) -> None:
        if job_id in self.runs:
            self.runs[job_id] = replace(self.runs[job_id], ended=self.now)
        for node in self.jobs.pop(job_id).nodes:
            self._put(self.cards[node].without([job_id]))

    def _put(self, card: Card) -> None:
        """Change a card, and with it the speed of all jobs there."""
        size = self.reserved[-1][1] + card.taken - self.cards[card.node].taken
        if self.reserved[-1][0] == self.now:
            self.reserved.pop()
        self.reserved.append((self.now, size))
        self.cards[card.node] = card
        for one in card.running:
            job = self.jobs[one.job_id]
            if (speed := self._speed(job)) != job.speed:
                job.left, job.since, job.speed = job.left_at(self._moment), self._moment, speed
                ends = None if job.end is None else self._at(job.end)
                for node in job.nodes:
                    there = self.cards[node]
                    running = (replace(j, ends=ends) if j.job_id == one.job_id else j for j in there.running)
                    self.cards[node] = replace(there, running=tuple(running))

    def _speed(self, job: _Running) -> float:
        """How fast it runs next to the others on its cards: 1 with cards of its own."""
        return 1.0 / max(self._slowed(self.cards[node]) for node in job.nodes)

    def _slowed(self, card: Card) -> float:
        contention = card.contention if self._contention is None else self._contention
        return 1.0 + (CONTENTION if contention is None else contention) * (len(card.running) - 1)


def _rest(asked: ReplayedJob, left: float, trains_s: float, took_s: float, now: dt.datetime) -> ReplayedJob:
    """What waits again of a job that was stopped `took_s` after its start, with `left` seconds of work: its steps are
    kept. Its time to a checkpoint is known now."""
    assert asked.seconds is not None
    waiting, trained_s = asked.waiting, trains_s - left
    if trained_s <= 0:
        checkpoint_s = max(waiting.checkpoint_s or 0.0, TIME_GROWTH * took_s)
    else:
        checkpoint_s = took_s * asked.start_s / (asked.start_s + trained_s)
    share = min(1.0, left / trains_s) if trains_s else 1.0
    return replace(asked, seconds=asked.seconds * share, waiting=replace(waiting, checkpoint_s=checkpoint_s, again=now))


class Remaining:
    """The ready jobs as a replay goes on: the next of a line is read once the one before has started. `gone`: jobs that
    are not among them any more."""

    def __init__(
        self, firsts: Sequence[Waiting], after: Callable[[Waiting], Waiting | None], gone: Iterable[int] = ()
    ) -> None:
        self._firsts = {job.job_id: job for job in firsts}
        self._read = after
        self._next: dict[int, Waiting | None] = {}
        self._gone = {*gone}

    def __len__(self) -> int:
        return len(self._firsts)

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        return list(self._firsts.values())

    def beyond(self, room: int) -> list[Waiting]:
        return []

    def after(self, job: Waiting) -> Waiting | None:
        """The next one that has not started: a job may start while one before it waits for an empty card."""
        behind: Waiting | None = job
        while behind is not None and (behind is job or behind.job_id in self._gone):
            if behind.job_id not in self._next:
                self._next[behind.job_id] = self._read(behind)
            behind = self._next[behind.job_id]
        return behind

    def add(self, job: Waiting) -> None:
        self._gone.discard(job.job_id)
        self._firsts[job.job_id] = job

    def remove(self, job: Waiting) -> None:
        if job.job_id in self._gone:
            return
        self._gone.add(job.job_id)
        self._firsts.pop(job.job_id, None)
        if (behind := self.after(job)) is not None:
            self._firsts[behind.job_id] = behind


class PlacementRule:
    """The rule of `place`, with each user's charge as the database would keep it.

    `charges`: GiB hours by user at `since`, what runs there included; without them no user has used anything yet.
    `meter`: the card hours of users with a quota; without it nobody has one. `waiting`: what waits from the beginning,
    without what is `decided` to start then. `by_share`: in the order of before, see `turns_by_share`. `yields`: whether
    long jobs give way to much shorter ones, `least_s`: after how long, and `may_ask`: to which, see `first_stop`.
    """

    def __init__(
        self,
        charges: Mapping[str, float] | None = None,
        since: dt.datetime | None = None,
        running: Iterable[Occupant] = (),
        meter: QuotaMeter | None = None,
        waiting: Lines | Remaining | None = None,
        decided: Sequence[Placement] = (),
        by_share: bool = False,
        yields: bool = False,
        least_s: float | None = None,
        may_ask: Callable[[Waiting], bool] = lambda job: True,
    ) -> None:
        self._may_ask = may_ask
        self._yields = yields
        self._least_s = least_s
        self._look: dt.datetime | None = None
        self._decided = list(decided)
        self._by_share = by_share
        self._meter = meter
        self._waiting = (Lines(order=lambda job: job.job_id) if by_share else Lines()) if waiting is None else waiting
        self._past: dict[str, tuple[float, dt.datetime]] = {}
        self._running: dict[int, tuple[str, int, dt.datetime, float]] = {}  # user, bytes, from when, seconds charged
        if since is not None:
            self._past = {user: (amount, since) for user, amount in (charges or {}).items()}
            for job in running:  # one on several cards is on each of them
                _, before, *_ = self._running.get(job.job_id, ("", 0))
                began = job.began or since
                charged_s = max((since - began).total_seconds(), START_CHARGE_S)  # as the given charges have it
                self._running[job.job_id] = (job.user, before + job.reserved, began, charged_s)

    def arrived(self, job: ReplayedJob) -> None:
        self._waiting.add(job.waiting)

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        placed, self._decided = self._decided or self._decide(cards, now), []
        for placement in placed:
            job = placement.job
            size = sum(share.bytes for share in placement.shares)
            self._running[job.job_id] = (job.user, size, now, 0.0)
            if self._meter is not None:
                self._meter.began(placement, now)
            self._waiting.remove(job)
        return placed

    def _decide(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        if not len(self._waiting) or not any(card.room for card in cards):
            return []
        decisions = place(self._waiting, cards, self.charges(now), now, self._by_share)
        return [decision.placed for decision in decisions if decision.placed is not None]

    def stops(self, cards: Sequence[Card], now: dt.datetime) -> tuple[int, ...]:
        self._look = None
        if not self._yields or not len(self._waiting):
            return ()
        charges = self.charges(now)
        found = first_stop(
            self._waiting, cards, charges, now, by_share=self._by_share, least_s=self._least_s, may_ask=self._may_ask
        )
        self._look = next_look(cards, now, self._least_s)
        return () if found is None else found.going

    def ended(self, job_id: int, now: dt.datetime) -> None:
        if job_id not in self._running:
            return
        user, size, began, charged_s = self._running.pop(job_id)
        if self._meter is not None:
            self._meter.ended(job_id, now)
        past = self._decayed(user, now)
        had = size / GIB * ((now - began).total_seconds() - charged_s) / 3600
        self._past[user] = (max(0.0, past + had), now)

    def next_change(self, now: dt.datetime) -> dt.datetime | None:
        """When a user whose jobs wait for a quota is below it again, or a job has run undisturbed for long enough."""
        if self._meter is None:
            return self._look
        below = self._meter.below_at({job.user for job in self._waiting.firsts()}, now)
        return min((at for at in (below, self._look) if at is not None), default=None)

    def charges(self, now: dt.datetime) -> dict[str, float]:
        """GiB hours that count against each user, as `nodes.read_charges` has them."""
        running = dict[str, float]()
        for user, size, began, charged_s in self._running.values():
            more_s = max((now - began).total_seconds(), START_CHARGE_S) - charged_s
            running[user] = running.get(user, 0.0) + size / GIB * more_s / 3600
        found = {u: self._decayed(u, now) + running.get(u, 0.0) for u in self._past.keys() | running.keys()}
        if self._meter is None:
            return found
        return found | {user: quota.on(found.get(user, 0.0)) for user, quota in self._meter.at(now).items()}

    def _decayed(self, user: str, now: dt.datetime) -> float:
        amount, at = self._past.get(user, (0.0, now))
        return decayed(amount, (now - at).total_seconds())
