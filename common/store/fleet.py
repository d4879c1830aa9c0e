"""The fleet and its waiting lines as the placement rule sees them, read from the database by index."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, TextualSelect, bindparam, column, select, text
from sqlalchemy.orm import Session

from loractl.common.job.method import Method
from loractl.common.job.need import Need
from loractl.common.job.status import Status
from loractl.common.placement.cards import Card, Occupant
from loractl.common.placement.keys import queue_key_range
from loractl.common.placement.lines import Line, Openings, Waiting, waited
from loractl.common.placement.rule import OLDEST_FIRST_AFTER_S, Decision, place
from loractl.common.placement.shares import charge, decayed

from .tables import DrainOrder, Job, Node, Use, UtcDateTime

NODE_STALE_S = 60.0
"""A node that was not seen for so long counts as offline."""


# --- cards ---

OCCUPANT = (
    Job.job_id, Job.user, Job.node, Job.vram_reserved, Job.eta_seconds, Job.priority, Job.preemptible
)  # fmt: skip
"""What a card shows of a running job."""


def read_cards(session: Session, now: dt.datetime) -> list[Card]:
    """Every card that a node has reported, with what runs there; closed when it is offline or drained."""
    running: dict[str, list[Any]] = {}
    for row in session.execute(select(*OCCUPANT).where(Job.status == Status.RUNNING)):
        running.setdefault(row.node or "", []).append(row)
    drained = drained_targets(session, now)
    return [card_of(node, running.get(node.node, []), now, drained) for node in session.scalars(select(Node))]


def card_of(node: Node, running: list[Any], now: dt.datetime, drained: Mapping[str, DrainOrder]) -> Card:
    """One node's card. `running`: rows of OCCUPANT."""
    online = (now - node.seen_at).total_seconds() <= NODE_STALE_S
    return Card(
        node=node.node,
        total=node.total,
        outside=node.outside_bytes,
        margin=node.margin,
        running=tuple(
            Occupant(
                job_id=row.job_id,
                user=row.user,
                # a job of an older version has no reservation: it may take all that there is
                reserved=node.total if row.vram_reserved is None else row.vram_reserved,
                used=int(node.used.get(str(row.job_id), 0)),
                priority=row.priority,
                preemptible=row.preemptible,
                ends=None if row.eta_seconds is None else now + dt.timedelta(seconds=row.eta_seconds),
            )
            for row in running
        ),
        max_jobs=node.max_jobs,
        labels=frozenset(node.labels.items()),
        open=online and not node.draining and node.node not in drained and node.host not in drained,
        processor=node.kind == "cpu",
        user_limit=node.user_limit,
    )


def drained_targets(session: Session, now: dt.datetime) -> dict[str, DrainOrder]:
    """Host or card -> the person's order that keeps it empty now."""
    orders = session.scalars(select(DrainOrder))
    return {order.target: order for order in orders if order.until is None or order.until > now}


def read_charges(session: Session, now: dt.datetime) -> dict[str, float]:
    """GiB hours that count against each user who had or has a card."""
    past = {use.user: decayed(use.gib_hours, (now - use.at).total_seconds()) for use in session.scalars(select(Use))}
    running: dict[str, list[tuple[int, float]]] = {}
    columns = (Job.user, Job.vram_reserved, Job.started_at)
    for row in session.execute(select(*columns).where(Job.status == Status.RUNNING)):
        seconds = 0.0 if row.started_at is None else (now - row.started_at).total_seconds()
        running.setdefault(row.user, []).append((row.vram_reserved or 0, seconds))
    return {user: charge(past.get(user, 0.0), running.get(user, ())) for user in past.keys() | running.keys()}


@dataclass(frozen=True, kw_only=True)
class FleetView:
    """The whole fleet at one moment, and what the rule would do with it."""

    now: dt.datetime
    nodes: dict[str, Node]
    cards: dict[str, Card]
    drains: dict[str, DrainOrder]  # by host or card
    running: dict[int, Job]
    charges: dict[str, float]  # GiB hours by user
    decisions: tuple[Decision, ...]  # what starts next, and for which job a card is kept

    def drain_of(self, node: str) -> DrainOrder | None:
        return self.drains.get(node) or self.drains.get(node.rpartition(":")[0])


def read_view(session: Session, now: dt.datetime) -> FleetView:
    """Everything about the fleet, read at once."""
    cards, charges = read_cards(session, now), read_charges(session, now)
    decisions = place(read_levels(session, now), cards, charges, now, read_oldest(session, now))
    return FleetView(
        now=now,
        nodes={node.node: node for node in session.scalars(select(Node).order_by(Node.node))},
        cards={card.node: card for card in sorted(cards, key=lambda card: card.node)},
        drains=drained_targets(session, now),
        running={job.job_id: job for job in session.scalars(select(Job).where(Job.status == Status.RUNNING))},
        charges=charges,
        decisions=tuple(decisions),
    )


