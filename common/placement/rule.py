"""The placement rule: which waiting job starts now, on which card, with which method, and what is reserved for it.

Pure functions of values. The claim, `loractl why` and the simulator all ask `place`, so that there is one rule.

The order of trying is: the oldest job that the fleet could hold, once it has waited a day; then priority, the user's
fair share, age. A job that can't start is passed over, but the first one that has waited past RESERVE_AFTER_S gets a
card kept for it: nothing that would delay it starts there any more.
"""

from __future__ import annotations

import datetime as dt
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from loractl.common.job.method import Method
from loractl.common.units import GIB

VRAM_CLASSES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 144, 192, 288)
"""GiB. A job waits in the smallest class that holds its need; sizes are those of cards that labs own."""

RESERVE_AFTER_S = 30 * 60.0
"""A job that is first in the order and has waited so long without fitting gets a card kept for it."""

OLDEST_FIRST_AFTER_S = 24 * 3600.0
"""The oldest job that could run goes before every priority and share once it has waited so long: nothing starves."""

START_CHARGE_S = 3600.0
"""A started job counts at once as if it had run for so long: a user's second job comes after another one's first."""

HALF_LIFE_S = 24 * 3600.0
"""Use counts half against a user after so long."""

SHARED_FROM_BYTES = 40 * GIB
"""Cards below this run one job unless their owner says otherwise: a small card has no room for two."""

SHARED_JOBS = 4
"""Jobs that may share a larger card unless its owner says otherwise; they also share its compute."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Predicted peak in bytes by method; None where it can't be predicted before the model is there."""

    lora: int | None
    qlora: int | None

    def of(self, method: Method) -> int | None:
        return self.qlora if method is Method.QLORA else self.lora


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A job that could start now, were there room."""

    job_id: int
    user: str
    priority: int
    since: dt.datetime
    methods: tuple[Method, ...]  # permitted at this moment, the preferred one first
    need: Need
    requires: frozenset[tuple[str, str]] = frozenset()  # labels that its node must have

    @property
    def least(self) -> int | None:
        """Bytes with which some permitted method runs; None when one of them is not known."""
        return least_need(self.methods, self.need)


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """A running job's share of its card."""

    job_id: int
    user: str
    reserved: int
    used: int = 0  # bytes measured now; more than reserved when the plan was too small
    priority: int = 0
    preemptible: bool = False  # gives way to a job of higher priority
    ends: dt.datetime | None = None  # expected; None: not known


MARGIN_BYTES = GIB // 2
"""Left free on every device unless its owner says otherwise (`worker --reserve`): what a desktop or a driver may take
between the look and the allocation."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One device as the placement sees it. Bytes."""

    node: str
    total: int
    outside: int = 0  # held by what is not ours, or was a short while ago
    margin: int = 0  # what its owner keeps free
    running: tuple[Occupant, ...] = ()
    max_jobs: int = 1
    labels: frozenset[tuple[str, str]] = frozenset()
    open: bool = True  # online and not draining
    processor: bool = False  # a CPU: the last resort
    user_limit: int | None = None  # jobs that one user may run in the fleet

    @property
    def usable(self) -> int:
        """What our jobs could ever take: the card without what its owner keeps free."""
        return self.total - self.margin

    @property
    def capacity(self) -> int:
        """What our jobs may take together while others keep what they hold."""
        return max(0, self.usable - self.outside)

    @property
    def taken(self) -> int:
        """Reserved but not yet allocated counts as used, and so does what was allocated beyond it."""
        return sum(max(job.reserved, job.used) for job in self.running)

    @property
    def free(self) -> int:
        return max(0, self.capacity - self.taken)

    @property
    def slots(self) -> int:
        return max(0, self.max_jobs - len(self.running))

    def with_job(self, job: Occupant) -> Card:
        return replace(self, running=(*self.running, job))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A job that starts."""

    job: Waiting
    node: str
    method: Method
    reserved: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A card that is kept for a job: what else starts there must leave it its room."""

    job: Waiting
    node: str
    spare: int  # bytes that others may take without delaying it
    spare_slots: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One step of the rule: a job that starts, or the one for which a card is kept."""

    placed: Placement | None = None
    reserved: Reservation | None = None


@dataclass(frozen=True, kw_only=True)
class Openings:
    """What could start somewhere now: bounds that a line may use to leave out jobs without reading them."""

    gpu: int  # bytes of the largest opening on a GPU; 0: none
    processor: tuple[int, int]  # a job that needs more than the first and at most the second may start on a CPU
    unknown: bool  # a job whose need is not known may start
    labels: frozenset[frozenset[tuple[str, str]]]  # of each card with an opening

    @property
    def any(self) -> bool:
        return self.gpu > 0 or self.processor[1] > self.processor[0]

    def admit(self, least: int | None, requires: frozenset[tuple[str, str]]) -> bool:
        if not any(requires <= labels for labels in self.labels):
            return False
        if least is None:
            return self.unknown
        return least <= self.gpu or self.processor[0] < least <= self.processor[1]


class Line(Protocol):
    """Ready jobs, oldest first: one user's of one priority, or all of them."""

    def next(self, openings: Openings) -> Waiting | None:
        """The oldest that the openings admit and that was not given yet. Each call's openings lie within the last's."""
        ...


