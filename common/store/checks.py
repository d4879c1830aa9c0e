"""The bounds of the columns in the database itself: checks that every writer meets, whatever it is.

They are declared by the columns' types. `hold` brings the tables to them after all migrations, so that a new column, or
another bound, needs nothing else. A value that is there and may not be is moved to the table `quarantine`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from sqlalchemy import Column, Connection, Engine, Table, func, insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from loractl.common.errors import ValueRefused
from loractl.common.job.status import Status

from .columns import Bounded, Characters, Json
from .tables import Base, Event, Job, Quarantined

_PREFIX = "ck_"
_MARK = ", /* bounds of the columns */ "
"""In SQLite's text of a table: what follows is ours. The comma comes first: a column that is added goes before it."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One column's bound. `deep`: what a check can't ask by itself, since it looks into every part of JSON."""

    column: Column[Any]
    sql: str
    deep: str = ""

    @property
    def name(self) -> str:
        """It changes with what is asked."""
        return f"{_PREFIX}{self.column.name}_{hashlib.sha256((self.sql + self.deep).encode()).hexdigest()[:8]}"

    @property
    def whole(self) -> str:
        """All that is asked; true where the value is null."""
        own = f'"{self.column.name}"'
        both = f"CASE WHEN {self.sql} THEN {self.deep} END" if self.deep else self.sql
        return f"({own} IS NULL OR coalesce({both}, {own} IS NULL))"


def checks_of(table: Table, dialect: str) -> list[Bound]:
    """What its columns' types say."""
    found = []
    for column in table.columns:
        kind = cast(Bounded, column.type)
        if not isinstance(kind, Bounded) or not (sql := kind.check(f'"{column.name}"', dialect)):
            continue
        found.append(Bound(column=column, sql=sql, deep=kind.fits(f'"{column.name}"', dialect)))
    return found


def hold(connection: Connection) -> None:
    """Bring the tables to their columns' bounds."""
    there = set(inspect(connection).get_table_names())
    tables = [table for table in reversed(Base.metadata.sorted_tables) if table.name in there]  # children first
    for table in tables:
        bring(connection, table, checks_of(table, connection.dialect.name))


def release(connection: Connection, names: Collection[str] | None = None) -> None:
    """Take the bounds away again, of all tables or of those with these names."""
    for name in inspect(connection).get_table_names() if names is None else names:
        if name in Base.metadata.tables:
            bring(connection, Base.metadata.tables[name], [])


def release_columns(connection: Connection, table: str, columns: Collection[str]) -> None:
    """Take the bounds of these columns away, which can be dropped then; those of the others go on to hold. PostgreSQL
    does so by itself."""
    if connection.dialect.name != "sqlite":
        return
    held = _held_sqlite(connection, table)
    _write_sqlite(connection, table, {name: sql for name, sql in held.items() if _column_of(name) not in columns})
    _drop_triggers(connection, table, [name for name in held if _column_of(name) in columns])


def bring(connection: Connection, table: Table, wanted: Sequence[Bound]) -> None:
    """Give the table these bounds and no others."""
    by = _bring_sqlite if connection.dialect.name == "sqlite" else _bring_postgres
    by(connection, table, wanted)


def _unasked(check: Bound, before: str, dialect: str) -> Bound:
    """The check, or what of it `before`, that of the same column until now, has not asked of every row already: to look
    into every part of 100,000 specs takes ten seconds."""
    added = cast(Bounded, check.column.type).added(f'"{check.column.name}"', dialect, before) if before else None
    return check if added is None else replace(check, deep=added)


def quarantined(engine: Engine) -> int:
    """How many values are in quarantine."""
    with engine.connect().execution_options(read_only=True) as connection:
        return connection.execute(select(func.count()).select_from(Quarantined)).scalar_one()


# --- PostgreSQL ---


