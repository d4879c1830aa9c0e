"""Lines of waiting jobs. The rule reads only those jobs that could start now.

A line's jobs share a queue key: everything that the rule reads of a waiting job, except its age. Sizes are coarse VRAM
classes for the queues, and fine steps for the order of waiting jobs.
"""

from __future__ import annotations

import bisect
import datetime as dt
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from loractl.common.job.method import Method, Need, SharedNeed, Ways, least_need
from loractl.common.units import GIB

RESULT_FIRST_S = 600.0
"""How long a job waits only for the box that has its finished result: elsewhere it would be trained again."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A job that could start now if a card had room."""

    job_id: int
    user: str
    priority: int
    since: dt.datetime
    methods: tuple[Method, ...]  # permitted at this moment, the preferred one first
    need: Need
    requires: frozenset[tuple[str, str]] = frozenset()  # labels that its node must have
    only_host: str | None = None  # the box that has its finished result, while no other box may take it
    avoids: frozenset[str] = frozenset()  # cards and boxes that failed it a short while ago
    bf16: bool | None = None  # whether its stored checkpoint was trained in bfloat16; None: any card may go on from it
    alone: bool = True  # one card may take it
    gangs: tuple[SharedNeed, ...] = ()  # how several cards may divide it, the preferred way first
    again: dt.datetime | None = None  # when it came back: after an attempt, a hold or a retry; None: it never left
    checkpoint_s: float | None = None  # from an attempt's start to its first stored checkpoint; None: not measured

    @functools.cached_property
    def least(self) -> int | None:
        """The least bytes that a permitted method needs of one card; None when one need is not known."""
        return least_need(self.methods, self.need)

    @functools.cached_property
    def bound(self) -> int | None:
        """Bytes that a card must have free before it is worth trying: the job's least, or a card's part of it."""
        return Ways(alone=self.alone, gangs=self.gangs).bound(self.methods, self.need) if self.gangs else self.least


def waited(job: Waiting, now: dt.datetime) -> float:
    """Seconds since the job was submitted."""
    return (now - job.since).total_seconds()


def waited_again(job: Waiting, now: dt.datetime) -> float:
    """Seconds since the job began to wait: since it was submitted, or came back."""
    return (now - (job.again or job.since)).total_seconds()


@dataclass(frozen=True, kw_only=True)
class Stay:
    """An opening on one card and how long that card stays: a bound like those of `Openings`."""

    above: int  # a job that needs this much or less does not start there: a processor leaves it to GPUs; -1: it may
    bytes: int  # a job that needs more does not fit
    whole: bool  # a job whose need is not known may start
    labels: frozenset[tuple[str, str]]
    left_s: float  # from when the room is there; infinite: its worker stays
    unmeasured: bool  # that is enough for a job whose time to a checkpoint was not measured

    def admits(self, job: Waiting) -> bool:
        time = self.unmeasured if job.checkpoint_s is None else job.checkpoint_s <= self.left_s
        fits = self.whole if job.bound is None else self.above < job.bound <= self.bytes
        return time and fits and job.requires <= self.labels

    def exceeds(self, other: Stay) -> bool:
        """Whether it admits all that the other one does, apart from labels."""
        more = self.above <= other.above and self.bytes >= other.bytes and self.left_s >= other.left_s
        return more and self.whole >= other.whole and self.unmeasured >= other.unmeasured

    def or_(self, other: Stay) -> Stay:
        """A bound for what one of them admits, apart from labels."""
        return replace(
            self,
            above=min(self.above, other.above),
            bytes=max(self.bytes, other.bytes),
            whole=self.whole or other.whole,
            left_s=max(self.left_s, other.left_s),
            unmeasured=self.unmeasured or other.unmeasured,
        )


def widest(stays: Iterable[Stay], requires: frozenset[tuple[str, str]], most: int) -> list[Stay]:
    """At most `most` bounds that together admit each job with these labels that one of the stays admits."""
    found: list[Stay] = []
    for stay in sorted(stays, key=lambda one: (-one.bytes, -one.left_s)):
        if requires <= stay.labels and not any(other.exceeds(stay) for other in found):
            found.append(stay)
    rest = found[most - 1 :]
    return [*found[: most - 1], functools.reduce(Stay.or_, rest)] if rest else found


