"""The waiting lines: the ready jobs by priority, user and size, read by index and only as far as the caller asks."""

from __future__ import annotations

import datetime as dt
import functools
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import TextClause, TextualSelect, bindparam, text
from sqlalchemy.orm import Session

from loractl.common.placement.lines import (
    Line,
    ListedLine,
    Openings,
    QueueKey,
    Stay,
    SubstitutedLine,
    Waiting,
    queue_key_range,
    waited,
    widest,
)
from loractl.common.placement.rule import OLDEST_FIRST_AFTER_S, turn

from ..columns import MOST_SECONDS, UtcDateTime
from ..fleet import waiting_of
from ..tables import READY, Job

_HIGHEST = 2**31  # above every priority that a row can have
_PROBED = 2000  # ready jobs whose locks a claim reads at once
_AT_ONCE = 32  # of a user's jobs in one query, where many are read

_OF_ROW = (
    'job_id, "user", priority, submitted_at, methods, vram_lora, vram_qlora, lora_until, queue_key, result_host,'
    " result_until, avoids, begun_bf16, gangs, planned, attempt, checkpoint_s"
)
_COLUMNS = (
    f"{_OF_ROW},"  # noqa: S608  no input
    # asked of jobs on several cards alone: others have no use for it
    " CASE WHEN gangs IS NOT NULL THEN (SELECT max(events.at) FROM events WHERE events.job_id = jobs.job_id"
    " AND events.kind IN ('requeued', 'retry')) END AS again"
)
_FITS = (
    "(vram_needed <= :gpu OR (vram_needed > :low AND vram_needed <= :high) OR (vram_needed IS NULL AND :unknown = 1))"
)
_MOST_STAYS = 8  # bounds of time in a statement; where more are needed, the last one is for all of the rest


def _in_time(stays: int) -> str:
    """Of a job for which some card stays long enough; "" where no worker stops by itself (0).

    A statement with it reads past the jobs for which none does: they must neither be given to the rule one by one nor
    hide the jobs behind them.
    """
    bounds = (
        f"((vram_needed > :above{n} AND vram_needed <= :bytes{n} OR vram_needed IS NULL AND :whole{n} = 1)"
        f" AND coalesce(checkpoint_s, :unmeasured{n}) <= :left{n})"
        for n in range(stays)
    )
    return f" AND ({' OR '.join(bounds)})" if stays else ""


_NEXT_PRIORITY = text("SELECT max(priority) FROM jobs WHERE status = 'queued' AND priority < :below")
_USERS = (
    # a loose scan: from each user straight to the next, past any number of jobs between them
    "WITH RECURSIVE users(u) AS ("
    """ SELECT min("user") FROM jobs WHERE status = 'queued' AND priority = :priority"""
    " UNION ALL"
    """ SELECT (SELECT min("user") FROM jobs WHERE status = 'queued' AND priority = :priority AND "user" > users.u)"""
    " FROM users WHERE users.u IS NOT NULL"
    ") "
)
_KEYS = (
    "WITH RECURSIVE keys(k) AS ("
    " SELECT min(queue_key) FROM jobs WHERE status = 'queued' AND queue_key >= :start"
    " UNION ALL"
    " SELECT (SELECT min(queue_key) FROM jobs WHERE status = 'queued' AND queue_key > keys.k) FROM keys"
    " WHERE keys.k < :end"
    ") "
)
EVERY_KEY = (
    "WITH RECURSIVE keys(k) AS ("
    " SELECT min(queue_key) FROM jobs WHERE status = 'queued'"
    " UNION ALL"
    " SELECT (SELECT min(queue_key) FROM jobs WHERE status = 'queued' AND queue_key > keys.k) FROM keys"
    " WHERE keys.k IS NOT NULL"
    ") "
)
"""Each different key once, and NULL, by one step in an index for each."""


@functools.cache
def _heads(stays: int) -> TextClause:
    """Each key, and the oldest ready job under it for which some card stays."""
    return text(
        f"{_KEYS} SELECT k,"  # noqa: S608  no input
        f" (SELECT job_id FROM jobs WHERE {READY} AND queue_key = keys.k{_in_time(stays)} ORDER BY job_id LIMIT 1)"
        " FROM keys WHERE k < :end"
    ).bindparams(bindparam("now", type_=UtcDateTime()))


_LEAST = text(
    "SELECT vram_needed FROM jobs WHERE status = 'queued' AND queue_key = :key AND vram_needed IS NOT NULL"
    " ORDER BY vram_needed LIMIT 1"
).columns(vram_needed=Job.vram_needed.type)