# --- lines ---

_HIGHEST = 2**31 - 1  # above every priority

# Literal conditions: a partial index is only used where the planner can see that its condition holds.
_READY = "status = 'queued' AND NOT held AND NOT cancel_requested AND (not_before IS NULL OR not_before <= :now)"
_COLUMNS = 'job_id, "user", priority, submitted_at, methods, vram_lora, vram_qlora, lora_until, queue_key'
_FITS = (
    "(vram_needed <= :gpu OR (vram_needed > :low AND vram_needed <= :high) OR (vram_needed IS NULL AND :unknown = 1))"
)
_NEXT_PRIORITY = text("SELECT max(priority) FROM jobs WHERE status = 'queued' AND priority < :below")
_USERS = (
    # a loose scan: from each user straight to the next, however many jobs wait between them
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
_HEADS = text(
    f"{_KEYS} SELECT k,"  # noqa: S608  no input
    f" (SELECT job_id FROM jobs WHERE {_READY} AND queue_key = keys.k ORDER BY job_id LIMIT 1)"
    " FROM keys WHERE k < :end"
).bindparams(bindparam("now", type_=UtcDateTime()))
_LEAST = text(
    "SELECT vram_needed FROM jobs WHERE status = 'queued' AND queue_key = :key AND vram_needed IS NOT NULL"
    " ORDER BY vram_needed LIMIT 1"
)


def _typed(statement: str) -> TextualSelect:
    """A statement that gives _COLUMNS."""
    typed: dict[str, Any] = {"methods": JSON(), "submitted_at": UtcDateTime(), "lora_until": UtcDateTime()}
    plain = ("job_id", "user", "priority", "vram_lora", "vram_qlora", "queue_key")
    bound = text(statement).bindparams(bindparam("now", type_=UtcDateTime()))
    return bound.columns(*(column(name) for name in plain), **typed)


def _one_job(condition: str) -> TextualSelect:
    """The oldest ready job that meets the condition."""
    return _typed(f"SELECT {_COLUMNS} FROM jobs WHERE {_READY} {condition} ORDER BY job_id LIMIT 1")  # noqa: S608  no input


_OF_USER = 'AND priority = :priority AND "user" = '
_FIRST_BY_USER = _typed(
    f"{_USERS} SELECT {_COLUMNS} FROM jobs WHERE job_id IN"  # noqa: S608  no input
    f" (SELECT (SELECT job_id FROM jobs WHERE {_READY} {_OF_USER} users.u ORDER BY job_id LIMIT 1)"
    " FROM users WHERE users.u IS NOT NULL)"
)
_NEXT_OF_USER = _one_job(f"{_OF_USER} :user AND job_id > :after")
_OLDEST = _one_job("")
_OLDEST_FITTING = _one_job(f"AND job_id > :after AND {_FITS}")
_BY_NUMBER = _one_job("AND job_id = :job_id")
_NEXT = _one_job(f"AND queue_key = :key AND job_id > :after AND {_FITS}")


@dataclass(frozen=True, kw_only=True)
class _Key:
    """A queue key, taken apart again."""

    text: str
    level: str
    step: int
    requires: frozenset[tuple[str, str]]
    user: str

    @classmethod
    def parse(cls, text: str) -> _Key:
        level, step, rest = text.split("|", 2)
        labels, end = json.JSONDecoder().raw_decode(rest) if rest.startswith("{") else ({}, 0)
        return cls(text=text, level=level, step=int(step), requires=frozenset(labels.items()), user=rest[end + 1 :])

    def may_fit(self, openings: Openings) -> bool:
        """False when no job under this key can be admitted."""
        return openings.may_admit(self.step, self.requires)

    def all_fit(self, openings: Openings) -> bool:
        """True only when every job under this key is admitted, given that some may be."""
        return openings.admit_all(self.step)


def read_levels(session: Session, now: dt.datetime) -> Iterator[dict[str, Line]]:
    """The ready jobs' lines by priority and user, read as far as the caller asks."""
    below = _HIGHEST
    while (priority := session.execute(_NEXT_PRIORITY, {"below": below}).scalar()) is not None:
        level = _Level(session, now, priority)
        rows = session.execute(_FIRST_BY_USER, {"now": now, "priority": priority}).mappings().all()
        yield {row["user"]: _StoredLine(level, row["user"], waiting_of(dict(row), now)) for row in rows}
        below = priority


def read_oldest(session: Session, now: dt.datetime) -> Line:
    """All ready jobs by age, as far as the caller asks."""
    return _OldestLine(session, now)


@dataclass(kw_only=True)
class _Head:
    """Where a line stands under one key."""

    key: _Key
    oldest: int | None  # the oldest job that was not given yet, whatever it needs; None: not known
    job: Waiting | None = None  # an admitted one that was looked up and not given yet
    given: int = 0  # jobs up to this number were given, or are not admitted any more
    empty: bool = False


class _Level:
    """One priority's ready jobs. Their keys are read when a line first needs them, as far as something could fit."""

    def __init__(self, session: Session, now: dt.datetime, priority: int) -> None:
        self.session = session
        self.now = now
        self.priority = priority
        self._read = ("}", "")  # the part of the keys that was read: nothing yet
        self._keys: dict[str, list[tuple[_Key, int | None]]] = {}

    def heads(self, user: str, openings: Openings) -> list[_Head]:
        """The user's keys under which something may be admitted, each with its oldest ready job."""
        start, end = queue_key_range(self.priority, *openings.steps)
        if start < self._read[0] or end > self._read[1]:  # a line may ask for more than another one did before
            start, end = min(start, self._read[0]), max(end, self._read[1])
            self._read, self._keys = (start, end), {}
            for key_text, job_id in self.session.execute(_HEADS, {"start": start, "end": end, "now": self.now}):
                key = _Key.parse(key_text)
                self._keys.setdefault(key.user, []).append((key, job_id))
        found = self._keys.get(user, [])
        return [_Head(key=key, oldest=job_id, empty=job_id is None) for key, job_id in found]

    def one(self, statement: TextualSelect, **values: Any) -> Waiting | None:
        return _one(self.session, statement, self.now, **values)


class _StoredLine:
    """A user's line in the database.

    It goes from one job to the next by age while they are admitted. Behind one that is not there may be many more like
    it: from there on the jobs are found by their keys, and those merged by age. Openings only shrink while the rule
    runs, so what did not fit before need not be looked at again.
    """

    def __init__(self, level: _Level, user: str, first: Waiting) -> None:
        self._level = level
        self._user = user
        self._first = first
        self._last: Waiting | None = None  # the last that was looked at by age
        self._heads: list[_Head] | None = None  # None: by age alone so far

    def next(self, openings: Openings) -> Waiting | None:
        if self._heads is None:
            if self._last is None or openings.admit(self._last.least, self._last.requires):
                job = self._by_age()
                if job is None or openings.admit(job.least, job.requires):
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
        if head.oldest is not None and head.oldest > head.given and head.key.all_fit(openings):
            return head.oldest
        if head.job is None or not openings.admit(head.job.least, head.job.requires):
            head.job = self._search(head, openings)
            head.oldest, head.empty = None, head.job is None
        return None if head.job is None else head.job.job_id

    def _search(self, head: _Head, openings: Openings) -> Waiting | None:
        """The oldest job under the key that fits and was not given yet."""
        low, high = openings.processor
        if head.key.step > 0:
            # the step that the opening ends in may hold many jobs that are a little too large
            least = self._level.session.execute(_LEAST, {"key": head.key.text}).scalar()
            if least is None or (least > openings.gpu and (high <= low or least > high)):
                return None
        return self._level.one(_NEXT, key=head.key.text, after=head.given, **_bounds(openings))


class _OldestLine:
    """All ready jobs by age. It begins to look among them once the first has waited OLDEST_FIRST_AFTER_S."""

    def __init__(self, session: Session, now: dt.datetime) -> None:
        self._session = session
        self._now = now
        self._given = 0

    def next(self, openings: Openings) -> Waiting | None:
        if self._given == 0:
            first = _one(self._session, _OLDEST, self._now)
            if first is None or waited(first, self._now) < OLDEST_FIRST_AFTER_S:
                return None  # nothing of that age waits: the usual case costs one row
        while True:
            bounds = _bounds(openings)
            job = _one(self._session, _OLDEST_FITTING, self._now, after=self._given, **bounds)
            if job is None:
                return None
            self._given = job.job_id
            if openings.admit(job.least, job.requires):
                return job


def _bounds(openings: Openings) -> dict[str, int]:
    low, high = openings.processor
    return {"gpu": openings.gpu, "low": low, "high": high, "unknown": int(openings.unknown)}


def _one(session: Session, statement: TextualSelect, now: dt.datetime, **values: Any) -> Waiting | None:
    row = session.execute(statement, {"now": now, **values}).mappings().first()
    return None if row is None else waiting_of(dict(row), now)


def waiting_of(row: Mapping[str, Any], now: dt.datetime) -> Waiting:
    """A ready job's row as the rule sees it. QLoRA is not permitted while it waits for LoRA."""
    methods = tuple(Method(name) for name in row["methods"])
    patient = row["lora_until"] is not None and row["lora_until"] > now
    return Waiting(
        job_id=row["job_id"],
        user=row["user"],
        priority=row["priority"],
        since=row["submitted_at"],
        methods=(Method.LORA,) if patient else methods,
        need=Need(lora=row["vram_lora"], qlora=row["vram_qlora"]),
        requires=_Key.parse(row["queue_key"]).requires,
    )
