"""Types of columns: what each may hold, as a check of both databases (`checks`). Readers need not ask again.

What our code measures or is told is made storable on the way in: a text is cut to its length, a number that is none is
left out.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from sqlalchemy import JSON, BigInteger, Boolean, DateTime, Dialect, Double, Integer, String, Table, Text, TypeDecorator
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeEngine

from loractl.common.text import REPLACEMENT, storable
from loractl.common.units import KIB, LARGEST, LAST_NUMBER

from .shapes import MOST, MOST_BYTES, JsonShape, added_sql, fits_sql, is_number, labels

FIRST_YEAR, LAST_YEAR = 2000, 9000
"""Of what happens in a lab."""

FIRST_TIME = dt.datetime(FIRST_YEAR, 1, 1, tzinfo=dt.UTC)
_LAST_TIME = dt.datetime(LAST_YEAR, 1, 1, tzinfo=dt.UTC) - dt.timedelta(microseconds=1)

MOST_SECONDS = 1e10
"""Until a job's end: three centuries, which the calendar holds."""


class Bounded:
    """What all types of columns have. A value of null is not asked about."""

    def check(self, column: str, dialect: str) -> str:
        """Whether the column's value is one that it may hold, in SQL; empty: its type alone says so."""
        return ""

    def fits(self, column: str, dialect: str) -> str:
        """What no check can ask besides, since it looks into every part of JSON; empty: nothing."""
        return ""

    def added(self, column: str, dialect: str, before: str) -> str | None:
        """What `fits` asks beyond `before`, an earlier one of the column; None: it may be anything."""
        return None

    def can_hold(self, value: Any) -> bool:
        """`check` of a value in Python, where what is measured may have any."""
        return True

    def harmless(self, value: Any) -> Any:
        """What the column holds in place of a value that it may not hold: of one that is measured, or its text."""
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


