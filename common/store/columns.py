"""Types of columns: what each may hold, as a check of both databases, in what is written and in what is read.

A type's `check` is the bound that the database holds (`checks`), and what it reads by. What our code writes is made
storable on the way: a text is cut to its length, a number that is none is left out.

A value that is there nevertheless is read as a harmless value of the column's kind, and marked as Unreadable. Code that
lists rows continues, and code that would act on one asks `unreadable`.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from sqlalchemy import JSON, BigInteger, Boolean, DateTime, Dialect, Double, Integer, String, Table, Text, TypeDecorator
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from loractl.common.text import REPLACEMENT, storable
from loractl.common.units import KIB, LARGEST, LAST_NUMBER

from .shapes import MOST, MOST_BYTES, JsonShape, fits_sql, is_number

LONG_AGO, FAR_OFF = dt.datetime(2, 1, 1, tzinfo=dt.UTC), dt.datetime(9998, 12, 31, tzinfo=dt.UTC)
"""The first and the last time that a row may hold: within them every time zone has a calendar."""

FIRST_YEAR, LAST_YEAR = 2000, 9000
"""Of what happens in a lab."""

MOST_SECONDS = 1e10
"""Until a job's end: three centuries, which the calendar holds."""

_MOST = 2**63 - 1
"""The largest number that can be asked for."""

_SHOWN = 60
"""Characters of a value that can't be read, as people see it."""


class Unreadable:
    """Marks a value in place of what the row holds. `told`: what it holds, for people."""

    told = ""


_KINDS: dict[type, Any] = {
    kind: type(f"Unreadable_{kind.__name__}", (Unreadable, kind), {})
    for kind in (int, float, str, dict, list, dt.datetime)
}


def in_place_of(held: object, value: Any) -> Any:
    """The harmless value, marked as unreadable."""
    kind = _KINDS[type(value)]
    marked = kind.combine(value.date(), value.timetz()) if kind is _KINDS[dt.datetime] else kind(value)
    told = held.decode("utf-8", "replace") if isinstance(held, bytes) else held
    marked.told = held.told if isinstance(held, Unreadable) else str(told)[:_SHOWN] or "empty"
    return marked


def unreadable_of(row: Mapping[str, Any]) -> str:
    """The first value of a row that can't be read, by its column, for people; empty: there is none."""
    return next((f"{name}: {value.told}" for name, value in row.items() if isinstance(value, Unreadable)), "")


class Bounded:
    """What all types of columns have. A value of null is not asked about."""

    def check(self, column: str, dialect: str) -> str:
        """Whether the column's value is one that it may hold, in SQL; empty: its type alone says so."""
        return ""

    def can_hold(self, value: Any) -> bool:
        """`check` of a value in Python, where what is measured may have any."""
        return True

    def harmless(self, value: Any) -> Any:
        """What the column holds in place of a value that it may not hold, and that was read as this one."""
        return value


def misfits(table: Table, row: Mapping[str, Any]) -> list[str]:
    """The names of the values that their columns can't hold."""
    return [name for name, value in row.items() if value is not None and not _kind(table, name).can_hold(value)]


def storable_row(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured, as the table can hold it: null, or the nearest value, in place of what it can't."""
    wrong = {
        name: None if table.c[name].nullable else _kind(table, name).harmless(row[name]) for name in misfits(table, row)
    }
    return {**row, **wrong}


def _kind(table: Table, name: str) -> Bounded:
    return cast(Bounded, table.c[name].type)


class Whole(Bounded, TypeDecorator[int]):
    """A whole number between two bounds. `key`: it names a row, so that another number would name another row."""

    impl = Integer
    cache_ok = True

    def __init__(self, low: int = 0, high: int = LARGEST, *, key: bool = False) -> None:
        super().__init__()
        self.low, self.high, self.key = low, high, key

    def check(self, column: str, dialect: str) -> str:
        kind = f"typeof({column}) = 'integer' AND " if dialect == "sqlite" else ""
        return f"{kind}{column} BETWEEN {self.low} AND {self.high}"

    def can_hold(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def harmless(self, value: Any) -> int:
        return min(max(int(value), self.low), self.high)

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return int(value) if isinstance(value, Unreadable) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        if value is None or self.can_hold(value):
            return value  # type: ignore[no-any-return]
        low, high = (-_MOST, _MOST) if self.key else (self.low, self.high)
        found: int = in_place_of(value, min(max(int(value) if is_number(value) else 0, low), high))
        return found


class RowNumber(Whole):
    """A number that the database draws for a row, or that names such a row."""

    impl = Integer
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(1, LAST_NUMBER, key=True)

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # SQLite's own keys must be INTEGER, which has 64 bits there
        return dialect.type_descriptor(BigInteger() if dialect.name == "postgresql" else self.impl_instance)


class Bytes(Whole):
    """Bytes of a card."""

    impl = BigInteger
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(0, MOST_BYTES)


class Real(Bounded, TypeDecorator[float]):
    """A finite number between two bounds."""

    impl = Double
    cache_ok = True

    def __init__(self, low: float = -MOST, high: float = MOST) -> None:
        super().__init__()
        self.low, self.high = low, high

    def check(self, column: str, dialect: str) -> str:
        kind = f"typeof({column}) IN ('integer', 'real') AND " if dialect == "sqlite" else ""
        return f"{kind}{column} BETWEEN {self.low} AND {self.high}"

    def can_hold(self, value: Any) -> bool:
        return is_number(value, self.low, self.high)

    def harmless(self, value: Any) -> float:
        return min(max(float(value), self.low), self.high) if is_number(value) else max(0.0, self.low)

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        if value is None or self.can_hold(value):
            return value  # type: ignore[no-any-return]
        found: float = in_place_of(value, self.harmless(value))
        return found


class Flag(Bounded, TypeDecorator[bool]):
    """Yes or no."""

    impl = Boolean
    cache_ok = True

    def check(self, column: str, dialect: str) -> str:
        return f"typeof({column}) = 'integer' AND {column} IN (0, 1)" if dialect == "sqlite" else ""

    def harmless(self, value: Any) -> bool:
        return bool(value)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], bool | None]:
        def read(value: Any) -> bool | None:
            if value is None or isinstance(value, bool):
                return value
            return bool(value) if is_number(value, 0, 1) else in_place_of(value, 0)

        return read


