"""The clock of a replay: cards with their jobs and hosts as time passes, and how fast each job runs."""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loractl.common.job.method import Method, RoomyForm

from .cards import TIME_GROWTH, Card, Occupant, WarmBase
from .hosts import Seat, joined, may_wait, seat
from .lines import Waiting
from .pack_rule import PackedJob, PassLaw
from .rule import Placement

LEAVE_S = 10.0
"""Until a job that has ended is out of its host: a step, and a look at its tensors and files."""


MOST_IN_VAIN = 100
"""A job whose card went so often while it loaded is replayed no further: under a rule that does not look at the time
left, it might start in vain for ever."""


@dataclass(frozen=True, kw_only=True)
class ReplayedBase:
    """The base of a job to replay, and what it takes until the first step."""

    bytes: int
    cold_s: float  # seconds in a new trainer, which loads it
    warm_s: float  # seconds in a host that has it
    law: PassLaw | None = None  # of passes over it; None: its trainer takes one job at a time


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
    save_s: float = 0.0  # of these, from one checkpoint to the next
    base: ReplayedBase | None = None  # None: it starts in no time, and leaves no host
    packed: PackedJob | None = None  # as the pack rule sees it; None: it trains alongside no other job
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
    warm: bool  # a host had its base
    joined: bool  # others trained in that host
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
    start_s: float = 0.0  # of the work, until its first step
    trains_s: float | None = None  # of the work, from its first step on
    packed: PackedJob | None = None
    speed: float = 1.0
    promised: float | None = None  # its end, as of the first join that slowed it
    deadline: float | None = None  # the end of its time limit
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
        keep_warm_s: float,
        presences: Mapping[str, Presence] | None = None,
    ) -> None:
        self._began = now
        self.cards = {card.node: card for card in cards}
        self._contention = contention
        self._keep_warm_s = keep_warm_s
        self.runs: dict[int, ReplayedRun] = {}
        self.reserved: list[tuple[dt.datetime, int]] = [(now, sum(card.taken for card in cards))]
        self._jobs: dict[int, _Running] = {}
        self._ends: list[tuple[float, int, int]] = []  # when, job_id, version
        self._opens: list[tuple[float, str, str]] = []  # when others may join it, node, host
        self._leaves: list[tuple[float, str, str]] = []  # when those that had ended are out of it, node, host
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
        packed: dict[int | None, PackedJob] = {}
        for base in card.hosts:
            if base.open:
                packed |= {member.job_id: member for member in base.members}
            if base.leavers:
                heapq.heappush(self._leaves, (LEAVE_S, card.node, base.host))
        for job in card.running:
            nodes = self._jobs[job.job_id].nodes if job.job_id in self._jobs else ()
            left = None if job.ends is None else max(0.0, (job.ends - self._began).total_seconds())
            member = packed.get(job.job_id)
            self._jobs[job.job_id] = _Running(
                nodes=(*nodes, card.node),
                left=left,
                since=0.0,
                packed=member,
                promised=None if member is None else member.promised_seconds,
                deadline=None if member is None else member.limit_seconds,
            )

    def at(self, moment: float) -> dt.datetime:
        return self._began + dt.timedelta(seconds=moment)

    def next_change(self) -> float | None:
        """When the next job ends, or the next host opens to others."""
        while self._ends and not self._is_due(*self._ends[0]):
            heapq.heappop(self._ends)
        firsts = (*self._ends[:1], *self._opens[:1], *self._leaves[:1])
        return min((first[0] for first in firsts), default=None)

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
        self._drop_late_hosts()
        return gone

    def returned(self) -> list[ReplayedJob]:
        """The jobs whose cards have gone since this was last asked: what is left of them."""
        returned, self._returned = self._returned, []
        return returned

    def _advance(self, moment: float) -> list[int]:
        gone = []
        while (when := self.next_change()) is not None and when <= moment:
            self._moment = when
            if self._opens and self._opens[0][0] == when:
                self._open(*heapq.heappop(self._opens)[1:])
            elif self._leaves and self._leaves[0][0] == when:
                self._let_out(*heapq.heappop(self._leaves)[1:])
            else:
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
        """Stop what runs on the card, and its trainers."""
        card = self.cards[node]
        leaving = [one.job_id for one in card.running]
        for job_id in leaving:
            self._stop(job_id)
        self._opens = [one for one in self._opens if one[1] != node]
        self._leaves = [one for one in self._leaves if one[1] != node]
        heapq.heapify(self._opens)
        heapq.heapify(self._leaves)
        self._put(replace(self.cards[node], open=False, hosts=()))
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
        """The cards as the rule sees them: with what is left of their time, and to each member of an open host."""
        return [
            self._card_seen(card) if card.hosts or card.left_s is not None else card for card in self.cards.values()
        ]

    def start(self, placed: Placement, asked: ReplayedJob) -> None:
        job, now, card = placed.job, self.at(self._moment), self.cards[placed.node]
        seated = _seated(card, placed)
        before = self.runs.get(job.job_id)
        self.runs[job.job_id] = ReplayedRun(
            node=card.node,
            method=placed.method,
            reserved=placed.reserved,
            started=now if before is None else before.started,
            ended=None,
            warm=seated.host is not None,
            joined=placed.join is not None,
            beside=tuple(share.node for share in placed.beside),
            attempts=1 if before is None else before.attempts + 1,
            in_vain=0 if before is None else before.in_vain,
        )
        start_s = _start_s(asked, seated)
        seconds = asked.seconds_in(placed.form)
        left = None if seconds is None else start_s + seconds
        packed = asked.packed if placed.join is None else placed.join.packed
        nodes = tuple(share.node for share in placed.shares)
        limit_s = None if packed is None else packed.limit_seconds
        deadline = None if limit_s is None else self._moment + limit_s
        self._jobs[job.job_id] = _Running(
            nodes=nodes, left=left, since=self._moment, asked=asked, began=self._moment, start_s=start_s,
            trains_s=seconds, packed=packed, deadline=deadline,
        )  # fmt: skip
        self._expect(job.job_id)
        card = _with_host(card, seated, placed, asked.base, now)
        ends = None if left is None else now + dt.timedelta(seconds=left)
        host = next((base.host for base in card.hosts if base.job_id == job.job_id), None)
        if placed.join is not None:
            host = placed.join.base.host
        elif host is not None and packed is not None and placed.form is None:
            heapq.heappush(self._opens, (self._moment + start_s, card.node, host))
        occupant = Occupant(job_id=job.job_id, user=job.user, reserved=placed.reserved, ends=ends, began=now, host=host)
        self.cards[card.node] = card
        for share in placed.shares:
            there = self.cards[share.node]
            self._put(replace(there, running=(*there.running, replace(occupant, reserved=share.bytes))))

    def _open(self, node: str, host: str) -> None:
        """Let other jobs join a host whose own job has begun to train."""
        card = self.cards[node]
        hosts = [replace(base, open=True) if base.host == host and card.is_busy(base) else base for base in card.hosts]
        self._put(replace(card, hosts=tuple(hosts)))

    def _let_out(self, node: str, host: str) -> None:
        """Jobs that had ended before the replay began are out of their host, and hold nothing more."""
        card = self.cards[node]
        base = next((base for base in card.hosts if base.host == host), None)
        if base is not None:
            self._put(_vacated(card, replace(base, leavers=()), self.at(self._moment)))

    def _end(self, job_id: int) -> None:
        now, nodes = self.at(self._moment), self._jobs.pop(job_id).nodes
        if job_id in self.runs:
            self.runs[job_id] = replace(self.runs[job_id], ended=now)
        for node in nodes:
            self._put(_left(self.cards[node], job_id, now))

    def _drop_late_hosts(self) -> None:
        """Drop the bases that have waited for a job for as long as they may."""
        oldest = self.at(self._moment - self._keep_warm_s)
        for card in self.cards.values():
            idle = [base for base in card.hosts if not card.is_busy(base)]
            late = {base.host for base in idle if base.leaving or base.since <= oldest}
            if late:
                hosts = tuple(base for base in card.hosts if base.host not in late)
                self.cards[card.node] = replace(card, hosts=hosts)

    def _put(self, card: Card) -> None:
        """Change a card, and with it the speed of all jobs there."""
        self._count(card.taken - self.cards[card.node].taken)
        self.cards[card.node] = card
        for occupant in card.running:
            if (speed := self._speed(occupant.job_id)) != self._jobs[occupant.job_id].speed:
                self._pace(occupant.job_id, speed)

    def _pace(self, job_id: int, speed: float) -> None:
        job = self._jobs[job_id]
        if job.promised is None and speed < job.speed:
            job.promised = job.end
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
        cards = [self.cards[node] for node in self._jobs[job_id].nodes]
        return min(self._share(card, job) for card in cards for job in card.running if job.job_id == job_id)

    def _share(self, card: Card, job: Occupant) -> float:
        alone = 1.0 / (1.0 + self._contention * max(0, card.trainers - 1))
        base = card.base_of(job)
        if base is None or not base.open:
            return alone
        members = {other.job_id: self._jobs[other.job_id].packed for other in card.inside(base)}
        tokens = [packed.tokens for packed in members.values() if packed is not None]
        own = members[job.job_id]
        if own is None or len(tokens) < len(members):
            return alone  # a pack whose members are not known keeps its pace
        law = base.law or PassLaw.start(quantised=base.method is Method.QLORA)
        return alone * law.seconds(own.tokens, 1) / law.seconds(sum(tokens), len(tokens))

    def _card_seen(self, card: Card) -> Card:
        left_s = None if card.left_s is None else card.left_s - self._moment
        hosts = tuple(self._seen(card, base) for base in card.hosts)
        return replace(card, hosts=hosts, left_s=left_s, open=card.open and (left_s is None or left_s > 0))

    def _seen(self, card: Card, base: WarmBase) -> WarmBase:
        if not base.open:
            return base
        members = [self._member(self._jobs[job.job_id]) for job in card.inside(base)]
        return replace(base, members=tuple(member for member in members if member is not None))

    def _member(self, job: _Running) -> PackedJob | None:
        if job.packed is None:
            return None
        limit_s = None if job.deadline is None else job.deadline - self._moment
        if job.end is None:
            return replace(job.packed, limit_seconds=limit_s)
        promised = job.end if job.promised is None else job.promised
        left, promised_s = job.end - self._moment, promised - self._moment
        return replace(job.packed, left_seconds=left, promised_seconds=promised_s, limit_seconds=limit_s)

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


