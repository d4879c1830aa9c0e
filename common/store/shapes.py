"""Shapes of JSON that a column may hold: asked in Python, and compiled to SQL for the database's own check."""

from __future__ import annotations

import datetime as dt
import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.units import LARGEST

MOST_BYTES = 2**50
"""Of a card, or of what a job needs of it."""

MOST = 1e300
"""The largest number of a row, and of JSON."""

MOST_LEVELS = 64
"""Of JSON. A job file has at most 16."""


def is_number(value: Any, low: float = -MOST, high: float = MOST) -> bool:
    """Whether it is a finite number within the bounds."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def is_whole(value: Any, low: int = 0, high: int = LARGEST) -> bool:
    return type(value) is int and low <= value <= high


@dataclass(frozen=True, kw_only=True)
class SqlValue:
    """A value of JSON in a statement. SQLite knows its type apart from it; there an object is text, too."""

    dialect: str
    sql: str
    type: str
    level: int = 0

    @classmethod
    def of_column(cls, dialect: str, column: str) -> SqlValue:
        of = "json_type" if dialect == "sqlite" else "json_typeof"
        return cls(dialect=dialect, sql=column, type=f"{of}({column})")

    def is_a(self, *kinds: str) -> str:
        """`kinds`: SQLite's names of them."""
        names = kinds if self.dialect == "sqlite" else {_POSTGRES.get(kind, kind) for kind in kinds}
        return f"{self.type} IN ({', '.join(repr(name) for name in sorted(names))})"

    @property
    def text(self) -> str:
        """A scalar's text on PostgreSQL; SQLite has the scalar itself."""
        return self.sql if self.dialect == "sqlite" else f"({self.sql} #>> '{{}}')"

    def member(self, name: str) -> SqlValue:
        if self.dialect == "sqlite":
            path = f"{self.sql}, '$.{name}'"
            return replace(self, sql=f"json_extract({path})", type=f"json_type({path})")
        found = f"({self.sql} -> '{name}')"
        return replace(self, sql=found, type=f"json_typeof({found})")

    def all_are(self, shape: JsonShape, kind: str) -> str:
        """Whether each value of an object or an array has the shape."""
        each = f"e{self.level}"
        if self.dialect == "sqlite":
            rows, one = f"json_each({self.sql}) AS {each}", replace(self, sql=f"{each}.value", type=f"{each}.type")
        else:
            of = "json_each" if kind == "object" else "json_array_elements"
            rows = f"{of}({self.sql}) AS {each}"
            one = replace(self, sql=f"{each}.value", type=f"json_typeof({each}.value)")
        wrong = f"({shape.sql(replace(one, level=self.level + 1))}) IS NOT TRUE"
        return f"CASE WHEN {self.is_a(kind)} THEN NOT EXISTS (SELECT 1 FROM {rows} WHERE {wrong}) ELSE {self.never} END"  # noqa: S608  our own words

    @property
    def never(self) -> str:
        return "0" if self.dialect == "sqlite" else "false"


_POSTGRES = {"text": "string", "integer": "number", "real": "number", "true": "boolean", "false": "boolean"}


class JsonShape(ABC):
    """What a value of JSON must be. Calling it asks a value; `sql` asks the same of one in the database."""

    @abstractmethod
    def __call__(self, value: Any) -> bool: ...

    @abstractmethod
    def sql(self, at: SqlValue) -> str: ...


@dataclass(frozen=True)
class whole(JsonShape):  # noqa: N801  reads as a word of the column's declaration, as the others below
    """A whole number."""

    low: int = 0
    high: int = LARGEST

    def __call__(self, value: Any) -> bool:
        return is_whole(value, self.low, self.high)

    def sql(self, at: SqlValue) -> str:
        number = f"{at.text} BETWEEN {self.low} AND {self.high}"
        if at.dialect == "sqlite":
            return f"{at.is_a('integer')} AND {number}"
        digits = f"{at.is_a('integer')} AND {at.text} ~ '^-?[0-9]{{1,18}}$'"
        return f"CASE WHEN {digits} THEN CAST({at.text} AS bigint) BETWEEN {self.low} AND {self.high} ELSE false END"