_WANTED = text(
    f"{EVERY_KEY} SELECT EXISTS (SELECT 1 FROM keys WHERE (SELECT 1 FROM jobs WHERE {READY} AND queue_key = keys.k"  # noqa: S608  no input
    " AND vram_needed <= :free AND job_id <> :job_id LIMIT 1) = 1)"
).bindparams(bindparam("now", type_=UtcDateTime()))
_TYPES = {column.key: column.type for column in Job.__table__.columns} | {"again": UtcDateTime()}
_READ = (*_OF_ROW.replace('"', "").split(", "), "again")


def _typed(statement: str) -> TextualSelect:
    """A statement that gives _COLUMNS."""
    bound = text(statement).bindparams(bindparam("now", type_=UtcDateTime()))
    return bound.columns(**{name: _TYPES[name] for name in _READ})


def _oldest(condition: str, limit: int = 1) -> TextualSelect:
    """The oldest ready jobs that meet the condition."""
    return _typed(f"SELECT {_COLUMNS} FROM jobs WHERE {READY} {condition} ORDER BY job_id LIMIT {limit}")  # noqa: S608  no input


def _typed_without(condition: str) -> TextualSelect:
    """The oldest ready job of other users than some."""
    of_others = f'{condition} AND "user" NOT IN :without ORDER BY job_id LIMIT 1'
    bound = text(f"SELECT {_COLUMNS} FROM jobs WHERE {READY} {of_others}")  # noqa: S608  no input
    bound = bound.bindparams(bindparam("now", type_=UtcDateTime()), bindparam("without", expanding=True))
    return bound.columns(**{name: _TYPES[name] for name in _READ})


_OF_USER = 'AND priority = :priority AND "user" = '
_FIRST_BY_USER = _typed(
    f"{_USERS} SELECT {_COLUMNS} FROM jobs WHERE job_id IN"  # noqa: S608  no input
    f" (SELECT (SELECT job_id FROM jobs WHERE {READY} {_OF_USER} users.u ORDER BY job_id LIMIT 1)"
    " FROM users WHERE users.u IS NOT NULL)"
)
_NEXT_OF_USER = _oldest(f"{_OF_USER} :user AND job_id > :after")
_SOME_OF_USER = _oldest(f"{_OF_USER} :user AND job_id > :after", _AT_ONCE)
_OLDEST = _oldest("")
_BY_NUMBER = _oldest("AND job_id = :job_id")


@functools.cache
def _next_of_key(stays: int) -> TextualSelect:
    return _oldest(f"AND queue_key = :key AND job_id > :after AND {_FITS}{_in_time(stays)}")


@functools.cache
def _oldest_fitting(stays: int) -> TextualSelect:
    return _oldest(f"AND job_id > :after AND {_FITS}{_in_time(stays)}")


@functools.cache
def _oldest_of_others(stays: int) -> TextualSelect:
    return _typed_without(f"AND job_id > :after AND {_FITS}{_in_time(stays)}")


def read_levels(session: Session, now: dt.datetime, changed: Waiting | None = None) -> Iterator[dict[str, Line]]:
    """The ready jobs' lines by priority and user, read as far as the caller asks.

    `changed`: a job in another form than its row has.
    """
    for priority in _priorities(session):
        level = _Level(session, now, priority)
        lines: dict[str, Line] = {
            user: _StoredLine(level, user, first) for user, first in _first_by_user(session, now, priority).items()
        }
        if changed is not None and changed.priority == priority:
            lines[changed.user] = SubstitutedLine(lines.get(changed.user, ListedLine(())), changed)
        yield lines


def read_wanted(session: Session, now: dt.datetime, job_id: int, free: int) -> bool:
    """Whether another ready job than this one needs no more than `free` bytes."""
    asked = {"now": now, "job_id": job_id, "free": free}
    return bool(session.execute(_WANTED, asked).scalar())


def read_locked(session: Session, now: dt.datetime) -> dict[int, str]:
    """Those of the first ready jobs whose rows somebody keeps locked, with their users. It locks the others for a
    moment to know."""
    first = text(
        f'SELECT job_id, "user" FROM jobs WHERE {READY} ORDER BY priority DESC, job_id LIMIT {_PROBED}'  # noqa: S608  no input
    ).bindparams(bindparam("now", type_=UtcDateTime()))
    ready = {row.job_id: row.user for row in session.execute(first, {"now": now})}
    with session.begin_nested() as probe:
        free = text(f"{first.text} FOR SHARE SKIP LOCKED").bindparams(bindparam("now", type_=UtcDateTime()))
        unlocked = set(session.execute(free, {"now": now}).scalars())
        probe.rollback()
    return {job_id: user for job_id, user in ready.items() if job_id not in unlocked}