def key_of(base_model: str, method: Method) -> str:
    """The key of a base in a replay, which has no job files; see hosts.base_key."""
    return f"{base_model} {method.value}"


def _seated(card: Card, placed: Placement) -> Seat:
    if placed.join is not None:
        return joined(card, placed.join.base, placed.reserved)
    name, method = placed.job.base_model, placed.method
    same = [base for base in card.waiting_bases if (base.base_model, base.method) == (name, method)]
    # as far as the rule sees it, these have the job's base, whatever their keys
    key = max(same, key=lambda base: base.since).key if same else key_of(name, method)
    shares_base = name and not placed.beside
    return seat(card, key if shares_base else None, placed.reserved)


def _start_s(job: ReplayedJob, seated: Seat) -> float:
    """Seconds from the job's start to its first step."""
    if job.base is None:
        return 0.0
    return job.base.cold_s if seated.host is None else job.base.warm_s


def _rest(job: _Running, left: float, took_s: float, now: dt.datetime) -> ReplayedJob:
    """What waits again of a job that was stopped `took_s` after its start, with `left` seconds of work: its steps are
    kept. Its time to a checkpoint is known now."""
    asked = job.asked
    assert asked is not None and asked.seconds is not None and job.trains_s is not None
    waiting, trained_s = asked.waiting, job.trains_s - left
    if trained_s <= 0:
        checkpoint_s = max(waiting.checkpoint_s or 0.0, TIME_GROWTH * took_s)
    else:  # the first one, as often as it saves, or the last one
        checkpoint_s = took_s * min(1.0, (job.start_s + asked.save_s) / (job.start_s + trained_s))
    share = min(1.0, left / job.trains_s) if job.trains_s else 1.0
    rest = replace(waiting, checkpoint_s=checkpoint_s, again=now)
    return replace(asked, seconds=asked.seconds * share, waiting=rest)


