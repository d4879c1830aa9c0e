"""The clock of a replay: cards with their jobs and hosts as time passes, and how fast each job gets on."""

from __future__ import annotations

import datetime as dt
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loractl.common.job.method import Method

from .cards import Card, Occupant, WarmBase
from .hosts import Seat, may_wait, seat
from .lines import Waiting
from .rule import Placement


@dataclass(frozen=True, kw_only=True)
class ReplayedBase:
    """The base of a job to replay, and what it takes until the first step."""

    bytes: int
    cold_s: float  # seconds in a new trainer, which loads it
    warm_s: float  # seconds in a host that has it


@dataclass(frozen=True, kw_only=True)
class ReplayedJob:
    """A job to replay; it arrives at `waiting.since`."""

    waiting: Waiting
    seconds: float | None  # from its first step on, with a card of its own; None: not known, it never ends
    base: ReplayedBase | None = None  # None: it starts in no time, and leaves no host


@dataclass(frozen=True, kw_only=True)
class ReplayedRun:
    """When and where a job ran."""

    node: str
    method: Method
    reserved: int  # bytes
    started: dt.datetime
    ended: dt.datetime | None  # None: it was still running when the replay stopped
    warm: bool  # a host had its base


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


class Clock:
    """The cards and their jobs over time. Times are seconds since the replay began."""

    def __init__(self, *, now: dt.datetime, cards: Sequence[Card], contention: float, keep_warm_s: float) -> None:
        self._began = now
        self.cards = {card.node: card for card in cards}
        self._contention = contention
        self._keep_warm_s = keep_warm_s
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
            self.cards[card.node] = _left(self.cards[card.node], job_id, self.at(when))
            gone.append(job_id)
        self._drop_late_hosts()
        return gone

    def start(self, placed: Placement, asked: ReplayedJob) -> None:
        job, now = placed.job, self.at(self._moment)
        card = self.cards[placed.node]
        seated = seat(card, _key(card, placed), placed.reserved)
        warm = seated.host is not None
        self.runs[job.job_id] = ReplayedRun(
            node=card.node, method=placed.method, reserved=placed.reserved, started=now, ended=None, warm=warm
        )
        left = _work(asked, warm)
        self._jobs[job.job_id] = _Running(node=card.node, left=left, since=self._moment)
        occupant = Occupant(
            job_id=job.job_id,
            user=job.user,
            reserved=placed.reserved,
            used=0 if seated.host is None else seated.host.bytes,
            ends=None if left is None else now + dt.timedelta(seconds=left),
        )
        self._expect(job.job_id)
        self._count(placed.reserved)
        card = self.cards[card.node] = replace(card, hosts=_hosts(card, seated, placed, asked.base, now))
        self._set(card, (*card.running, occupant))

    def _drop_late_hosts(self) -> None:
        """Let the bases go that have waited for a job for as long as they may."""
        oldest = self.at(self._moment - self._keep_warm_s)
        for card in self.cards.values():
            late = [base for base in card.hosts if base.job_id is None and (base.leaving or base.since <= oldest)]
            if late:
                self.cards[card.node] = replace(card, hosts=tuple(base for base in card.hosts if base not in late))

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


def _work(job: ReplayedJob, warm: bool) -> float | None:
    """Seconds from the job's start to its end, with a card of its own."""
    if job.seconds is None or job.base is None:
        return job.seconds
    return job.seconds + (job.base.warm_s if warm else job.base.cold_s)


def _key(card: Card, placed: Placement) -> str | None:
    """The key of the job's base, as far as the rule sees it: that of a host which has it, or one made of its name."""
    name, method = placed.job.base_model, placed.method
    same = [base for base in card.waiting_bases if (base.base_model, base.method) == (name, method)]
    if not name:
        return None
    return max(same, key=lambda base: base.since).key if same else f"{name} {method.value}"


def _hosts(
    card: Card, seated: Seat, placed: Placement, base: ReplayedBase | None, now: dt.datetime
) -> tuple[WarmBase, ...]:
    """The card's hosts once the job has its seat, its own trainer among them where that may stay."""
    job = placed.job
    staying = [host for host in card.hosts if host not in seated.leaving and host != seated.host]
    if seated.host is not None:
        return (*staying, replace(seated.host, job_id=job.job_id, since=now))
    if base is None or not (key := _key(card, placed)):
        return tuple(staying)
    own = WarmBase(
        host=f"trainer {job.job_id}",
        key=key,
        base_model=job.base_model,
        method=placed.method,
        bytes=base.bytes,
        since=now,
        job_id=job.job_id,
    )
    return (*staying, own)


def _left(card: Card, job_id: int, now: dt.datetime) -> Card:
    """The card when its job has left the trainer, which stays where its base has room."""
    others = tuple(base for base in card.hosts if base.job_id != job_id)
    own = tuple(replace(base, job_id=None, since=now) for base in card.hosts if base.job_id == job_id)
    waiting = replace(card, hosts=(*others, *own))
    return waiting if may_wait(waiting) else replace(card, hosts=others)