_STEERING = ((0x01, 0x1F), (0x7F, 0x9F), (0x2028, 0x202E), (0x2066, 0x2069))
"""First and last of the characters that steer a terminal, break a line or turn its direction."""

_STEERS = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in ((0, 0), *_STEERING)) + "]")


def _is_printable(column: str, dialect: str) -> str:
    if dialect == "sqlite":
        ranges = " || ".join(f"char({first}) || '-' || char({last})" for first, last in _STEERING)
        return f"{column} NOT GLOB ('*[' || {ranges} || ']*') AND instr({column}, char(0)) = 0"
    ranges = "".join(rf"\u{first:04x}-\u{last:04x}" for first, last in _STEERING)
    return f"{column} !~ '[{ranges}]'"


class Characters(Bounded, TypeDecorator[str]):
    """A line of a bounded length, without characters that steer a terminal. `but`: a word that it may not be."""

    impl = String
    cache_ok = True

    def __init__(self, length: int, but: str = "") -> None:
        super().__init__(length)
        self.most, self.but = length, but

    def check(self, column: str, dialect: str) -> str:
        kind = f"typeof({column}) = 'text' AND length({column}) <= {self.most} AND " if dialect == "sqlite" else ""
        return f"{kind}{_is_printable(column, dialect)}" + (f" AND {column} <> '{self.but}'" if self.but else "")

    def can_hold(self, value: Any) -> bool:
        return isinstance(value, str) and value == self.harmless(value)

    def harmless(self, value: Any) -> str:
        line = _STEERS.sub(REPLACEMENT, storable(str(value)))[: self.most]
        return f"{line[: self.most - 1]}{REPLACEMENT}" if self.but and line == self.but else line

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else self.harmless(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value if value is None or isinstance(value, str) else in_place_of(value, _text(value))


class Prose(Bounded, TypeDecorator[str]):
    """Text of at most `most` bytes; what is written is cut to them."""

    impl = Text
    cache_ok = True

    def __init__(self, most: int = 16 * KIB) -> None:
        super().__init__()
        self.most = most

    def check(self, column: str, dialect: str) -> str:
        if dialect == "sqlite":
            return f"typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) <= {self.most}"
        return f"octet_length({column}) <= {self.most}"

    def harmless(self, value: Any) -> str:
        whole = storable(str(value))
        if len(whole) * 4 <= self.most or len(told := whole.encode()) <= self.most:
            return whole
        return told[: self.most - len(_CUT)].decode(errors="ignore") + _CUT.decode()

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else self.harmless(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value if value is None or isinstance(value, str) else in_place_of(value, _text(value))


_CUT = "…".encode()

_MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class Json(Bounded, TypeDecorator[Any]):
    """A value of JSON that has a shape. `otherwise`: what a value without it is read as. `null`: null is one, too.

    `reads`: what this version understands of the shape: false, or one of _MISFITS, for what only a newer one does.
    `most`: bytes of its text.
    """

    impl = JSON
    cache_ok = True

    def __init__(
        self,
        shape: JsonShape,
        otherwise: Any = None,
        *,
        null: bool = False,
        none_as_null: bool = False,
        reads: Callable[[Any], Any] = bool,
        most: int = 64 * KIB,
    ) -> None:
        super().__init__(none_as_null=none_as_null)
        self.shape, self.null, self.should_evaluate_none = shape, null, not none_as_null
        self.most, self._reads = most, reads
        self._otherwise = {} if otherwise is None else otherwise

    def check(self, column: str, dialect: str) -> str:
        if dialect == "sqlite":
            valid = f"CASE WHEN json_valid({column}) THEN json_type({column}) IS NOT NULL ELSE 0 END"
            return f"typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) <= {self.most} AND {valid}"
        return f"octet_length(CAST({column} AS text)) <= {self.most}"

    def can_hold(self, value: Any) -> bool:
        return self.shape(value) or (value is None and self.null)

    def fits(self, column: str, dialect: str) -> str:
        """Whether the value has the shape: what no check can ask, since it looks into every part."""
        return fits_sql(dialect, column, self.shape, null=self.null)

    def harmless(self, value: Any) -> Any:
        return self._otherwise

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        return self.impl_instance.coerce_compared_value(op, value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None and self.null:
            return None
        try:
            fits = not isinstance(value, Unreadable) and self.shape(value) and (not value or self._reads(value))
        except _MISFITS:
            fits = False
        return value if fits else in_place_of(value, self._otherwise)


def write_json(value: Any) -> str:
    """A value as a column of JSON holds it, without texts that no database can hold."""
    told = json.dumps(value)
    return json.dumps(_storable_json(value)) if "\\ud" in told or "\\u0000" in told else told


def _storable_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {_storable_json(key): _storable_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_storable_json(one) for one in value]
    return storable(value) if isinstance(value, str) else value


def read_json(text: Any) -> Any:
    """What the databases' drivers make of a column of JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):  # SQLite takes anything, PostgreSQL nests deeper than Python
        return in_place_of(text, {})


class valid_json(FunctionElement[Any]):  # noqa: N801  a function of SQL
    """A column of JSON, where a part of it is asked for in SQL: SQLite ends a statement that meets invalid JSON."""

    type = JSON()
    inherit_cache = True


@compiles(valid_json)
def _as_it_is(element: valid_json, compiler: Any, **keys: Any) -> str:
    found: str = compiler.process(next(iter(element.clauses)), **keys)
    return found


@compiles(valid_json, "sqlite")
def _only_json(element: valid_json, compiler: Any, **keys: Any) -> str:
    column = _as_it_is(element, compiler, **keys)
    return f"CASE WHEN json_valid({column}) THEN {column} END"


def part_of(column: Any, *path: str) -> ColumnElement[str]:
    """A part of a column of JSON as text, in SQL; null where it has none."""
    found: ColumnElement[str] = valid_json(column)[path].as_string()
    return found


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _SqliteTimes(sqlite.DATETIME):
    """SQLite's text as a time. PostgreSQL's are read by the driver (`database`)."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], dt.datetime | None]:
        read: Any = super().result_processor(dialect, coltype)

        def as_time(value: Any) -> dt.datetime | None:
            try:
                found: dt.datetime | None = read(value)
            except (TypeError, ValueError):
                return LONG_AGO.replace(tzinfo=None)
            return found

        return as_time


class UtcDateTime(Bounded, TypeDecorator[dt.datetime]):
    """An aware UTC datetime; SQLite stores none, so the zone is taken off and put back.

    Anything else is read as LONG_AGO, and marked.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def check(self, column: str, dialect: str) -> str:
        first, last = f"{FIRST_YEAR}-01-01 00:00:00", f"{LAST_YEAR}-01-01 00:00:00"
        if dialect != "sqlite":
            return f"{column} >= '{first}+00' AND {column} < '{last}+00'"
        to_the_second, digits = f"substr({column}, 1, 19)", "[0-9]" * 6
        return (
            f"typeof({column}) = 'text' AND strftime('%Y-%m-%d %H:%M:%S', {to_the_second}) IS {to_the_second}"
            f" AND (length({column}) = 19 OR substr({column}, 20) GLOB '.{digits}')"
            f" AND {column} >= '{first}' AND {column} < '{last}'"
        )

    def harmless(self, value: dt.datetime) -> dt.datetime:
        last = dt.datetime(LAST_YEAR, 1, 1, tzinfo=dt.UTC) - dt.timedelta(microseconds=1)
        return min(max(value, dt.datetime(FIRST_YEAR, 1, 1, tzinfo=dt.UTC)), last)

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        own: TypeEngine[Any] = _SqliteTimes() if dialect.name == "sqlite" else self.impl_instance  # type: ignore[no-untyped-call]  # its base has no types
        return dialect.type_descriptor(own)

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if not LONG_AGO.year < value.year < FAR_OFF.year:
            value = LONG_AGO if value.year <= LONG_AGO.year else FAR_OFF
        read = value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)
        ours = FIRST_YEAR <= read.year < LAST_YEAR
        return read if ours else in_place_of("no time of our calendar", read)


_Word = TypeVar("_Word", bound=enum.StrEnum)


class Words(Bounded, TypeDecorator[_Word]):
    """A word of the enum, by value. One that only a newer version knows is read as a member that has no name here."""

    impl = String
    cache_ok = True

    def __init__(self, words: type[_Word]) -> None:
        super().__init__(24)
        self.words, self._form = words, Characters(24)

    def check(self, column: str, dialect: str) -> str:
        return self._form.check(column, dialect)

    def harmless(self, value: Any) -> str:
        return self._form.harmless(value)

    def process_bind_param(self, value: _Word | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> _Word | None:
        return None if value is None else word(self.words, _text(value))


def word(words: type[_Word], text: str) -> _Word:
    """The enum's member; for an unknown text one that equals none of the others, and prints as that text."""
    try:
        return words(text)
    except ValueError:
        member = str.__new__(words, text)
        member._name_ = member._value_ = text
        return member