class ListedLine:
    """A line that is at hand as a list."""

    def __init__(self, jobs: Iterable[Waiting]) -> None:
        self._jobs = list(jobs)

    def next(self, openings: Openings) -> Waiting | None:
        for index, job in enumerate(self._jobs):
            if openings.admit(job.least, job.requires):
                return self._jobs.pop(index)
        return None


def levels_of(jobs: Iterable[Waiting]) -> Iterator[dict[str, Line]]:
    """The lines of a list of jobs, by priority (the highest first) and user."""
    by_level: dict[int, dict[str, list[Waiting]]] = {}
    for job in sorted(jobs, key=lambda j: j.job_id):
        by_level.setdefault(job.priority, {}).setdefault(job.user, []).append(job)
    for priority in sorted(by_level, reverse=True):
        yield {user: ListedLine(line) for user, line in by_level[priority].items()}


@dataclass(kw_only=True)
class _Fleet:
    """The cards while they fill up."""

    cards: dict[str, Card]
    charges: dict[str, float]
    running: dict[str, int]  # jobs by user
    kept: Reservation | None = None
    largest: int = field(init=False)  # bytes for jobs on the largest open card that is no processor, others gone
    ever: Openings = field(init=False)  # what could start once our running jobs have left
    user_limit: int | None = field(init=False)

    def __post_init__(self) -> None:
        usable = [c for c in self.cards.values() if c.open]
        self.largest = largest_gpu(usable)
        self.ever = self._openings([(c, c.capacity) for c in usable if c.capacity and c.max_jobs], usable)
        self.user_limit = min((c.user_limit for c in usable if c.user_limit is not None), default=None)

    def room(self, card: Card) -> int:
        """Bytes that a job may take there now, beside what is kept."""
        if not card.open or not card.slots:
            return 0
        if self.kept is None or self.kept.node != card.node:
            return card.free
        return max(0, min(card.free, self.kept.spare)) if self.kept.spare_slots > 0 else 0

    def openings(self) -> Openings:
        rooms = [(c, room) for c in self.cards.values() if (room := self.room(c)) > 0]
        return self._openings(rooms, [c for c, _ in rooms if not c.running])

    def _openings(self, rooms: Sequence[tuple[Card, int]], whole: Sequence[Card]) -> Openings:
        """`rooms`: bytes by card; `whole`: cards that a job of unknown need may have."""
        return Openings(
            gpu=max((room for c, room in rooms if not c.processor), default=0),
            processor=(self.largest, max((room for c, room in rooms if c.processor), default=0)),
            unknown=any(not c.processor or self.largest == 0 for c in whole),
            labels=frozenset(c.labels for c, _ in rooms),
        )

    def at_limit(self, user: str) -> bool:
        return self.user_limit is not None and self.running.get(user, 0) >= self.user_limit