def _with_host(card: Card, seated: Seat, placed: Placement, base: ReplayedBase | None, now: dt.datetime) -> Card:
    """The card with the hosts that stay, and the job's own trainer where that may become one."""
    job, going = placed.job, {other.host for other in seated.leaving}
    staying = [host for host in card.hosts if host.host not in going]
    if placed.join is not None:
        return replace(card, hosts=tuple(staying))
    if seated.host is not None:
        taken = replace(seated.host, job_id=job.job_id, since=now)
        return replace(card, hosts=tuple(taken if host.host == taken.host else host for host in staying))
    if base is not None and job.base_model and not placed.beside:
        own = WarmBase(
            host=f"trainer {job.job_id}",
            key=key_of(job.base_model, placed.method),
            base_model=job.base_model,
            method=placed.method,
            bytes=base.bytes,
            since=now,
            job_id=job.job_id,
            law=base.law,
        )
        staying.append(own)
    return replace(card, hosts=tuple(staying))


def _left(card: Card, job_id: int, now: dt.datetime) -> Card:
    """The card when a job has left its trainer."""
    base = next((card.base_of(job) for job in card.running if job.job_id == job_id), None)
    then = card.without([job_id])
    if base is None:
        return then
    return _vacated(then, replace(base, job_id=None) if base.job_id == job_id else base, now)


def _vacated(card: Card, base: WarmBase, now: dt.datetime) -> Card:
    """The card after a job has left a trainer with this base. Once the last one leaves, the trainer stays if its base
    has room, unless it is spoilt."""
    others = tuple(other for other in card.hosts if other.host != base.host)
    if card.is_busy(base):
        return replace(card, hosts=(*others, base))
    if base.spoilt is not None:
        return replace(card, hosts=others)
    waiting = replace(card, hosts=(*others, replace(base, open=False, members=(), since=now)))
    return waiting if may_wait(waiting) else replace(card, hosts=others)
