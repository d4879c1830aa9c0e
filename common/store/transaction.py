"""One transaction, as the queries use it: the session, the clock, and the differences of SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    DateTime,
    Engine,
    Select,
    Update,
    bindparam,
    delete,
    func,
    select,
    type_coerce,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from sqlalchemy.sql.elements import KeyedColumnElement

from loractl.common.errors import SchemaMismatch

from .columns import UtcDateTime
from .database import names_nothing, outage
from .schema import require_own
from .tables import Base, Event, Lock

log = logging.getLogger("loractl.common.store")


SKIP_LOCKED: dict[str, Any] = {"key_share": True, "skip_locked": True}
"""Lock a row of jobs, or pass it over if somebody else has it locked.

FOR NO KEY UPDATE is the lock that an update takes. An insert into events takes a weaker one on its job's row, which
does not conflict with it: somebody who leaves such an insert uncommitted blocks nobody."""

FLEET = "fleet"
"""The lock of the fleet's round."""


_CLOCK = select(func.clock_timestamp())


@functools.cache
def _timed(statement: Select[Any]) -> Select[Any]:
    """SQLAlchemy takes longer to make such a statement than to run it."""
    return statement.add_columns(type_coerce(func.clock_timestamp(), UtcDateTime()))


NewRow = ReadOnlyColumnCollection[str, KeyedColumnElement[Any]]
Over = Callable[[NewRow], ColumnElement[bool]]
"""A condition on the existing row, given the columns of the new one. Pass a module-level function: the statement is
cached by it."""


@functools.cache
def _upsert(dialect: str, table: type[Base], key: str, names: tuple[str, ...], over: Over | None) -> Any:
    """An upsert of these columns. It is cached, since SQLAlchemy takes longer to build it than to run it."""
    statement = _insert(dialect, table.__table__)
    new = statement.excluded
    write = statement.on_conflict_do_update(
        index_elements=[key],
        set_={name: new[name] for name in names if name != key},
        where=None if over is None else over(new),
    )
    return write.returning(statement.table.c[key])


def _insert(dialect: str, table: Any) -> Any:
    """An INSERT that may say ON CONFLICT, which has the same form in both dialects."""
    return importlib.import_module(f"sqlalchemy.dialects.{dialect}").insert(table)


_CHANGED, _LOCKED = "LR001", "LR002"
"""SQLSTATEs of a commit that makes a person's changes (migration 0035)."""


class Overtaken(Exception):
    """A commit found a row of a person's change changed or locked by somebody else; nothing was written."""

    def __init__(self, told: str | None, job_id: str | None, *, locked: bool) -> None:
        super().__init__(told)
        self.job_id = int(job_id) if job_id and job_id.isdecimal() else 0
        self.locked = locked


