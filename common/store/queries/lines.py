"""What waits, read by lines: one statement gives the first jobs of all lines, another the next jobs of one."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection, Mapping, Set
from typing import Any

from sqlalchemy import BindParameter, TextualSelect, bindparam, select, text
from sqlalchemy.orm import Session

from loractl.common.placement.lines import ANY_ROOM, QueueKey, Waiting, in_turn
from loractl.common.placement.rule import RESERVE_AFTER_S, turns_in

from ..columns import UtcDateTime
from ..fleet import waiting_of
from ..tables import READY, Job
from ..transaction import SKIP_LOCKED, Transaction
from .lab_settings import is_by_share

MOST_LINES, MOST_BEYOND = 64, 1000
"""Lines of a user that are read: those of the highest priority, then of the least bytes. Of a user who has more, those
beyond are read where a card is left with room, and only those that it holds."""

_AT_ONCE = 16  # of a line

IN_LINE = "work_left_s, job_id"
"""Orders the jobs of a line, see `in_line`."""

_BEHIND = "(work_left_s, job_id) > (:left_s, :job_id)"  # in that order, after a job

_OF_ROW = (
    'job_id, "user", priority, submitted_at, methods, vram_lora, vram_qlora, lora_until, queue_key, result_host,'
    " result_until, avoids, begun_bf16, gangs, checkpoint_s, work_left_s"
)
_COLUMNS = (
    f"{_OF_ROW},"  # noqa: S608  no input
    # asked of jobs on several cards alone: others have no use for it
    " CASE WHEN gangs IS NOT NULL THEN (SELECT max(events.at) FROM events WHERE events.job_id = jobs.job_id"
    " AND events.kind IN ('requeued', 'retry')) END AS again"
)
_TYPES = {column.key: column.type for column in Job.__table__.columns} | {"again": UtcDateTime()}
_READ = (*_OF_ROW.replace('"', "").split(", "), "again")


_BEHIND_LINE = "lines.queue_key || '~'"
"""Comes after a line's key and before the next one; after the key itself SQLite would walk through the line's jobs."""


_OF_LINE = 'job_id, "user", queue_key, work_left_s, submitted_at'


def lines_of(condition: str, past: str = _BEHIND_LINE, *, lateral: bool = False) -> str:
    """A table `lines`: the first job of each line for which the condition holds. From each line it goes straight to the
    next whose key comes after `past`, over any number of jobs between them; from the last that is read of a user to the
    next user: "~" comes after every key."""
    following = (
        f'{condition} AND ("user", queue_key) > (lines."user", CASE WHEN nth < :most THEN {past} ELSE \'~\' END)'
    )
    return f"""WITH RECURSIVE lines({_OF_LINE}, nth) AS (
  SELECT * FROM (
    SELECT {_OF_LINE}, 1 FROM jobs WHERE {condition} ORDER BY "user", queue_key, {IN_LINE} LIMIT 1
  ) AS head
  UNION ALL
  SELECT one.job_id, one."user", one.queue_key, one.work_left_s, one.submitted_at,
    CASE WHEN one."user" = lines."user" THEN nth + 1 ELSE 1 END
  FROM lines {_first_of(following, f'"user", queue_key, {IN_LINE}', lateral)}
)"""  # noqa: S608  no input


def _first_of(condition: str, order: str, lateral: bool) -> str:
    """Joins with `lines` the first job, `one`, for which the condition holds. SQLite has no LATERAL, and looks each of
    them up once more by its number."""
    if lateral:
        return f"CROSS JOIN LATERAL (SELECT {_OF_LINE} FROM jobs WHERE {condition} ORDER BY {order} LIMIT 1) AS one"  # noqa: S608
    return f"JOIN jobs AS one ON one.job_id = (SELECT job_id FROM jobs WHERE {condition} ORDER BY {order} LIMIT 1)"  # noqa: S608


def _firsts(past: str, chosen: str) -> dict[str, TextualSelect]:
    """Of each line the first job and, where that is another one, the oldest; by database. `chosen`: those of them that
    are read."""
    older = f'{READY} AND "user" = lines."user" AND queue_key = lines.queue_key AND job_id < lines.job_id'
    made = dict[str, TextualSelect]()
    for dialect in ("sqlite", "postgresql"):
        lateral = dialect == "postgresql"
        rows = text(f"""{lines_of(READY, past, lateral=lateral)}
