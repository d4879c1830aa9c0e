"""What waits, in lines: the rule reads the first job of each, and more of a line only once that one has started.

A line holds one user's jobs between which the rule sees no difference but age and the work that is left. So if the
first of a line can't start, none of it can.
"""

from __future__ import annotations

import bisect
import datetime as dt
import functools
import heapq
import json
import re
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from loractl.common.job.method import Method, Need, SharedNeed, Ways, least_need
from loractl.common.units import GIB, LAST_NUMBER

from .duration import UNKNOWN_S

RESULT_FIRST_S = 600.0
"""How long a job waits only for the box that has its finished result: elsewhere it would be trained again."""


ANY_ROOM = LAST_NUMBER
"""Bytes: no job needs more."""


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
    left_s: float = UNKNOWN_S  # seconds of work that are left, on one whole card
    key: str = field(default="", compare=False)  # of its line in the store, as it was read: a start changes it there

    @functools.cached_property
    def least(self) -> int | None:
        """The least bytes that a permitted method needs of one card; None when one need is not known."""
        return least_need(self.methods, self.need)

    @functools.cached_property
    def bound(self) -> int | None:
        """Bytes that a card must have free before it is worth trying: the job's least, or a card's part of it."""
        return Ways(alone=self.alone, gangs=self.gangs).bound(self.methods, self.need) if self.gangs else self.least

    @functools.cached_property
    def line(self) -> Hashable:
        """Equal for jobs between which the rule sees no difference but age and the work that is left."""
        remembers = self.only_host, self.avoids, self.bf16, self.checkpoint_s
        asks = self.methods, self.need, self.requires, self.alone, self.gangs
        return self.user, self.priority, asks, remembers


def waited(job: Waiting, now: dt.datetime) -> float:
    """Seconds since the job was submitted."""
    return (now - job.since).total_seconds()


def waited_again(job: Waiting, now: dt.datetime) -> float:
    """Seconds since the job began to wait: since it was submitted, or came back."""
    return (now - (job.again or job.since)).total_seconds()


class Queue(Protocol):
    """The ready jobs."""

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> Sequence[Waiting]:
        """The jobs with these numbers, and of each line two: the first, and the oldest. Jobs that need more than `room`
        bytes may be left out while they have waited for less than RESERVE_AFTER_S."""
        ...

    def beyond(self, room: int) -> Sequence[Waiting]:
        """The first jobs of lines that `firsts` has left out because they are too many, if they need no more bytes."""
        ...

    def after(self, job: Waiting) -> Waiting | None:
        """The next job of its line."""
        ...


def in_line(job: Waiting) -> tuple[float, int]:
    """Orders the jobs of a line: by the work that is left. `IN_LINE` in common/store/queries/lines.py is the same in
    SQL."""
    return job.left_s, job.job_id


class Lines:
    """A queue in memory."""

    def __init__(self, jobs: Iterable[Waiting] = (), order: Callable[[Waiting], Any] = in_line) -> None:
        self._order = order
        self._lines: dict[Hashable, _Line] = {}
        self._jobs: dict[int, Waiting] = {}
        for job in jobs:
            self.add(job)

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Waiting) -> None:
        self._jobs[job.job_id] = job
        self._lines.setdefault(job.line, _Line(self._order)).add(job)

    def remove(self, job: Waiting) -> None:
        """Take the job out; it must be there."""
        del self._jobs[job.job_id]
        line = self._lines[job.line]
        line.remove(job)
        if not line.in_order:
            del self._lines[job.line]

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        found = [self._jobs[number] for number in also if number in self._jobs]
        for line in self._lines.values():
            found += (line.in_order[0], line.by_age[0])
        return list({job.job_id: job for job in found}.values())

    def beyond(self, room: int) -> list[Waiting]:
        return []

    def after(self, job: Waiting) -> Waiting | None:
        """It may have been taken out."""
        line = self._lines.get(job.line)
        return None if line is None else line.after(job)


class _Line:
    """Jobs that are alike, by the queue's order and by age."""

    def __init__(self, order: Callable[[Waiting], Any]) -> None:
        self._order = order
        self.in_order: list[Waiting] = []
        self.by_age: list[Waiting] = []

    def add(self, job: Waiting) -> None:
        bisect.insort(self.in_order, job, key=self._order)
        bisect.insort(self.by_age, job, key=_number)

    def remove(self, job: Waiting) -> None:
        del self.in_order[bisect.bisect_left(self.in_order, self._order(job), key=self._order)]
        del self.by_age[bisect.bisect_left(self.by_age, job.job_id, key=_number)]

    def after(self, job: Waiting) -> Waiting | None:
        place = bisect.bisect_right(self.in_order, self._order(job), key=self._order)
        return self.in_order[place] if place < len(self.in_order) else None


def _number(job: Waiting) -> int:
    return job.job_id