def read_order(session: Session, now: dt.datetime, charges: Mapping[str, float], limit: int) -> list[Waiting]:
    """The first ready jobs in the order in which the rule tries them: by priority, their user's share, age."""
    found: list[Waiting] = []
    for priority in _priorities(session):
        heads = _first_by_user(session, now, priority).values()
        level = heapq.merge(*(_from(session, now, first) for first in heads), key=lambda job: turn(job, charges))
        found += itertools.islice(level, limit - len(found))
        if len(found) == limit:
            break
    return found


def read_oldest(session: Session, now: dt.datetime) -> Line:
    """All ready jobs by age, as far as the caller asks."""
    return _OldestLine(session, now)


def _priorities(session: Session) -> Iterator[int]:
    """Of waiting jobs, from the highest down."""
    below = _HIGHEST
    while (priority := session.execute(_NEXT_PRIORITY, {"below": below}).scalar()) is not None:
        yield priority
        below = priority


def _first_by_user(session: Session, now: dt.datetime, priority: int) -> dict[str, Waiting]:
    """Each user's oldest ready job of the priority."""
    rows = session.execute(_FIRST_BY_USER, {"now": now, "priority": priority}).mappings().all()
    return {row["user"]: waiting_of(dict(row), now) for row in rows}


def _from(session: Session, now: dt.datetime, first: Waiting) -> Iterator[Waiting]:
    """A user's ready jobs of one priority by age, from the first of them on."""
    yield first
    last = first
    while True:
        wanted = {"now": now, "priority": first.priority, "user": first.user, "after": last.job_id}
        some = [waiting_of(dict(row), now) for row in session.execute(_SOME_OF_USER, wanted).mappings()]
        yield from some
        if len(some) < _AT_ONCE:
            return
        last = some[-1]


@dataclass(kw_only=True)
class _Head:
    """A line's position under one key."""

    key: QueueKey
    oldest: int | None  # the oldest job of any need for which some card stays, not given yet; None: not known
    stays: frozenset[Stay] | None  # for which it was read
    job: Waiting | None = None  # an admitted job that was looked up and not given yet
    given: int = 0  # jobs up to this number were given, or are not admitted any more
    empty: bool = False

    def still_oldest(self, openings: Openings) -> bool:
        """Whether `oldest` is admitted, without a look at its row: bounds of time were read for any labels."""
        in_time = self.stays is None or (self.stays == openings.stays and not self.key.requires)
        return self.oldest is not None and self.oldest > self.given and self.key.all_fit(openings) and in_time


class _Level:
    """One priority's ready jobs. Their keys are read when a line first needs them, as far as something could fit."""

    def __init__(self, session: Session, now: dt.datetime, priority: int) -> None:
        self.session = session
        self.now = now
        self.priority = priority
        self._read = ("}", "")  # the part of the keys that was read: nothing yet
        self._stays: frozenset[Stay] | None = None  # for which they were read
        self._keys: dict[str, list[tuple[QueueKey, int | None]]] = {}

    def heads(self, user: str, openings: Openings) -> list[_Head]:
        """The user's keys under which something may be admitted, each with its oldest ready job."""
        start, end = queue_key_range(self.priority, *openings.steps)
        # a line may ask for more than another one did before
        if start < self._read[0] or end > self._read[1] or openings.stays != self._stays:
            start, end = min(start, self._read[0]), max(end, self._read[1])
            self._read, self._stays, self._keys = (start, end), openings.stays, {}
            stays = _stays(openings)
            asked = {"start": start, "end": end, "now": self.now, **_time_bounds(stays)}
            for key_text, job_id in self.session.execute(_heads(len(stays)), asked):
                key = QueueKey.parse(key_text)
                self._keys.setdefault(key.user, []).append((key, job_id))
        mine = self._keys.get(user, [])
        return [_Head(key=key, oldest=job_id, stays=self._stays, empty=job_id is None) for key, job_id in mine]

    def one(self, statement: TextualSelect, **values: Any) -> Waiting | None:
        return _one(self.session, statement, self.now, **values)


