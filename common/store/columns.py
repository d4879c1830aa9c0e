"""Types of columns that both databases read in the same way, whatever a row holds.

A value that no version of ours has written is read as a harmless value of the column's kind, and marked as Unreadable.
Code that lists rows continues, and code that would act on one asks `unreadable`.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import JSON, BigInteger, Boolean, DateTime, Dialect, Double, Integer, String, Text, TypeDecorator
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from loractl.common.units import LARGEST, LAST_NUMBER

LONG_AGO, FAR_OFF = dt.datetime(2, 1, 1, tzinfo=dt.UTC), dt.datetime(9998, 12, 31, tzinfo=dt.UTC)
"""The first and the last time that a row may hold: within them every time zone has a calendar."""

FIRST_YEAR, LAST_YEAR = 2000, 9000
"""Of what happens in a lab."""

MOST_BYTES = 2**50
"""Of a card, or of what a job needs of it."""

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


class Whole(TypeDecorator[int]):
    """A whole number between two bounds. `key`: it names a row, so that another number would name another row."""

    impl = Integer
    cache_ok = True

    def __init__(self, low: int = 0, high: int = LARGEST, *, key: bool = False) -> None:
        super().__init__()
        self.low, self.high, self.key = low, high, key

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return int(value) if isinstance(value, Unreadable) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        if value is None or (type(value) is int and self.low <= value <= self.high):
            return value
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


class Real(TypeDecorator[float]):
    """A finite number between two bounds."""

    impl = Double
    cache_ok = True

    def __init__(self, low: float = -1e300, high: float = 1e300) -> None:
        super().__init__()
        self.low, self.high = low, high

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        if value is None or is_number(value, self.low, self.high):
            return value  # type: ignore[no-any-return]
        number = float(value) if is_number(value) else 0.0
        found: float = in_place_of(value, min(max(number, self.low), self.high))
        return found


class Flag(TypeDecorator[bool]):
    """Yes or no."""

    impl = Boolean
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], bool | None]:
        def read(value: Any) -> bool | None:
            if value is None or isinstance(value, bool):
                return value
            return bool(value) if is_number(value, 0, 1) else in_place_of(value, 0)

        return read


class Characters(TypeDecorator[str]):
    """Text of a bounded length."""

    impl = String
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value if value is None or isinstance(value, str) else in_place_of(value, _text(value))


class Prose(Characters):
    """Text of any length."""

    impl = Text
    cache_ok = True


Shape = Callable[[Any], Any]
"""Whether a value of JSON is what a column holds: false, or one of _MISFITS, where it is not."""

_MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class Json(TypeDecorator[Any]):
    """A value of JSON that has a shape. `otherwise`: what a value without it is read as. `null`: null is one, too."""

    impl = JSON
    cache_ok = True

    def __init__(self, shape: Shape, otherwise: Any = None, *, null: bool = False, none_as_null: bool = False) -> None:
        super().__init__(none_as_null=none_as_null)
        self.shape, self.null, self.should_evaluate_none = shape, null, not none_as_null
        self._otherwise = {} if otherwise is None else otherwise

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        return self.impl_instance.coerce_compared_value(op, value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None and self.null:
            return None
        try:
            fits = not isinstance(value, Unreadable) and self.shape(value)
        except _MISFITS:
            fits = False
        return value if fits else in_place_of(value, self._otherwise)


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


# --- shapes of JSON ---


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is a finite number within the bounds."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def is_whole(value: Any, low: int = 0, high: int = LARGEST) -> bool:
    return type(value) is int and low <= value <= high


def is_number_drawn(value: Any) -> bool:
    """Whether it can be the number of a job or a sweep."""
    return is_whole(value, 1, LAST_NUMBER)


def is_size(value: Any) -> bool:
    """Bytes, or null for those that are not known."""
    return value is None or is_whole(value, 0, MOST_BYTES)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def object_of(shape: Shape) -> Shape:
    """Whether it is an object whose values all have the shape."""
    return lambda value: isinstance(value, dict) and all(map(shape, value.values()))


def list_of(shape: Shape) -> Shape:
    """Whether it is a list of values that all have the shape."""
    return lambda value: isinstance(value, list) and all(map(shape, value))


def fields(**shapes: Shape) -> Shape:
    """Whether it is an object whose values of these names have their shapes, or are null, where they are there."""
    return lambda value: (
        isinstance(value, dict) and all(value.get(name) is None or shape(value[name]) for name, shape in shapes.items())
    )


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


class UtcDateTime(TypeDecorator[dt.datetime]):
    """An aware UTC datetime; SQLite stores none, so the zone is taken off and put back.

    Anything else is read as LONG_AGO, and marked.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

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


class Words(TypeDecorator[_Word]):
    """A word of the enum, by value. One that only a newer version knows is read as a member that has no name here."""

    impl = String
    cache_ok = True

    def __init__(self, words: type[_Word], length: int = 24) -> None:
        super().__init__(length)
        self.words = words

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