def place(
    levels: Iterable[Mapping[str, Line]],
    cards: Sequence[Card],
    charges: Mapping[str, float],
    now: dt.datetime,
    oldest: Line | None = None,
) -> Iterator[Decision]:
    """What starts now, in the order in which it is decided; lazily, so that a caller may stop early.

    `levels`: the ready jobs by priority, the highest first, and user. `charges`: GiB hours by user, see `charge`.
    `oldest`: all ready jobs; the oldest that could run goes first once it has waited OLDEST_FIRST_AFTER_S.
    """
    fleet = _Fleet(cards={c.node: c for c in cards}, charges=dict(charges), running=_jobs_by_user(cards))
    if not fleet.openings().any:
        return
    first = None if oldest is None else _first_by_age(oldest, fleet, now)
    if first is not None:
        yield from _try(first, fleet, now)
    for level in levels:
        for job in _in_order(level, fleet, now):
            if first is None or job.job_id != first.job_id:
                yield from _try(job, fleet, now)
        if not fleet.openings().any:
            return


def _first_by_age(oldest: Line, fleet: _Fleet, now: dt.datetime) -> Waiting | None:
    """The oldest job that the fleet could hold and whose user may start one, if it has waited long enough."""
    while (job := oldest.next(fleet.ever)) is not None and waited(job, now) >= OLDEST_FIRST_AFTER_S:
        if not fleet.at_limit(job.user) and any(_rooms(job, fleet, now)):
            return job
    return None


def _in_order(level: Mapping[str, Line], fleet: _Fleet, now: dt.datetime) -> Iterator[Waiting]:
    """One priority's jobs by share and age, while something could start; each is tried before the next is read."""
    heads: list[tuple[float, int, Waiting]] = []

    def read(user: str, last: Waiting | None) -> None:
        if fleet.at_limit(user):
            return
        # Until a card is kept, whoever has waited long enough for one must be seen, though it does not fit now.
        keeps = fleet.kept is None and (last is None or waited(last, now) >= RESERVE_AFTER_S)
        job = level[user].next(fleet.ever if keeps else fleet.openings())
        if job is not None:
            heapq.heappush(heads, (fleet.charges.get(user, 0.0), job.job_id, job))

    for user in level:
        read(user, None)
    while heads and fleet.openings().any:
        *_, job = heapq.heappop(heads)
        yield job
        read(job.user, job)


def _try(job: Waiting, fleet: _Fleet, now: dt.datetime) -> Iterator[Decision]:
    """Start the job on the best card, or keep a card for it when it has waited long enough."""
    found = _best(job, fleet)
    if found is not None:
        method, card, size = found
        started = Occupant(job_id=job.job_id, user=job.user, reserved=size)
        fleet.cards[card.node] = card.with_job(started)
        kept = fleet.kept
        if kept is not None and kept.node == card.node:
            fleet.kept = replace(kept, spare=kept.spare - size, spare_slots=kept.spare_slots - 1)
        fleet.charges[job.user] = fleet.charges.get(job.user, 0.0) + size / GIB * START_CHARGE_S / 3600
        fleet.running[job.user] = fleet.running.get(job.user, 0) + 1
        yield Decision(placed=Placement(job=job, node=card.node, method=method, reserved=size))
    elif fleet.kept is None and waited(job, now) >= RESERVE_AFTER_S:
        fleet.kept = _keep(job, fleet, now)
        if fleet.kept is not None:
            yield Decision(reserved=fleet.kept)


def _best(job: Waiting, fleet: _Fleet) -> tuple[Method, Card, int] | None:
    """The preferred method that some card holds now, and of those cards the one that it fills best.

    An idle card goes before a shared one, whose compute is shared too; among idle ones large cards are left to large
    jobs.
    """
    for method in job.methods:
        size = job.need.of(method)
        holding = [c for c in fleet.cards.values() if _holds_now(c, job, size, fleet)]
        if holding:
            card = min(holding, key=lambda c: (len(c.running) > 0, c.free, c.node))
            return method, card, card.free if size is None else size
    return None


def _holds_now(card: Card, job: Waiting, size: int | None, fleet: _Fleet) -> bool:
    room = fleet.room(card)
    if room <= 0 or not suits(card, job, fleet.largest):
        return False
    if job.least is None and card.running:
        return False  # not predictable: it gets a card of its own until the worker has planned it
    return size is None or size <= room


def largest_gpu(cards: Iterable[Card]) -> int:
    """Bytes for our jobs on the largest open GPU, once everything else has left it; 0 without one."""
    return max((c.usable for c in cards if c.open and not c.processor), default=0)


