"""How a command prints its answer, as the answer's own JSON or as text; and what it says on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import click

from loractl.common.units import LAST_NUMBER

Command = TypeVar("Command", bound=Callable[..., Any])


class HasJson(Protocol):
    """An answer: --json prints its as_json."""

    def as_json(self) -> Any: ...


class Paged(HasJson, Protocol):
    """A page of a list."""

    @property
    def after(self) -> int | None:
        """The next part starts after this job; None: this is the last part."""
        ...


def show(answer: HasJson, as_json: bool, text: Callable[[], str]) -> None:
    """Print the answer's JSON, or its text."""
    click.echo(json.dumps(answer.as_json()) if as_json else text())


def show_page(answer: Paged, as_json: bool, text: Callable[[], str]) -> None:
    """Print a part of a list. The text says how to continue; with JSON that goes to stderr."""
    show(answer, as_json, text)
    if as_json and answer.after is not None:
        click.echo(f"More: the same command with --after {answer.after}", err=True)


def paged(what: str) -> Callable[[Command], Command]:
    """The options of a command that prints a list of `what` in parts."""

    def add(command: Command) -> Command:
        after = click.option(
            "--after",
            type=click.IntRange(1, LAST_NUMBER),
            metavar="JOB",
            help="Continue after this job, the last one listed.",
        )
        limit = click.option(
            "-n", "--limit", type=click.IntRange(1), default=50, show_default=True, help=f"The most {what} to list."
        )
        return limit(after(command))

    return add


def warn(lines: Iterable[str]) -> None:
    """Print the lines on stderr."""
    for line in lines:
        click.echo(line, err=True)


def hint(text: str) -> None:
    """Print the next command on stderr, dim."""
    click.echo(click.style(text, dim=True), err=True)