@dataclass(frozen=True)
class number(JsonShape):  # noqa: N801
    """A finite number."""

    low: float = -MOST
    high: float = MOST

    def __call__(self, value: Any) -> bool:
        return is_number(value, self.low, self.high)

    def sql(self, at: SqlValue) -> str:
        value = at.text if at.dialect == "sqlite" else f"CAST({at.text} AS numeric)"
        within = f"{value} BETWEEN {self.low} AND {self.high}"
        return f"CASE WHEN {at.is_a('integer', 'real')} THEN {within} ELSE {at.never} END"


@dataclass(frozen=True)
class _Kind(JsonShape):
    kind: type
    names: tuple[str, ...]

    def __call__(self, value: Any) -> bool:
        return isinstance(value, self.kind)

    def sql(self, at: SqlValue) -> str:
        found = at.is_a(*self.names)
        # PostgreSQL's json takes texts that no program can hold, and says so when it reads them
        return f"{found} AND {at.text} IS NOT NULL" if self.kind is str and at.dialect != "sqlite" else found


text, flag = _Kind(str, ("text",)), _Kind(bool, ("true", "false"))
"""Text; true or false."""


@dataclass(frozen=True)
class word(JsonShape):  # noqa: N801
    """One of these words."""

    words: tuple[str, ...]

    def __call__(self, value: Any) -> bool:
        return value in self.words

    def sql(self, at: SqlValue) -> str:
        return f"{at.is_a('text')} AND {at.text} IN ({', '.join(repr(str(one)) for one in self.words)})"


class _Moment(JsonShape):
    """A time of this millennium, as `isoformat` writes one in UTC."""

    def __call__(self, value: Any) -> bool:
        try:
            return dt.datetime.fromisoformat(value).tzinfo == dt.UTC
        except (TypeError, ValueError):
            return False

    def sql(self, at: SqlValue) -> str:
        if at.dialect == "sqlite":
            start, rest, digits = f"substr({at.sql}, 1, 19)", f"substr({at.sql}, 20)", "[0-9]" * 6
            form = f"strftime('%Y-%m-%dT%H:%M:%S', {start}) IS {start} AND substr({start}, 12, 2) < '24'"
            own = f"{at.is_a('text')} AND {start} GLOB '2*' AND {form}"
            return f"{own} AND ({rest} = '+00:00' OR {rest} GLOB '.{digits}+00:00')"
        day, time = r"2[0-9]{3}-[0-9]{2}-[0-9]{2}", r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{6})?"
        like = rf"{at.is_a('text')} AND {at.text} ~ '^{day}T{time}[+]00:00$'"
        return f"CASE WHEN {like} THEN CAST({at.text} AS timestamptz) IS NOT NULL ELSE false END"


moment = _Moment()


@dataclass(frozen=True)
class either(JsonShape):  # noqa: N801
    """A value that has one of two shapes."""

    one: JsonShape
    other: JsonShape

    def __call__(self, value: Any) -> bool:
        return self.one(value) or self.other(value)

    def sql(self, at: SqlValue) -> str:
        return f"(({self.one.sql(at)}) OR ({self.other.sql(at)}))"


@dataclass(frozen=True)
class optional(JsonShape):  # noqa: N801
    """A value of the shape, or null."""

    shape: JsonShape

    def __call__(self, value: Any) -> bool:
        return value is None or self.shape(value)

    def sql(self, at: SqlValue) -> str:
        return f"({at.is_a('null')} OR ({self.shape.sql(at)}))"


size = optional(whole(0, MOST_BYTES))
"""Bytes, or null for those that are not known."""


