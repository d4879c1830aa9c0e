"""The clock of a replay: cards with their jobs as time passes, and how fast each job runs."""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loractl.common.job.method import Method, RoomyForm

from .cards import TIME_GROWTH, Card, Occupant
from .lines import Waiting
from .rule import Placement

MOST_IN_VAIN = 100
"""A job whose card went so often while it loaded is replayed no further: under a rule that does not look at the time
left, it might start in vain for ever."""


@dataclass(frozen=True, kw_only=True)
class ReplayedForm:
    """How a job to replay may do without recomputing if nobody else wants the room."""

    form: RoomyForm
    time: float  # share of its seconds


@dataclass(frozen=True, kw_only=True)
class Presence:
    """When a card is there: from the beginning of the replay on for some time, and again after each pause."""

    open_s: float
    shut_s: float | None = None  # None: it never comes back

    @property
    def cycle_s(self) -> float:
        return math.inf if self.shut_s is None else self.open_s + self.shut_s

    def opening(self, number: int) -> float:
        """When it comes for the time with this number, from 0 on."""
        return number * self.cycle_s if number else 0.0


@dataclass(frozen=True, kw_only=True)
class ReplayedJob:
    """A job to replay; it arrives at `waiting.since`."""

    waiting: Waiting
    seconds: float | None  # from its first step on, with a card of its own; None: not known, it never ends
    start_s: float = 0.0  # before its first step: imports, the base, the rows
    save_s: float = 0.0  # of `seconds`, from one checkpoint to the next
    roomy: tuple[ReplayedForm, ...] = ()  # the fastest first

    def seconds_in(self, form: RoomyForm | None) -> float | None:
        """From its first step on, in that form."""
        times = (one.time for one in self.roomy if one.form == form)
        return None if self.seconds is None else self.seconds * next(times, 1.0)


@dataclass(frozen=True, kw_only=True)
class ReplayedRun:
    """When and where a job ran."""

    node: str
    method: Method
    reserved: int  # bytes
    started: dt.datetime
    ended: dt.datetime | None  # None: it was still running when the replay stopped
    beside: tuple[str, ...] = ()  # its other cards
    attempts: int = 1  # more where cards have gone: `started` is the first one's, the rest the last one's
    in_vain: int = 0  # attempts that were still loading when their card went


@dataclass(kw_only=True)
class _Running:
    """A job on its card, or its cards: the work that is left, in seconds of cards of its own, as of some moment."""

    nodes: tuple[str, ...]
    left: float | None
    since: float
    asked: ReplayedJob | None = None  # None: it ran before the replay
    began: float = 0.0
    trains_s: float | None = None  # of the work, from its first step on
    speed: float = 1.0
    version: int = 0  # of its expected end

    @property
    def end(self) -> float | None:
        return None if self.left is None else self.since + self.left / self.speed