@dataclass(frozen=True, kw_only=True)
class Openings:
    """What could start somewhere now: bounds that a line may use to leave out jobs without reading them."""

    gpu: int  # bytes of the largest opening on a GPU; 0: none
    processor: tuple[int, int]  # a job that needs more than the first and at most the second may start on a CPU
    unknown: bool  # a job whose need is not known may start
    labels: frozenset[frozenset[tuple[str, str]]]  # of each card with an opening
    without: frozenset[str] = frozenset()  # users of whom no job is asked for
    stays: frozenset[Stay] | None = None  # of each card with an opening; None: no worker stops by itself

    @property
    def any(self) -> bool:
        """Whether a job may start."""
        return self.gpu > 0 or self.processor[1] > self.processor[0]

    @property
    def steps(self) -> tuple[int, int]:
        """The size steps that may be admitted, as ranges with both ends included; step 0: a need not known."""
        low, high = self.processor
        return 0 if self.unknown else 1, max(size_step(self.gpu), size_step(high) if high > low else 0)

    def may_admit(self, step: int, requires: frozenset[tuple[str, str]]) -> bool:
        """False when no job of this step and these labels is admitted. Steps are rounded down."""
        if not self._has(requires):
            return False
        if step == 0:
            return self.unknown
        low, high = self.processor
        return step <= size_step(self.gpu) or size_step(low) <= step <= size_step(high)

    def admit_all(self, step: int) -> bool:
        """True only when every job of this step is admitted, given that some may be; `stays` are not asked."""
        return step == 0 or step < size_step(self.gpu)

    def admits(self, job: Waiting) -> bool:
        """Whether the job may start, see `admit`, and some card stays long enough for it."""
        fits = job.user not in self.without and self.admit(job.bound, job.requires)
        return fits and (self.stays is None or any(stay.admits(job) for stay in self.stays))

    def admit(self, least: int | None, requires: frozenset[tuple[str, str]]) -> bool:
        if not self._has(requires):
            return False
        if least is None:
            return self.unknown
        return least <= self.gpu or self.processor[0] < least <= self.processor[1]

    def _has(self, requires: frozenset[tuple[str, str]]) -> bool:
        return any(requires <= labels for labels in self.labels)


class Line(Protocol):
    """Ready jobs, oldest first: one user's of one priority, or all of them."""

    def next(self, openings: Openings) -> Waiting | None:
        """The oldest admitted job that was not given yet. Each call's openings must lie within the last call's."""
        ...


class ListedLine:
    """A line over a list."""

    def __init__(self, jobs: Iterable[Waiting]) -> None:
        self._jobs = list(jobs)

    def next(self, openings: Openings) -> Waiting | None:
        for index, job in enumerate(self._jobs):
            if openings.admits(job):
                return self._jobs.pop(index)
        return None


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """What a claim goes without: jobs whose rows are locked, and all jobs of users whose rows would keep it busy."""

    jobs: set[int] = field(default_factory=set)
    users: set[str] = field(default_factory=set)

    def has(self, job: Waiting) -> bool:
        return job.job_id in self.jobs or job.user in self.users


class PassingLine:
    """A line without some jobs."""

    def __init__(self, line: Line, passed: PassedOver) -> None:
        self._line, self._passed = line, passed

    def next(self, openings: Openings) -> Waiting | None:
        of_others = replace(openings, without=openings.without | self._passed.users)
        while (job := self._line.next(of_others)) is not None and self._passed.has(job):
            pass
        return job


class SubstitutedLine:
    """A line in which one job has another form: at its own place by age, but with other needs or methods."""

    def __init__(self, line: Line, changed: Waiting) -> None:
        self._line = line
        self._number = changed.job_id
        self._changed: Waiting | None = changed  # None: it was given
        self._read: Waiting | None = None  # from the line, and not given yet

    def next(self, openings: Openings) -> Waiting | None:
        other, self._read = self._read, None
        if other is None or not openings.admits(other):
            other = self._other(openings)
        changed = self._changed
        if changed is None or not openings.admits(changed):
            return other
        if other is not None and other.job_id < changed.job_id:
            return other
        self._changed, self._read = None, other
        return changed

    def _other(self, openings: Openings) -> Waiting | None:
        job = self._line.next(openings)
        return self._line.next(openings) if job is not None and job.job_id == self._number else job


Order = tuple[float, int]  # what comes first, then the job's number

_Shelf = tuple[int, frozenset[tuple[str, str]]]  # size step, required labels