@dataclass(frozen=True)
class object_of(JsonShape):  # noqa: N801
    """An object whose values all have the shape."""

    shape: JsonShape

    def __call__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(map(self.shape, value.values()))

    def sql(self, at: SqlValue) -> str:
        return at.all_are(self.shape, "object")


labels = object_of(text)


@dataclass(frozen=True)
class list_of(JsonShape):  # noqa: N801
    """A list of at most `most` values that all have the shape."""

    shape: JsonShape
    most: int | None = None

    def __call__(self, value: Any) -> bool:
        short = isinstance(value, list) and (self.most is None or len(value) <= self.most)
        return short and all(map(self.shape, value))

    def sql(self, at: SqlValue) -> str:
        all_are = at.all_are(self.shape, "array")
        if self.most is None:
            return all_are
        short = f"json_array_length({at.sql}) <= {self.most}"
        return f"CASE WHEN {at.is_a('array')} THEN {short} AND {all_are} ELSE {at.never} END"


class fields(JsonShape):  # noqa: N801
    """An object whose values of these names have their shapes, or are null, where they are there. `needed` are there,
    and have them."""

    def __init__(self, needed: tuple[str, ...] = (), **shapes: JsonShape) -> None:
        self.needed, self.shapes = needed, shapes

    def __call__(self, value: Any) -> bool:
        return isinstance(value, dict) and all(
            shape(value[name]) if name in value and (value[name] is not None or name in self.needed)
            else name not in self.needed
            for name, shape in self.shapes.items()
        )  # fmt: skip

    def sql(self, at: SqlValue) -> str:
        parts = [self.part(at, name) for name in self.shapes]
        return f"CASE WHEN {at.is_a('object')} THEN {' AND '.join(parts)} ELSE {at.never} END"

    def part(self, at: SqlValue, name: str) -> str:
        """What is asked about the value of this name."""
        one = at.member(name)
        there = f"{one.type} IS NOT NULL AND ({self.shapes[name].sql(one)})"
        return f"({there})" if name in self.needed else f"(coalesce({one.type}, 'null') = 'null' OR {there})"

    def only(self, names: Collection[str]) -> fields:
        """The shape without the other names."""
        return fields(tuple(n for n in self.needed if n in names), **{n: self.shapes[n] for n in names})


def added_sql(dialect: str, column: str, shape: JsonShape, before: str) -> str | None:
    """What the shape asks beyond `before`, a statement that asks the same without some of its fields; None: another."""
    if not isinstance(shape, fields):
        return None
    of = SqlValue.of_column(dialect, column)
    added = [name for name in shape.shapes if shape.part(of, name) not in before]
    rest = shape.only([name for name in shape.shapes if name not in added])
    if not added or fits_sql(dialect, column, rest, null=False) not in before:
        return None
    return shape.only(added).sql(of)


def fits_sql(dialect: str, column: str, shape: JsonShape, *, null: bool) -> str:
    """Whether the column's JSON has the shape, is nested no deeper than Python reads, and has no number beyond its."""
    of = SqlValue.of_column(dialect, column)
    own = (optional(shape) if null else shape).sql(of)
    if dialect == "sqlite":
        levels = f"length(t.fullkey) - length(replace(replace(t.fullkey, '.', ''), '[', '')) > {MOST_LEVELS}"
        beyond = f"t.type IN ('integer', 'real') AND t.value NOT BETWEEN -{MOST} AND {MOST}"
        plain = f"NOT EXISTS (SELECT 1 FROM json_tree({column}) AS t WHERE {beyond} OR {levels})"  # noqa: S608
        return f"CASE WHEN json_valid({column}) THEN ({own}) AND {plain} ELSE 0 END"
    binary, far = f"CAST({column} AS jsonb)", f"@ > {MOST} || @ < -{MOST}"
    return (
        f"({own}) AND NOT jsonb_path_exists({binary}, '$.** ? (@.type() == \"number\" && ({far}))')"
        f" AND NOT jsonb_path_exists({binary}, '$.**{{{MOST_LEVELS} to last}}')"
    )