SELECT {_OF_LINE}, nth FROM lines WHERE {chosen.format("lines")}
UNION ALL
SELECT one.job_id, one."user", one.queue_key, one.work_left_s, one.submitted_at, nth
FROM lines {_first_of(older, "job_id", lateral)} WHERE {chosen.format("one")}""")  # noqa: S608  no input
        made[dialect] = rows.bindparams(bindparam("now", type_=UtcDateTime())).columns(submitted_at=UtcDateTime())
    return made


_FITS = "substr({0}.queue_key, 7, 17) <= :room"  # the least bytes, of what is in the index: a line may be long
_FIRSTS = _firsts(_BEHIND_LINE, f"({_FITS} OR {{0}}.submitted_at <= :before OR nth = :most)")
_FIRSTS = {name: one.bindparams(bindparam("before", type_=UtcDateTime())) for name, one in _FIRSTS.items()}
_FITTING = _firsts(
    f"CASE WHEN {_FITS.format('lines')} THEN {_BEHIND_LINE} ELSE substr(lines.queue_key, 1, 6) || '~' END", _FITS
)
"""Keys of one priority sort by the least bytes: from the first line that is too large it goes to the next priority."""


def _typed(statement: str, *parameters: BindParameter[Any]) -> TextualSelect:
    """A statement that gives _COLUMNS."""
    bound = text(statement).bindparams(bindparam("now", type_=UtcDateTime()), *parameters)
    return bound.columns(**{name: _TYPES[name] for name in _READ})


_AFTER = f'FROM jobs WHERE {READY} AND "user" = :user AND queue_key = :key AND {_BEHIND} ORDER BY {IN_LINE} LIMIT :most'
_NEXT = _typed(f"SELECT {_COLUMNS} {_AFTER}")
_SHORT = text(f"SELECT job_id, submitted_at, work_left_s {_AFTER}")
_NEXT_ALIKE = _SHORT.bindparams(bindparam("now", type_=UtcDateTime())).columns(submitted_at=UtcDateTime())
"""_NEXT for a key that holds everything else the rule needs: it reads three columns."""

_NUMBERED = _typed(
    f"SELECT {_COLUMNS} FROM jobs WHERE {READY} AND job_id IN :numbers",  # noqa: S608  no input
    bindparam("numbers", expanding=True),
)


class StoredQueue:
    """The ready jobs at one moment, read as far as the caller asks. `at_once`: of a line, behind its first."""

    def __init__(self, session: Session, now: dt.datetime, at_once: int = _AT_ONCE) -> None:
        self._session = session
        self._now = now
        self._at_once = at_once
        self._firsts: dict[int, Waiting] = {}
        self._room = -1  # up to which they are read
        self._more = False  # whether a user has more lines
        self._next: dict[int, Waiting | None] = {}

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        if self._room < room:
            before = self._now - dt.timedelta(seconds=RESERVE_AFTER_S)
            self._firsts = self._read_firsts(_FIRSTS, most=MOST_LINES, room=f"{room:017d}", before=before)
            self._room = room
        if more := also - self._firsts.keys():
            self._firsts |= self._numbered(more)
        return list(self._firsts.values())

    def beyond(self, room: int) -> list[Waiting]:
        known = {job.job_id for job in self.firsts(room=room)}
        found = self._read_firsts(_FITTING, most=MOST_BEYOND, room=f"{room:017d}").values() if self._more else ()
        return [job for job in found if job.job_id not in known]

    def _read_firsts(self, by_database: Mapping[str, TextualSelect], **asked: Any) -> dict[int, Waiting]:
        """A key says all of most jobs; only of others is the row read."""
        found, others = dict[int, Waiting](), list[int]()
        statement = by_database[self._session.get_bind().dialect.name]
        rows = self._session.execute(statement, {"now": self._now, **asked}).all()  # at once: SQLAlchemy is faster
        for job_id, user, line, left_s, since, nth in rows:
            self._more = self._more or nth == MOST_LINES
            key = QueueKey.parse(line)
            if key.is_whole:
                found[job_id] = key.job(job_id, user, since, left_s)
            else:
                others.append(job_id)
        return found | self._numbered(others)

    def _numbered(self, numbers: Collection[int]) -> dict[int, Waiting]:
        return {job.job_id: job for job in self._read(_NUMBERED, numbers=list(numbers))} if numbers else {}

    def behind(self, job: Waiting) -> list[Waiting]:
        """The next jobs of its line, read at once; none if it is the last."""
        place = {"user": job.user, "key": job.key, "left_s": job.left_s, "job_id": job.job_id, "most": self._at_once}
        key = QueueKey.parse(job.key)
        if not key.is_whole:
            return self._read(_NEXT, **place)
        rows = self._session.execute(_NEXT_ALIKE, {"now": self._now, **place}).all()
        return [key.job(job_id, job.user, since, left_s) for job_id, since, left_s in rows]

    def after(self, job: Waiting) -> Waiting | None:
        if job.job_id not in self._next:
            some = [job, *self.behind(job)]
            self._next |= {one.job_id: other for one, other in itertools.pairwise(some)}
            if len(some) <= self._at_once:
                self._next[some[-1].job_id] = None
        return self._next.get(job.job_id)

    def _read(self, statement: TextualSelect, **values: Any) -> list[Waiting]:
        rows = self._session.execute(statement, {"now": self._now, **values}).mappings()
        return [waiting_of(dict(row), self._now) for row in rows]


def read_order(session: Session, now: dt.datetime, charges: Mapping[str, float], limit: int) -> list[Waiting]:
    """The first ready jobs in the order in which the rule tries them."""
    queue, turn = StoredQueue(session, now, at_once=4), turns_in(is_by_share(session), charges, now)
    every = in_turn(queue, queue.firsts(), turn, lambda job: True)
    return list(itertools.islice(every, limit))


_ROW = select(Job).where(Job.job_id == bindparam("job_id")).with_for_update(**SKIP_LOCKED)
_ROW = _ROW.execution_options(populate_existing=True)
_LINE = select(Job).where(text(READY).bindparams(bindparam("now", type_=UtcDateTime())))
_LINE = _LINE.where(Job.user == bindparam("user"), Job.queue_key == bindparam("key"), text(_BEHIND))
_LINE = _LINE.order_by(text(IN_LINE)).limit(1).with_for_update(**SKIP_LOCKED)


def lock_alike(tx: Transaction, job: Waiting, now: dt.datetime) -> tuple[Job, dt.datetime] | None:
    """The job's row, locked, and the time; if somebody keeps it locked, the next of its line that nobody does."""
    behind = {"now": now, "user": job.user, "key": job.key, "left_s": job.left_s, "job_id": job.job_id}
    rows = tx.timed(_ROW, {"job_id": job.job_id}) or tx.timed(_LINE, behind)
    return next(iter(rows), None)