class Transaction:
    """Committed at the end, rolled back on an error; its rows stay readable afterwards.

    `clock` is for tests. Without it the time is PostgreSQL's, or, with SQLite (one machine), the system's.
    `lease_s`: how long an attempt that is claimed or beaten for here may be silent.
    """

    def __init__(
        self, engine: Engine, *, clock: Callable[[], dt.datetime] | None, lease_s: float, read_only: bool
    ) -> None:
        self.lease_s = lease_s
        self._engine, self._dialect = engine, engine.dialect.name
        self._clock = clock
        self.session = Session(engine.execution_options(read_only=read_only), expire_on_commit=False)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        """Raises SchemaMismatch where a statement was refused because the tables are another version's by now."""
        try:
            if error is None:
                self._commit()
        except DBAPIError as refused:
            error = refused
            raise
        finally:
            self.session.close()
            if isinstance(error, DBAPIError) and outage(error) is None:
                self._require_own_tables(error)

    def _require_own_tables(self, error: DBAPIError) -> None:
        try:
            require_own(self._engine)
        except SchemaMismatch as mismatch:
            raise mismatch from error
        except DBAPIError:
            log.debug("the revision can't be read either")

    def _commit(self) -> None:
        try:
            self.session.commit()
        except DBAPIError as error:
            state: str = getattr(error.orig, "sqlstate", None) or ""
            if state not in (_CHANGED, _LOCKED):
                raise
            told: Any = error.orig
            raise Overtaken(told.diag.message_primary, told.diag.message_detail, locked=state == _LOCKED) from error

    def now(self) -> dt.datetime:
        """The time that every timestamp follows."""
        if self._asks_database:
            now: dt.datetime = self.session.execute(_CLOCK).scalar_one()
            return now.astimezone(dt.UTC)
        return self._clock() if self._clock else dt.datetime.now(dt.UTC)

    def timed(self, statement: Select[Any], values: Mapping[str, Any]) -> list[tuple[Any, dt.datetime]]:
        """The rows of a statement that is made once, each with `now` as it was read, without a query of its own."""
        if not self._asks_database:
            return [(row, self.now()) for row in self.session.scalars(statement, values)]
        return [(row, now) for row, now in self.session.execute(_timed(statement), values)]

    def now_in(self, seconds: float) -> ColumnElement[dt.datetime]:
        """The time `seconds` from now, as a value of a statement."""
        if self._asks_database:
            return func.clock_timestamp(type_=DateTime(timezone=True)) + dt.timedelta(seconds=seconds)
        later = self.now() + dt.timedelta(seconds=seconds)
        return bindparam(None, later, type_=UtcDateTime(), unique=True)

    def may_write(self) -> bool:
        """Whether the database takes writes. SQLite has locked itself for them by then."""
        if self._dialect != "postgresql":
            return self.session.scalar(select(1)) == 1
        return self.session.scalar(select(func.current_setting("transaction_read_only"))) == "off"

    def tell(self, job_id: int, attempt: int | None, kind: str, text: str, at: dt.datetime | None = None) -> None:
        """Write a line of the job's history."""
        # the time of PostgreSQL is read without a query of its own
        told = at or (func.clock_timestamp() if self._asks_database else self.now())
        self.session.add(Event(job_id=job_id, attempt=attempt, at=told, kind=kind, text=text))

    def is_alone(self, lock: str = FLEET) -> bool:
        """Whether this transaction, and no other, may do until its end what the lock's name says. Does not wait.

        A lock is a row that workers alone may change. On SQLite a writer is alone in any case.
        """
        free = select(Lock.name).where(Lock.name == lock).with_for_update(skip_locked=True)
        if self._dialect != "postgresql" or self.session.scalar(free) is not None:
            return True
        new = _insert(self._dialect, Lock).values(name=lock).on_conflict_do_nothing().returning(Lock.name)
        return self.session.scalar(new) is not None

    def wait_for(self, lock: str) -> None:
        """Wait until no other transaction does what the lock's name says, and let none do so until this one's end."""
        if self._dialect != "postgresql":
            return
        held = select(Lock.name).where(Lock.name == lock).with_for_update()
        while self.session.scalar(held) is None:  # `forget_locks` may come in between
            self.add_new(Lock, [{"name": lock}])

    def forget_locks(self) -> None:
        """Delete the lock rows of users and sweeps that nobody holds. A transaction that needs one inserts it again."""
        free = select(Lock.name).where(Lock.name.contains(" ")).with_for_update(skip_locked=True)
        self.session.execute(delete(Lock).where(Lock.name.in_(free)).execution_options(synchronize_session=False))

    @property
    def has_functions(self) -> bool:
        """Whether the database has loractl_change and loractl_tag."""
        return self._dialect == "postgresql"

    def change(self, statement: Update) -> int:
        """Run a guarded update; returns how many rows it changed."""
        result = self.session.execute(statement.execution_options(synchronize_session=False))
        return cast(CursorResult[Any], result).rowcount

    def apart(self, job_id: int, work: Callable[[], None]) -> bool:
        """Do what concerns one job alone. If that fails it is undone, and the rest of the transaction continues.

        False then. Raises when the database is away, or its tables are another version's.
        """
        try:
            with self.session.begin_nested():
                work()
        except Exception as error:
            if outage(error) is not None or names_nothing(error):
                raise
            log.exception("job %s is passed over", job_id)
            return False
        return True

    def put(self, table: type[Base], key: str, row: Mapping[str, Any], over: Over | None = None, **named: Any) -> bool:
        """Write a row, over the one with its key if there is one. False when `over` does not hold of that one.
        `named`: values that `over` asks for."""
        write = _upsert(self._dialect, table, key, tuple(row), over)
        return self.session.execute(write, {**row, **named}).first() is not None

    def add_up(self, table: type[Base], key: Mapping[str, Any], sums: Mapping[str, float]) -> None:
        """Add these to the row with this key, or write it."""
        statement = _insert(self._dialect, table).values(**key, **sums)
        added = {name: getattr(table, name) + getattr(statement.excluded, name) for name in sums}
        self.session.execute(statement.on_conflict_do_update(index_elements=list(key), set_=added))

    def add_new(self, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write those of the rows that are not there yet.

        A row a statement: one statement for all has more parameters than a database takes after an outage.
        """
        self.session.execute(_insert(self._dialect, table).on_conflict_do_nothing(), rows)

    @property
    def _asks_database(self) -> bool:
        return self._clock is None and self._dialect == "postgresql"