def could_start(job: Waiting, card: Card, fleet: Iterable[Card]) -> bool:
    """Whether the card alone would hold the job now, whoever is before it."""
    fits = not card.running if job.least is None else job.least <= card.free
    return fits and card.free > 0 and card.slots > 0 and suits(card, job, largest_gpu(fleet))


def suits(card: Card, job: Waiting, largest: int) -> bool:
    """Whether the job may run on this card, room aside. A processor only takes what no GPU of the fleet could hold."""
    if not job.requires <= card.labels:
        return False
    if not card.processor:
        return True
    least = job.least
    return largest == 0 or (least is not None and least > largest)


def _keep(job: Waiting, fleet: _Fleet, now: dt.datetime) -> Reservation | None:
    """Keep the card on which the job can start first: by expected ends, then by what is missing."""

    def rank(found: tuple[int, int, Card, Room]) -> tuple[bool, dt.datetime, int, int, int, str]:
        index, size, card, room = found
        return room.at is None, room.at or now, size - card.free, index, card.capacity, card.node

    best = min(_rooms(job, fleet, now), key=rank, default=None)
    if best is None:
        return None
    *_, card, room = best
    return Reservation(job=job, node=card.node, spare=room.spare, spare_slots=room.spare_slots)


def _rooms(job: Waiting, fleet: _Fleet, now: dt.datetime) -> Iterator[tuple[int, int, Card, Room]]:
    """Where and when the job could start: the place of the method among its methods, bytes, card and room."""
    for card in fleet.cards.values():
        if not card.open or not suits(card, job, fleet.largest):
            continue
        for index, method in enumerate(job.methods):
            size = job.need.of(method)
            bytes_ = max(1, card.capacity) if size is None or job.least is None else size
            if (room := room_at(card, bytes_, now)) is not None:
                yield index, bytes_, card, room


@dataclass(frozen=True, kw_only=True)
class Room:
    """When a card will have room for a size."""

    at: dt.datetime | None  # None: an end on which it depends is not known
    after: tuple[Occupant, ...]  # what must end first
    spare: int  # bytes left then beside the size
    spare_slots: int


def room_at(card: Card, size: int, now: dt.datetime) -> Room | None:
    """When `size` bytes and a slot will be free, if nothing else starts; None: never while others hold what they do."""
    if size > card.capacity or card.max_jobs < 1:
        return None
    staying = sorted(card.running, key=lambda j: (j.ends is None, j.ends or now, -j.reserved, j.job_id))
    gone: list[Occupant] = []

    def free() -> int:
        return card.capacity - sum(max(j.reserved, j.used) for j in staying)

    while free() < size or len(staying) >= card.max_jobs:
        gone.append(staying.pop(0))
    ends = [job.ends for job in gone]
    at = None if any(end is None for end in ends) else max((end for end in ends if end is not None), default=now)
    slots = card.max_jobs - len(staying) - 1
    return Room(at=at if at is None else max(at, now), after=tuple(gone), spare=free() - size, spare_slots=slots)


def give_way(job: Waiting, cards: Sequence[Card]) -> tuple[str, tuple[int, ...]] | None:
    """The card and the running jobs that would have to stop there for a job of higher priority; None: none would help.

    As few as possible, of the lowest priority, and of those the ones that hold least.
    """
    largest, options = largest_gpu(cards), []
    for card in (c for c in cards if c.open and suits(c, job, largest)):
        willing = [j for j in card.running if j.preemptible and j.priority < job.priority]
        for method in job.methods:
            size = job.need.of(method)
            going = None if size is None else _fewest(card, size, willing)
            if going:
                cost = max(j.priority for j in going), sum(j.reserved for j in going)
                options.append((len(going), *cost, card.node, tuple(j.job_id for j in going)))
    return min(options)[3:] if options else None


def _fewest(card: Card, size: int, willing: Sequence[Occupant]) -> list[Occupant] | None:
    """The fewest of the willing whose end makes room for `size` bytes and a slot."""
    for count in range(1, len(willing) + 1):
        # with the largest of them: if these are too small, no other so many are enough
        going = sorted(willing, key=lambda j: -max(j.reserved, j.used))[:count]
        freed = sum(max(j.reserved, j.used) for j in going)
        if card.capacity - card.taken + freed >= size and card.slots + count > 0:
            single = [j for j in willing if card.free + max(j.reserved, j.used) >= size] if count == 1 else []
            return [min(single, key=lambda j: (j.priority, j.reserved))] if single else going
    return None