class Clock:
    """The cards and their jobs over time. Times are seconds since the replay began."""

    def __init__(
        self,
        *,
        now: dt.datetime,
        cards: Sequence[Card],
        contention: float,
        presences: Mapping[str, Presence] | None = None,
    ) -> None:
        self._began = now
        self.cards = {card.node: card for card in cards}
        self._contention = contention
        self.runs: dict[int, ReplayedRun] = {}
        self.reserved: list[tuple[dt.datetime, int]] = [(now, sum(card.taken for card in cards))]
        self._jobs: dict[int, _Running] = {}
        self._ends: list[tuple[float, int, int]] = []  # when, job_id, version
        self._versions = itertools.count()
        self._moment = 0.0
        self._presences = presences or {}
        self._turns: list[tuple[float, bool, str, int]] = []  # when a card goes (False) or comes, which, number
        self._returned: list[ReplayedJob] = []
        for card in cards:
            self._take_over(card)
        for node in self._presences:
            self._come(node, 0)
        for job_id, job in self._jobs.items():
            job.speed = self._speed(job_id)
            if job.left is not None:
                # its expected end was measured while others shared the card: its time alone follows from that
                job.left *= job.speed
            self._expect(job_id)

    def _take_over(self, card: Card) -> None:
        """The jobs that run on a card already."""
        for job in card.running:
            nodes = self._jobs[job.job_id].nodes if job.job_id in self._jobs else ()
            left = None if job.ends is None else max(0.0, (job.ends - self._began).total_seconds())
            self._jobs[job.job_id] = _Running(nodes=(*nodes, card.node), left=left, since=0.0)

    def at(self, moment: float) -> dt.datetime:
        return self._began + dt.timedelta(seconds=moment)

    def next_change(self) -> float | None:
        """When the next job ends."""
        while self._ends and not self._is_due(*self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    @property
    def now(self) -> dt.datetime:
        return self.at(self._moment)

    def next_turn(self) -> float | None:
        """When the next card comes or goes."""
        return self._turns[0][0] if self._turns else None

    @property
    def busy(self) -> bool:
        """Whether any job runs."""
        return bool(self._jobs)

    def _is_due(self, _: float, job_id: int, version: int) -> bool:
        return job_id in self._jobs and self._jobs[job_id].version == version

    def advance(self, moment: float) -> list[int]:
        """Let time pass; the jobs that have left their cards by then, in this order."""
        gone = []
        while (turn := self.next_turn()) is not None and turn <= moment:
            gone += self._advance(turn)
            self._moment = turn
            gone += self._turn(*heapq.heappop(self._turns)[1:])
        gone += self._advance(moment)
        self._moment = moment
        return gone

    def returned(self) -> list[ReplayedJob]:
        """The jobs whose cards have gone since this was last asked: what is left of them."""
        returned, self._returned = self._returned, []
        return returned

    def _advance(self, moment: float) -> list[int]:
        gone = []
        while (when := self.next_change()) is not None and when <= moment:
            self._moment = when
            _, job_id, _ = heapq.heappop(self._ends)
            self._end(job_id)
            gone.append(job_id)
        return gone

    def _turn(self, comes: bool, node: str, number: int) -> list[int]:
        """A card comes, or goes: the jobs that leave it."""
        if comes:
            self._come(node, number)
            return []
        presence = self._presences[node]
        if presence.shut_s is not None:
            heapq.heappush(self._turns, (presence.opening(number + 1), True, node, number + 1))
        return self._go(node)

    def _come(self, node: str, number: int) -> None:
        presence = self._presences[node]
        goes = presence.opening(number) + presence.open_s
        heapq.heappush(self._turns, (goes, False, node, number))
        self.cards[node] = replace(self.cards[node], open=True, left_s=goes, window_s=presence.open_s)

    def _go(self, node: str) -> list[int]:
        """Stop what runs on the card."""
        leaving = [one.job_id for one in self.cards[node].running]
        for job_id in leaving:
            self._stop(job_id)
        self._put(replace(self.cards[node], open=False))
        return leaving

    def _stop(self, job_id: int) -> None:
        """The job leaves its cards with a checkpoint, and waits again if the replay started it and knows its length."""
        job, run = self._jobs[job_id], self.runs.get(job_id)
        self._end(job_id)
        if run is None or job.asked is None or job.left is None or job.trains_s is None:
            return
        left = max(0.0, job.left - (self._moment - job.since) * job.speed)
        run = replace(run, in_vain=run.in_vain + (left >= job.trains_s))
        self.runs[job_id] = run
        if run.in_vain < MOST_IN_VAIN:
            self._returned.append(_rest(job, left, self._moment - job.began, self.at(self._moment)))

    def seen(self) -> list[Card]:
        """The cards as the rule sees them, with what is left of their time."""
        return [card if card.left_s is None else self._timed(card, card.left_s) for card in self.cards.values()]

    def start(self, placed: Placement, asked: ReplayedJob) -> None:
        """Let the job run on the cards that it got."""
        job, now = placed.job, self.at(self._moment)
        before = self.runs.get(job.job_id)
        self.runs[job.job_id] = ReplayedRun(
            node=placed.node,
            method=placed.method,
            reserved=placed.reserved,
            started=now if before is None else before.started,
            ended=None,
            beside=tuple(share.node for share in placed.beside),
            attempts=1 if before is None else before.attempts + 1,
            in_vain=0 if before is None else before.in_vain,
        )
        seconds = asked.seconds_in(placed.form)
        left = None if seconds is None else asked.start_s + seconds
        nodes = tuple(share.node for share in placed.shares)
        running = self._jobs[job.job_id] = _Running(
            nodes=nodes, left=left, since=self._moment, asked=asked, began=self._moment, trains_s=seconds
        )
        self._expect(job.job_id)
        for share in placed.shares:
            ends = None if running.end is None else self.at(running.end)  # later, where others are on an earlier card
            occupant = Occupant(job_id=job.job_id, user=job.user, reserved=share.bytes, ends=ends, began=now)
            self._put(self.cards[share.node].with_job(occupant))

    def _end(self, job_id: int) -> None:
        now, nodes = self.at(self._moment), self._jobs.pop(job_id).nodes
        if job_id in self.runs:
            self.runs[job_id] = replace(self.runs[job_id], ended=now)
        for node in nodes:
            self._put(self.cards[node].without([job_id]))

    def _put(self, card: Card) -> None:
        """Change a card, and with it the speed of all jobs there."""
        self._count(card.taken - self.cards[card.node].taken)
        self.cards[card.node] = card
        for occupant in card.running:
            if (speed := self._speed(occupant.job_id)) != self._jobs[occupant.job_id].speed:
                self._pace(occupant.job_id, speed)

    def _pace(self, job_id: int, speed: float) -> None:
        job = self._jobs[job_id]
        if job.left is not None:
            job.left = max(0.0, job.left - (self._moment - job.since) * job.speed)
        job.since, job.speed = self._moment, speed
        self._expect(job_id)
        ends = None if job.end is None else self.at(job.end)
        for node in job.nodes:
            card = self.cards[node]
            running = tuple(replace(one, ends=ends) if one.job_id == job_id else one for one in card.running)
            self.cards[node] = replace(card, running=running)

    def _speed(self, job_id: int) -> float:
        """How fast a job runs next to the others on its cards: 1 with cards of its own."""
        most = max(len(self.cards[node].running) for node in self._jobs[job_id].nodes)
        return 1.0 / (1.0 + self._contention * (most - 1))

    def _timed(self, card: Card, goes: float) -> Card:
        left_s = goes - self._moment
        return replace(card, left_s=left_s, open=card.open and left_s > 0)

    def _expect(self, job_id: int) -> None:
        job = self._jobs[job_id]
        job.version = next(self._versions)  # a number that no earlier attempt had
        if job.end is not None:
            heapq.heappush(self._ends, (job.end, job_id, job.version))

    def _count(self, change: int) -> None:
        """Note the bytes that are reserved from now on."""
        now = self.at(self._moment)
        total = self.reserved[-1][1] + change
        if self.reserved[-1][0] == now:
            self.reserved.pop()
        self.reserved.append((now, total))


def _rest(job: _Running, left: float, took_s: float, now: dt.datetime) -> ReplayedJob:
    """What waits again of a job that was stopped `took_s` after its start, with `left` seconds of work: its steps are
    kept. Its time to a checkpoint is known now."""
    asked = job.asked
    assert asked is not None and asked.seconds is not None and job.trains_s is not None
    waiting, trained_s = asked.waiting, job.trains_s - left
    if trained_s <= 0:
        checkpoint_s = max(waiting.checkpoint_s or 0.0, TIME_GROWTH * took_s)
    else:  # the first one, as often as it saves, or the last one
        checkpoint_s = took_s * min(1.0, (asked.start_s + asked.save_s) / (asked.start_s + trained_s))
    share = min(1.0, left / job.trains_s) if job.trains_s else 1.0
    rest = replace(waiting, checkpoint_s=checkpoint_s, again=now)
    return replace(asked, seconds=asked.seconds * share, waiting=rest)