def _bring_postgres(connection: Connection, table: Table, wanted: Sequence[Bound]) -> None:
    held = connection.execute(text(_HELD), {"table": table.name, "ours": _PREFIX}).all()
    names, asked_each_time = {name for name, _ in held}, {name for name, calls in held if calls}
    new = [check for check in wanted if check.name not in names - asked_each_time]
    old = (names - {check.name for check in wanted}) | asked_each_time
    before = _asked_until_now(connection, table)
    if old:
        drops = ", ".join(f'DROP CONSTRAINT "{name}"' for name in sorted(old))
        connection.exec_driver_sql(f"ALTER TABLE {table.name} {drops}")
        for name in sorted(old):
            connection.exec_driver_sql(f'DROP TRIGGER IF EXISTS "{name}" ON {table.name}')
    if not new:
        return
    unasked = {check: _unasked(check, before.get(check.column.name, ""), "postgresql") for check in new}
    _make_functions(connection, unasked.values())
    # what a check of this name has asked each time holds for every row
    _clean(connection, table, {c: _asked(unasked[c]) for c in new if c.name not in names}, "ctid")
    _make_functions(connection, new)
    adds = ", ".join(f'ADD CONSTRAINT "{check.name}" CHECK ({check.sql})' for check in new)
    connection.exec_driver_sql(f"ALTER TABLE {table.name} {adds}")
    connection.exec_driver_sql(_REFUSE)
    for check in new:
        if check.deep:
            connection.exec_driver_sql(
                f'CREATE TRIGGER "{check.name}" BEFORE INSERT OR UPDATE OF "{check.column.name}" ON {table.name}'
                f' FOR EACH ROW WHEN (NOT {_function(check)}(NEW."{check.column.name}"))'
                " EXECUTE FUNCTION loractl_refuse()"
            )


def _make_functions(connection: Connection, checks: Iterable[Bound]) -> None:
    for check in checks:
        if check.deep:
            kind = "json" if isinstance(check.column.type, Json) else "text"
            connection.exec_driver_sql(
                _FITS.format(name=_function(check), argument=check.column.name, type=kind, asks=check.deep)
            )


def _asked_until_now(connection: Connection, table: Table) -> dict[str, str]:
    """What the table's triggers ask, by column."""
    found = connection.execute(text(_LOOKS), {"table": table.name, "ours": _PREFIX})
    return {_column_of(name): source for name, source in found}


_LOOKS = """
SELECT tgname, prosrc FROM pg_trigger, pg_proc
WHERE tgrelid = CAST(:table AS regclass) AND starts_with(tgname, :ours) AND pronamespace = 'public'::regnamespace
AND proname = 'loractl_fits_' || CAST(:table AS text) || '_' || regexp_replace(tgname, '^ck_(.*)_[0-9a-f]{8}$', '\\1')
"""


_HELD = """
SELECT conname, strpos(pg_get_constraintdef(oid), 'loractl_fits_') > 0 FROM pg_constraint
WHERE conrelid = CAST(:table AS regclass) AND contype = 'c' AND starts_with(conname, :ours)
"""
"""Also those of before, which called the function at each update of a row, whatever it changed."""

_FITS = """
CREATE OR REPLACE FUNCTION {name}("{argument}" {type}) RETURNS boolean LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
AS $$ BEGIN RETURN coalesce({asks}, false); EXCEPTION WHEN data_exception OR program_limit_exceeded THEN RETURN false;
END $$
"""
"""PostgreSQL takes JSON that it can't read: text that no encoding has, or nested too deep."""

_REFUSE = """
CREATE OR REPLACE FUNCTION loractl_refuse() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE check_violation USING MESSAGE = 'a new row of ' || TG_TABLE_NAME || ' violates ' || TG_NAME; END $$
"""


def _function(check: Bound) -> str:
    return f"loractl_fits_{check.column.table.name}_{check.column.name}"