def waited(job: Waiting, now: dt.datetime) -> float:
    """Seconds since the job began to wait."""
    return (now - job.since).total_seconds()


def _jobs_by_user(cards: Sequence[Card]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for card in cards:
        for job in card.running:
            counts[job.user] = counts.get(job.user, 0) + 1
    return counts


def decayed(amount: float, seconds: float) -> float:
    """A use of `amount` so many seconds later; HALF_LIFE_S halves it."""
    return float(amount * 0.5 ** (max(0.0, seconds) / HALF_LIFE_S))


def charge(past: float, running: Iterable[tuple[int, float]]) -> float:
    """GiB hours that count against a user: decayed past use, and what runs (bytes reserved, seconds so far)."""
    return past + sum(size / GIB * max(seconds, START_CHARGE_S) / 3600 for size, seconds in running)


def permitted_methods(wanted: Method | Sequence[Method]) -> tuple[Method, ...]:
    """The methods that a job may run with, the preferred one first."""
    if isinstance(wanted, Method):
        return (Method.LORA, Method.QLORA) if wanted is Method.AUTO else (wanted,)
    return tuple(wanted)


def choose_method(methods: Sequence[Method], need: Need, limit: int) -> Method | None:
    """The preferred method that runs in `limit` bytes; a need that is not known counts as fitting. None: none fits."""
    for method in methods:
        size = need.of(method)
        if size is None or size <= limit:
            return method
    return None


def within(methods: Sequence[Method], need: Need, max_vram: int | None) -> tuple[Method, ...]:
    """The methods that the job's own limit admits; a need that is not known yet counts as admitted."""
    if max_vram is None:
        return tuple(methods)
    sizes = [(method, need.of(method)) for method in methods]
    return tuple(method for method, size in sizes if size is None or size <= max_vram)


def least_need(methods: Sequence[Method], need: Need) -> int | None:
    """Bytes with which some permitted method runs; None when one of them is not known."""
    sizes = [need.of(method) for method in methods]
    return None if None in sizes else min((size for size in sizes if size is not None), default=None)


def default_max_jobs(total: int) -> int:
    """Jobs that may share a card of `total` bytes."""
    return SHARED_JOBS if total >= SHARED_FROM_BYTES else 1


def queue_key(priority: int, least: int | None, requires: Mapping[str, str], user: str) -> str:
    """The line in which a job waits: jobs with one key differ in nothing that the rule looks at but their age.

    Sorts by priority, the highest first, then by the size's step, so that one index answers what could fit.
    """
    labels = json.dumps(requires, sort_keys=True, ensure_ascii=True) if requires else ""
    return f"{10_000 - priority:05d}|{size_step(least):03d}|{labels}|{user}"


def queue_key_range(priority: int, first_step: int, last_step: int) -> tuple[str, str]:
    """Between what two texts, the first one included, the keys of these steps stand."""
    level = f"{10_000 - priority:05d}"
    return f"{level}|{first_step:03d}|", f"{level}|{last_step:03d}}}"  # } is the next character after the separator


def size_step(size: int | None) -> int:
    """The step of a need in bytes: eight to the octave from 1 GiB, 0 for an unknown one, 1 below 1 GiB."""
    if size is None:
        return 0
    octaves = math.log2(max(size, 1) / GIB)
    return 1 if octaves < 0 else 2 + math.floor(8 * octaves)


def vram_class(size: int | None) -> int:
    """The class (GiB) of a need in bytes; the smallest for an unknown one, the largest for one beyond all."""
    if size is None:
        return VRAM_CLASSES[0]
    return next((c for c in VRAM_CLASSES if size <= c * GIB), VRAM_CLASSES[-1])


def served_classes(free: int) -> tuple[int, ...]:
    """Classes that can hold a job which fits into `free` bytes: those whose lower bound is below it."""
    lower = (0, *VRAM_CLASSES[:-1])
    return tuple(c for c, bound in zip(VRAM_CLASSES, lower, strict=True) if bound * GIB < free)


def queue_name(size_class: int) -> str:
    """The queue of a class, like vram.24."""
    return f"vram.{size_class}"
