"""Verbs: functions of a transaction. Each call opens its own transaction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

from sqlalchemy import Select

from ..transaction import Transaction

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
Row = TypeVar("Row")


class Begin(Protocol):
    """Begins a transaction: committed at the end of its `with`, rolled back on an error."""

    def __call__(self, *, read_only: bool) -> Transaction: ...


class Subject:
    """Verbs about one thing."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin

    def _read(self) -> Transaction:
        return self._begin(read_only=True)

    def _write(self) -> Transaction:
        return self._begin(read_only=False)


class Verb(Generic[Given, Answer]):
    """A function of (tx, ...), as a method without the transaction."""

    def __init__(self, work: Callable[Concatenate[Transaction, Given], Answer], *, read_only: bool) -> None:
        self._work, self._read_only = work, read_only
        self.__doc__ = work.__doc__

    def __get__(self, subject: Subject, kind: type[Subject]) -> Callable[Given, Answer]:
        @functools.wraps(self._work)
        def run(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
            with subject._begin(read_only=self._read_only) as tx:
                return self._work(tx, *args, **kwargs)

        return run


def writes(work: Callable[Concatenate[Transaction, Given], Answer]) -> Verb[Given, Answer]:
    """A verb that may change rows."""
    return Verb(work, read_only=False)


def reads(work: Callable[Concatenate[Transaction, Given], Answer]) -> Verb[Given, Answer]:
    """A verb that changes nothing."""
    return Verb(work, read_only=True)


def lists(query: Callable[Given, Select[Row]]) -> Verb[Given, list[Row]]:
    """The rows that a query selects."""

    @functools.wraps(query)
    def rows(tx: Transaction, /, *args: Given.args, **kwargs: Given.kwargs) -> list[Row]:
        return list(tx.session.scalars(query(*args, **kwargs)))

    return reads(rows)