class _WholeNumber(Bounded):
    """A whole number between two bounds."""

    low: int
    high: int

    def check(self, column: str, dialect: str) -> str:
        kind = f"typeof({column}) = 'integer' AND " if dialect == "sqlite" else ""
        return f"{kind}{column} BETWEEN {self.low} AND {self.high}"

    def can_hold(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def harmless(self, value: Any) -> int:
        return int(_nearest(value, self.low, self.high))


class Whole(_WholeNumber, Integer):
    def __init__(self, low: int = 0, high: int = LARGEST) -> None:
        self.low, self.high = low, high


class Bytes(_WholeNumber, BigInteger):
    """Bytes of a card."""

    low, high = 0, MOST_BYTES


class RowNumber(_WholeNumber, TypeDecorator[int]):
    """A number that the database draws for a row, or that names such a row."""

    impl = Integer
    cache_ok = True
    low, high = 1, LAST_NUMBER

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # SQLite's own keys must be INTEGER, which has 64 bits there
        return dialect.type_descriptor(BigInteger() if dialect.name == "postgresql" else self.impl_instance)


class Real(Bounded, Double[float]):
    """A finite number between two bounds."""

    def __init__(self, low: float = -MOST, high: float = MOST) -> None:
        super().__init__()
        self.low, self.high = low, high

    def check(self, column: str, dialect: str) -> str:
        kind = f"typeof({column}) IN ('integer', 'real') AND " if dialect == "sqlite" else ""
        return f"{kind}{column} BETWEEN {self.low} AND {self.high}"

    def can_hold(self, value: Any) -> bool:
        return is_number(value, self.low, self.high)

    def harmless(self, value: Any) -> float:
        return _nearest(value, self.low, self.high)


def _nearest(value: Any, low: float, high: float) -> float:
    """The nearest number within the bounds; for what is no number the nearest to 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    return min(max(0.0 if math.isnan(number) else number, low), high)


class Flag(Bounded, Boolean):
    """Yes or no."""

    def check(self, column: str, dialect: str) -> str:
        return f"typeof({column}) = 'integer' AND {column} IN (0, 1)" if dialect == "sqlite" else ""

    def harmless(self, value: Any) -> bool:
        return False


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


_CUT = "…".encode()


class LineKey(Bounded, Text):
    """The line in which a job waits, as `queue_key` makes it. Its labels have no other |."""

    def check(self, column: str, dialect: str) -> str:
        most = 16 * KIB
        if dialect == "sqlite":
            form = "|".join(("[0-9]" * 5, "[0-9]" * 17 + ".*", "*", "*"))
            return f"typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) <= {most} AND {column} GLOB '{form}'"
        return f"octet_length({column}) <= {most} AND {column} ~ '^[0-9]{{5}}[|][0-9]{{17}}[.][^|]*[|][^|]*[|]'"

    def fits(self, column: str, dialect: str) -> str:
        if dialect == "sqlite":
            rest = f"substr({column}, 7 + instr(substr({column}, 7), '|'))"
            part = f"substr({rest}, 1, instr({rest}, '|') - 1)"
            return f"{part} = '' OR {fits_sql(dialect, part, labels, null=False)}"
        part = f"split_part({column}, '|', 3)"
        fit = fits_sql(dialect, f"CAST({part} AS json)", labels, null=False)
        return f"CASE WHEN {part} = '' THEN true ELSE {fit} END"

    def harmless(self, value: Any) -> str:
        return f"10000|{0:017d}.||"


class Json(Bounded, JSON):
    """A value of JSON that has a shape. `otherwise`: what is held in place of one without it. `null`: null is one, too.

    `most`: bytes of its text.
    """

    def __init__(
        self,
        shape: JsonShape,
        otherwise: Any = None,
        *,
        null: bool = False,
        none_as_null: bool = False,
        most: int = 64 * KIB,
    ) -> None:
        super().__init__(none_as_null=none_as_null)
        self.shape, self.null, self.most = shape, null, most
        self._otherwise = {} if otherwise is None else otherwise

    def check(self, column: str, dialect: str) -> str:
        if dialect == "sqlite":
            valid = f"CASE WHEN json_valid({column}) THEN json_type({column}) IS NOT NULL ELSE 0 END"
            return f"typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) <= {self.most} AND {valid}"
        return f"octet_length(CAST({column} AS text)) <= {self.most}"

    def fits(self, column: str, dialect: str) -> str:
        return fits_sql(dialect, column, self.shape, null=self.null)

    def added(self, column: str, dialect: str, before: str) -> str | None:
        return None if self.null else added_sql(dialect, column, self.shape, before)

    def can_hold(self, value: Any) -> bool:
        return self.shape(value) or (value is None and self.null)

    def harmless(self, value: Any) -> Any:
        return self._otherwise


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


def part_of(column: Any, *path: str) -> ColumnElement[str]:
    """A part of a column of JSON as text, in SQL; null where it has none."""
    found: ColumnElement[str] = column[path].as_string()
    return found


class UtcDateTime(Bounded, TypeDecorator[dt.datetime]):
    """An aware UTC datetime; SQLite stores none, so the zone is taken off and put back."""

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
            f" AND {column} >= '{first}' AND {column} < '{last}' AND substr({column}, 12, 2) < '24'"
        )

    def harmless(self, value: Any) -> dt.datetime:
        year = re.match(r"\d+", value)
        return _LAST_TIME if value == "infinity" or (year and int(year[0]) >= LAST_YEAR) else FIRST_TIME

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


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

    def process_result_value(self, value: str | None, dialect: Dialect) -> _Word | None:
        return None if value is None else word(self.words, value)


def word(words: type[_Word], text: str) -> _Word:
    """The enum's member; for an unknown text one that equals none of the others, and prints as that text."""
    try:
        return words(text)
    except ValueError:
        member = str.__new__(words, text)
        member._name_ = member._value_ = text
        return member