class KeptLine:
    """Jobs in one order, on a shelf for each step of need. An opening rules out whole shelves before they are read."""

    def __init__(self) -> None:
        self._order: list[Order] = []
        self._shelves: dict[_Shelf, list[tuple[Order, Waiting]]] = {}
        self._jobs: dict[Order, Waiting] = {}

    def __len__(self) -> int:
        return len(self._order)

    def first(self) -> Waiting | None:
        return self._jobs[self._order[0]] if self._order else None

    def add(self, job: Waiting, rank: float = 0.0) -> None:
        """Put the job in its place, by rank, then by number."""
        order = (rank, job.job_id)
        bisect.insort(self._order, order)
        bisect.insort(self._shelves.setdefault(_shelf(job), []), (order, job), key=lambda entry: entry[0])
        self._jobs[order] = job

    def remove(self, job: Waiting, rank: float = 0.0) -> None:
        """Take the job out; it must be there, with that rank."""
        order = (rank, job.job_id)
        del self._order[bisect.bisect_left(self._order, order)]
        del self._jobs[order]
        entries = self._shelves[_shelf(job)]
        del entries[bisect.bisect_left(entries, order, key=lambda entry: entry[0])]
        if not entries:
            del self._shelves[_shelf(job)]

    def reader(self) -> LineReader:
        """A line over what waits now. Once the line has changed, it must not be read any more."""
        return LineReader(self._shelves)


class LineReader:
    """One pass over a kept line, see `Line`."""

    def __init__(self, shelves: dict[_Shelf, list[tuple[Order, Waiting]]]) -> None:
        self._shelves = shelves
        self._read: dict[_Shelf, int] = {}  # entries that were given or did not fit

    def next(self, openings: Openings) -> Waiting | None:
        best: tuple[Order, Waiting, _Shelf] | None = None
        for shelf, entries in self._shelves.items():
            if not openings.may_admit(*shelf):
                continue
            place = self._read.get(shelf, 0)
            while place < len(entries):
                order, job = entries[place]
                if openings.admits(job):
                    if best is None or order < best[0]:
                        best = (order, job, shelf)
                    break
                place += 1
            self._read[shelf] = place
        if best is None:
            return None
        self._read[best[2]] += 1
        return best[1]


def _shelf(job: Waiting) -> _Shelf:
    return size_step(job.bound), job.requires


VRAM_CLASSES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 144, 192, 288)
"""GiB. A job waits in the smallest class that holds its need; sizes are those of cards that labs own."""


def vram_class(size: int | None) -> int:
    """The class (GiB) of a need in bytes; the smallest for an unknown one, the largest for one beyond all."""
    if size is None:
        return VRAM_CLASSES[0]
    return next((c for c in VRAM_CLASSES if size <= c * GIB), VRAM_CLASSES[-1])


def served_classes(free: int) -> tuple[int, ...]:
    """Classes of the jobs that fit into `free` bytes: those with a lower bound below it."""
    lower = (0, *VRAM_CLASSES[:-1])
    return tuple(c for c, bound in zip(VRAM_CLASSES, lower, strict=True) if bound * GIB < free)


def size_step(size: int | None) -> int:
    """The step of a need in bytes: eight to the octave from 1 GiB, 0 for an unknown one, 1 below 1 GiB."""
    if size is None:
        return 0
    octaves = math.log2(max(size, 1) / GIB)
    return 1 if octaves < 0 else 2 + math.floor(8 * octaves)


def queue_key(priority: int, least: int | None, requires: Mapping[str, str], user: str) -> str:
    """The line in which a job waits. For the rule, jobs with the same key differ only in their age.

    Keys sort by priority, the highest first, then by the size's step, so that one index answers what could fit.
    """
    labels = json.dumps(requires, sort_keys=True, ensure_ascii=True).replace("|", "\\u007c") if requires else ""
    return f"{10_000 - priority:05d}|{size_step(least):03d}|{labels}|{user}"


def queue_key_range(priority: int, first_step: int, last_step: int) -> tuple[str, str]:
    """The range of these steps' keys: first text included, last one not."""
    level = f"{10_000 - priority:05d}"
    return f"{level}|{first_step:03d}|", f"{level}|{last_step:03d}}}"  # } is the next character after the separator


@dataclass(frozen=True, kw_only=True)
class QueueKey:
    """The parts of a key that `queue_key` made."""

    text: str
    level: str
    step: int
    requires: frozenset[tuple[str, str]]
    user: str

    @classmethod
    def parse(cls, text: str) -> QueueKey:
        level, step, labels, user = text.split("|", 3)
        requires = frozenset(json.loads(labels).items()) if labels else frozenset()
        return cls(text=text, level=level, step=int(step), requires=requires, user=user)

    def may_fit(self, openings: Openings) -> bool:
        """False when no job under this key can be admitted."""
        return openings.may_admit(self.step, self.requires)

    def all_fit(self, openings: Openings) -> bool:
        """True only when every job under this key is admitted, given that some may be."""
        return openings.admit_all(self.step)