class Without:
    """A queue without some lines, and without all jobs of some users."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.lines: set[Hashable] = set()
        self.users: set[str] = set()

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        return self._without(self._queue.firsts(also, room))

    def beyond(self, room: int) -> list[Waiting]:
        return self._without(self._queue.beyond(room))

    def _without(self, found: Iterable[Waiting]) -> list[Waiting]:
        if self.users or self.lines:
            found = (job for job in found if job.user not in self.users and job.line not in self.lines)
        return list(found)

    def after(self, job: Waiting) -> Waiting | None:
        return self._queue.after(job)


class With:
    """A queue with some more jobs, each in a line of its own."""

    def __init__(self, queue: Queue, more: Iterable[Waiting]) -> None:
        self._queue = queue
        self._more = {job.job_id: job for job in more}

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        return [*self._queue.firsts(also, room), *self._more.values()]

    def beyond(self, room: int) -> Sequence[Waiting]:
        return self._queue.beyond(room)

    def after(self, job: Waiting) -> Waiting | None:
        return None if job.job_id in self._more else self._queue.after(job)


def in_turn(
    queue: Queue,
    firsts: Iterable[Waiting],
    rank: Callable[[Waiting], Any],
    goes_on: Callable[[Waiting], bool],
    is_hopeless: Callable[[Waiting], bool] = lambda job: False,
) -> Iterator[Waiting]:
    """The jobs by rank, each once. Of a line the next one is read if `goes_on` says so of the one before.

    The rank of a job may grow meanwhile; it differs between jobs. A line whose next job `is_hopeless` is left out.
    """
    met = set[int]()
    heads: list[tuple[Any, Waiting]] = []

    def join(job: Waiting | None) -> None:
        while job is not None and job.job_id in met:
            job = queue.after(job)
        if job is not None:
            met.add(job.job_id)
            heapq.heappush(heads, (rank(job), job))

    for job in firsts:
        join(job)
    while heads:
        was, job = heapq.heappop(heads)
        if is_hopeless(job):
            continue
        if was < (now := rank(job)):
            heapq.heappush(heads, (now, job))
            continue
        yield job
        if goes_on(job):
            join(queue.after(job))


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


def queue_key(
    priority: int,
    methods: Sequence[Method],
    need: Need,
    ways: Ways,
    requires: Mapping[str, str],
    user: str,
    own: int | None = None,
) -> str:
    """The line in which a job waits: what the rule reads of a job apart from its age and the work that is left.

    Keys of a user sort by priority, the highest first, then by the least bytes. `own`: the number of a job that has
    run. It has a line of its own, since it remembers the cards that failed it, the box of its result, the format of its
    checkpoint and the time to it.
    """
    letters = "".join(method.value[0] for method in methods)
    sizes = (f"{ways.bound(methods, need) or 0:017d}", letters, need.lora or "?", need.qlora or "?")
    asked = ".".join(map(str, sizes))
    if (several := ways.as_json()) is not None:
        asked += f".w{zlib.crc32(json.dumps(several, sort_keys=True).encode()):08x}"
    labels = json.dumps(requires, sort_keys=True).replace("|", "\\u007c") if requires else ""
    key = f"{10_000 - priority:05d}|{asked}|{labels}|{user}"
    return key if own is None else own_key(key, own)


def own_key(key: str, job_id: int) -> str:
    """The key of the job's own line, which comes after that of jobs that ask for the same and have not run."""
    level, asked, rest = key.split("|", 2)
    return f"{level}|{asked.partition('~')[0]}~{job_id}|{rest}"


@dataclass(frozen=True, kw_only=True)
class QueueKey:
    """What a key says."""

    priority: int
    bound: int  # bytes that a card must have free; 0: not known
    methods: tuple[Method, ...]
    need: Need
    requires: frozenset[tuple[str, str]]
    text: str
    is_whole: bool  # it says all that the rule reads of a job apart from `job`'s arguments

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def parse(cls, text: str) -> QueueKey:
        """Of any text that the column `queue_key` holds."""
        level, asked, labels, _ = text.split("|", 3)
        sizes = _SIZES.fullmatch(asked)  # None: also several cards may have the job, or it has run
        letters, lora, qlora = ("", "?", "?") if sizes is None else sizes.groups()
        return cls(
            priority=10_000 - int(level),
            bound=int(asked[:17]),
            methods=tuple(_LETTERS[letter] for letter in letters),
            need=Need(lora=None if lora == "?" else int(lora), qlora=None if qlora == "?" else int(qlora)),
            requires=frozenset(json.loads(labels).items()) if labels else frozenset(),
            text=text,
            is_whole=sizes is not None,
        )

    def job(self, job_id: int, user: str, since: dt.datetime, left_s: float) -> Waiting:
        """A job of the line, copied from another one: by its 16 fields it would take a claim four times as long."""
        job = object.__new__(Waiting)
        job.__dict__.update(self._some.__dict__, job_id=job_id, user=user, since=since, left_s=left_s)
        return job

    @functools.cached_property
    def _some(self) -> Waiting:
        some = Waiting(
            job_id=0,
            user="",
            priority=self.priority,
            since=dt.datetime.min,
            methods=self.methods,
            need=self.need,
            requires=self.requires,
            key=self.text,
        )
        assert some.bound == some.least  # both are computed here, once for all jobs of the line
        return some


_SIZES = re.compile(r"\d{17}\.([lq]{0,2})\.(\d{1,17}|\?)\.(\d{1,17}|\?)")
_LETTERS = {method.value[0]: method for method in (Method.LORA, Method.QLORA)}