class _StoredLine:
    """A user's line in the database.

    It goes from one job to the next by age while they are admitted. A job that is not admitted may have many more like
    it behind it. From there on the line goes by keys, and merges their jobs by age. Openings only shrink while the rule
    runs, so it need not look again at what did not fit.
    """

    def __init__(self, level: _Level, user: str, first: Waiting) -> None:
        self._level = level
        self._user = user
        self._first = first
        self._last: Waiting | None = None  # the last that was looked at by age
        self._heads: list[_Head] | None = None  # None: by age alone so far

    def next(self, openings: Openings) -> Waiting | None:
        if self._heads is None:
            if self._last is None or openings.admits(self._last):
                job = self._by_age()
                if job is None or openings.admits(job):
                    return job
            self._heads = self._level.heads(self._user, openings)
            for head in self._heads:
                head.given = 0 if self._last is None else self._last.job_id
        return self._by_key(self._heads, openings)

    def _by_age(self) -> Waiting | None:
        job: Waiting | None = self._first
        if self._last is not None:
            after = self._last.job_id
            job = self._level.one(_NEXT_OF_USER, priority=self._level.priority, user=self._user, after=after)
        self._last = job or self._last
        return job

    def _by_key(self, heads: list[_Head], openings: Openings) -> Waiting | None:
        ages = []
        for head in heads:
            if not head.empty and head.key.may_fit(openings) and (age := self._age(head, openings)) is not None:
                ages.append((age, head))
        for age, head in sorted(ages, key=lambda pair: pair[0]):
            job = head.job or self._level.one(_BY_NUMBER, job_id=age)
            head.job, head.oldest, head.given = None, None, age
            if job is not None:
                return job  # else it started or was held this moment
        return None

    def _age(self, head: _Head, openings: Openings) -> int | None:
        """The number of the oldest admitted job under the key."""
        if head.still_oldest(openings):
            return head.oldest
        if head.job is None or not openings.admits(head.job):
            head.job = self._search(head, openings)
            head.oldest, head.empty = None, head.job is None
        return None if head.job is None else head.job.job_id

    def _search(self, head: _Head, openings: Openings) -> Waiting | None:
        """The oldest job under the key that fits and was not given yet."""
        low, high = openings.processor
        if head.key.step > 0:
            # the opening ends inside this step, where many jobs may be a little too large
            least = self._level.session.execute(_LEAST, {"key": head.key.text}).scalar()
            if least is None or (least > openings.gpu and (high <= low or least > high)):
                return None
        stays = _stays(openings, head.key.requires)
        bounds = {**_bounds(openings), **_time_bounds(stays)}
        return self._level.one(_next_of_key(len(stays)), key=head.key.text, after=head.given, **bounds)


class _OldestLine:
    """All ready jobs by age. It reads only the first one until that has waited OLDEST_FIRST_AFTER_S."""

    def __init__(self, session: Session, now: dt.datetime) -> None:
        self._session = session
        self._now = now
        self._given = 0

    def next(self, openings: Openings) -> Waiting | None:
        if self._given == 0:
            first = _one(self._session, _OLDEST, self._now)
            if first is None or waited(first, self._now) < OLDEST_FIRST_AFTER_S:
                return None  # no job has waited that long: the usual case costs one row
        while True:
            job = self._fitting(openings)
            if job is None:
                return None
            self._given = job.job_id
            if openings.admits(job):
                return job
            if waited(job, self._now) < OLDEST_FIRST_AFTER_S:
                return None  # those behind it are younger: of thousands that no card stays for, none is read

    def _fitting(self, openings: Openings) -> Waiting | None:
        stays = _stays(openings)
        asked = {**_bounds(openings), **_time_bounds(stays), "after": self._given}
        if openings.without:
            others = _oldest_of_others(len(stays))
            return _one(self._session, others, self._now, without=sorted(openings.without), **asked)
        return _one(self._session, _oldest_fitting(len(stays)), self._now, **asked)


def _bounds(openings: Openings) -> dict[str, int]:
    low, high = openings.processor
    return {"gpu": openings.gpu, "low": low, "high": high, "unknown": int(openings.unknown)}


def _stays(openings: Openings, requires: frozenset[tuple[str, str]] = frozenset()) -> list[Stay]:
    """The bounds of time for jobs that require at least these labels; none where no worker stops by itself."""
    if openings.stays is None:
        return []
    return widest(openings.stays, requires, _MOST_STAYS) or [_NO_STAY]


def _time_bounds(stays: Sequence[Stay]) -> dict[str, float]:
    """The parameters of `_in_time`."""
    found: dict[str, float] = {}
    for n, stay in enumerate(stays):
        found |= {f"above{n}": stay.above, f"bytes{n}": stay.bytes, f"whole{n}": int(stay.whole)}
        found |= {f"left{n}": min(stay.left_s, MOST_SECONDS), f"unmeasured{n}": 0.0 if stay.unmeasured else _TOO_LONG_S}
    return found


_NO_STAY = Stay(above=-1, bytes=-1, whole=False, labels=frozenset(), left_s=-1.0, unmeasured=False)
_TOO_LONG_S = 2.0 * MOST_SECONDS


def _one(session: Session, statement: TextualSelect, now: dt.datetime, **values: Any) -> Waiting | None:
    row = session.execute(statement, {"now": now, **values}).mappings().first()
    return None if row is None else waiting_of(dict(row), now)