def _asked(check: Bound) -> str:
    return f'{check.sql} AND {_function(check)}("{check.column.name}")' if check.deep else check.sql


# --- SQLite ---


def _bring_sqlite(connection: Connection, table: Table, wanted: Sequence[Bound]) -> None:
    """SQLite has no statement that adds a check. It keeps a table as the text that made it, and rows do not depend on
    their checks: so the text is written, as SQLite's own page on ALTER TABLE does it for changes that leave rows as
    they are. No row, key or index is touched, and nothing is deleted that another table refers to."""
    held = _held_sqlite(connection, table.name)
    bounds = {
        check.name: f'CONSTRAINT "{check.name}" CHECK ("{check.column.name}" IS NULL OR ({check.sql}))'
        for check in wanted
    }
    if bounds == held:
        return
    new = [check for check in wanted if bounds[check.name] != held.get(check.name)]  # the others hold for every row
    gone = [name for name, sql in held.items() if bounds.get(name) != sql]
    before = {_column_of(name): _trigger_of(connection, table.name, name) for name in gone}
    _drop_triggers(connection, table.name, gone)
    asked = {check: _unasked(check, before.get(check.column.name, ""), "sqlite").whole for check in new}
    _clean(connection, table, asked, "rowid")
    _write_sqlite(connection, table.name, bounds)
    for check in new:
        if check.deep:
            for when in ("INSERT", f'UPDATE OF "{check.column.name}"'):
                connection.exec_driver_sql(_trigger(check, when))


def _text_of(connection: Connection, table: str) -> tuple[str, str]:
    """A table's text: its own, and that of our bounds."""
    written = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?"
    own, _, ours = (
        connection.exec_driver_sql(written, (table,)).scalar_one().rstrip().removesuffix(")").partition(_MARK)
    )
    return own, ours


def _held_sqlite(connection: Connection, table: str) -> dict[str, str]:
    """The bounds that the table has, by name."""
    ours = _text_of(connection, table)[1]
    return {bound.split('"')[1]: bound for bound in re.split(rf', (?=CONSTRAINT "{_PREFIX})', ours) if bound}


def _write_sqlite(connection: Connection, table: str, bounds: Mapping[str, str]) -> None:
    own = _text_of(connection, table)[0]
    after = f"{own}{_MARK}{', '.join(bounds.values())})" if bounds else f"{own})"
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    connection.exec_driver_sql("UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?", (after, table))
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql(
        "PRAGMA writable_schema = RESET"
    )  # reads the tables again: a wrong text is an error here


def _column_of(bound: str) -> str:
    return bound.removeprefix(_PREFIX).rpartition("_")[0]


def _trigger(check: Bound, when: str) -> str:
    """A check can't look into every part of JSON, a trigger can."""
    own = f'"{check.column.name}"'
    asks = check.deep.replace(own, f"NEW.{own}")
    return (
        f'CREATE TRIGGER "{check.name}_{check.column.table.name}_{when[:6].lower()}" BEFORE {when}'
        f" ON {check.column.table.name} WHEN NEW.{own} IS NOT NULL AND ({asks}) IS NOT TRUE"
        f" BEGIN SELECT RAISE(ABORT, 'CHECK constraint failed: {check.name}'); END"
    )


def _trigger_of(connection: Connection, table: str, bound: str) -> str:
    """What the bound's trigger asks, about the column."""
    written = "SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name = ?"
    told = connection.exec_driver_sql(written, (f"{bound}_{table}_insert",)).scalar() or ""
    return told.replace(f'NEW."{_column_of(bound)}"', f'"{_column_of(bound)}"')


def _drop_triggers(connection: Connection, table: str, bounds: Collection[str]) -> None:
    for name, when in itertools.product(bounds, ("insert", "update")):
        connection.exec_driver_sql(f'DROP TRIGGER IF EXISTS "{name}_{table}_{when}"')


# --- values that are there, and may not be ---


