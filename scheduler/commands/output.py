"""How a command prints its answer: as the answer's own JSON, or as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import click


class HasJson(Protocol):
    """An answer: its one as_json is what --json prints."""

    def as_json(self) -> Any: ...


def show(answer: HasJson, as_json: bool, text: Callable[[], str]) -> None:
    """Print the answer's JSON, or its text."""
    click.echo(json.dumps(answer.as_json()) if as_json else text())
