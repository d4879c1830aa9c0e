"""Types of columns that both databases read in the same way, whatever a row holds."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import DateTime, Dialect, String, TypeDecorator
from sqlalchemy.dialects import sqlite
from sqlalchemy.types import TypeEngine

LONG_AGO, FAR_OFF = dt.datetime(2, 1, 1, tzinfo=dt.UTC), dt.datetime(9998, 12, 31, tzinfo=dt.UTC)
"""The first and the last time that a row may tell: within them every time zone has a calendar."""


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

    What is no time is read as LONG_AGO: one row must not keep all others from being read.
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
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


_Word = TypeVar("_Word", bound=enum.StrEnum)


class Words(TypeDecorator[_Word]):
    """A word of the enum, by value. One that only a newer version knows is read as a member that has no name here."""

    impl = String(24)
    cache_ok = True

    def __init__(self, words: type[_Word]) -> None:
        super().__init__()
        self.words = words

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