def _clean(connection: Connection, table: Table, asked: Mapping[Bound, str], place: str) -> None:
    """Move values that break a bound to the quarantine. `place`: what names a row, until it is written."""
    if not asked:
        return
    checks = list(asked)
    passes = {check: f'coalesce({asked[check]}, "{check.column.name}" IS NULL)' for check in checks}
    select = (
        f"SELECT CAST({place} AS text), {', '.join(passes.values())} FROM {table.name}"  # noqa: S608  our own words
        f" WHERE NOT ({' AND '.join(passes.values())})"
    )
    for where, *held in connection.exec_driver_sql(select).all():
        broken = [check.column for check, holds in zip(checks, held, strict=True) if not holds]
        _clean_row(connection, table, broken, f"{place} = CAST('{where}' AS {'tid' if place == 'ctid' else 'integer'})")


def _clean_row(connection: Connection, table: Table, broken: Sequence[Column[Any]], where: str) -> None:
    row: dict[str, str | None] = {
        name: connection.exec_driver_sql(_as_text(connection, table, name, where)).scalar()
        for name in [column.name for column in table.columns]
    }
    key = {column.name: row[column.name] for column in table.primary_key}
    new = {column.name: _instead(column, row[column.name]) for column in broken}
    lost = [column for column in broken if column.primary_key]
    if not lost or all(isinstance(column.type, Characters) for column in lost):
        try:
            with connection.begin_nested():
                connection.execute(table.update().where(text(where)).values(**new))
        except (IntegrityError, ValueRefused):
            lost = [*lost, *table.primary_key]
        else:
            for column in broken:
                _put_aside(connection, table, key, column.name, row[column.name])
            if table is Job.__table__:
                _tell(connection, int(row["job_id"] or 0), row["status"] or "", {name: row[name] for name in new})
            return
    _put_aside(connection, table, key, "*", json.dumps(row))
    connection.exec_driver_sql(f"DELETE FROM {table.name} WHERE {where}")  # noqa: S608


def _as_text(connection: Connection, table: Table, column: str, where: str) -> str:
    own = f'"{column}"'
    if connection.dialect.name == "sqlite":
        own = f"CASE typeof({own}) WHEN 'blob' THEN 'x''' || hex({own}) || '''' ELSE CAST({own} AS text) END"
    else:
        own = f"CAST({own} AS text)"
    return f"SELECT {own} FROM {table.name} WHERE {where}"  # noqa: S608


def _instead(column: Column[Any], held: str | None) -> Any:
    """What the row holds from now on."""
    return None if column.nullable else cast(Bounded, column.type).harmless(held)


def _put_aside(connection: Connection, table: Table, key: Mapping[str, Any], column: str, value: str | None) -> None:
    row = {"table_name": table.name, "row_key": json.dumps(key), "column_name": column, "value": value or ""}
    connection.execute(insert(Quarantined).values(**row, at=_now(connection)))


def _now(connection: Connection) -> dt.datetime:
    at = connection.execute(text("SELECT CURRENT_TIMESTAMP")).scalar_one()
    return dt.datetime.fromisoformat(at).replace(tzinfo=dt.UTC) if isinstance(at, str) else at


def _tell(connection: Connection, job_id: int, status: str, values: Mapping[str, str | None]) -> None:
    """Lines in the job's history. A waiting job is held; others stay as they are, whatever they were."""
    if status == Status.QUEUED:
        what = ", ".join(values)
        why = f"held: {what} of its row could not stay; loractl edit puts that right, loractl release lets it start"
        connection.execute(update(Job).where(Job.job_id == job_id).values(held=True, message=why))
    for name, value in values.items():
        line = f"{name} was moved to the quarantine: {(value or '')[:_SHOWN]}"
        connection.execute(insert(Event).values(job_id=job_id, at=_now(connection), kind="quarantine", text=line))


_SHOWN = 200
"""Characters of a value in a job's history."""
