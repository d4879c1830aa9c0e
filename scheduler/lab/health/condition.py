"""The result of checking one part of the installation."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from loractl.common.errors import LoractlError


class Level(enum.Enum):
    """The state of a part of the installation."""

    OK = "ok"
    WARNING = "warning"  # it works, but somebody should look at it
    ERROR = "error"
    SKIPPED = "skipped"  # it can't be checked here, or not yet


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One part of the installation, in a sentence, with what to do."""

    check: str
    level: Level
    sentence: str
    hint: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return {**vars(self), "level": self.level.value}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks. `hung`: checks that did not end; their threads still wait for an answer."""

    conditions: tuple[Condition, ...]
    hung: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is broken, though there may be warnings."""
        return not self.count(Level.ERROR)

    def count(self, level: Level) -> int:
        """How many conditions are on this level."""
        return sum(condition.level is level for condition in self.conditions)

    def as_json(self) -> dict[str, Any]:
        """`ok`: nothing is broken; `checks`."""
        return {"ok": self.ok, "checks": [condition.as_json() for condition in self.conditions]}


def fine(check: str, sentence: str) -> Condition:
    return Condition(check=check, level=Level.OK, sentence=sentence)


def warning(check: str, sentence: str, hint: str | None = None) -> Condition:
    return Condition(check=check, level=Level.WARNING, sentence=sentence, hint=hint)


def broken(check: str, sentence: str, hint: str | None = None) -> Condition:
    return Condition(check=check, level=Level.ERROR, sentence=sentence, hint=hint)


def skipped(check: str, sentence: str, hint: str | None = None) -> Condition:
    return Condition(check=check, level=Level.SKIPPED, sentence=sentence, hint=hint)


def failed(check: str, error: Exception) -> Condition:
    """What a check raised. An unexpected error is named by its type: it is a bug in loractl."""
    if isinstance(error, LoractlError):
        return broken(check, error.sentence, error.hint)
    if isinstance(error, OSError):
        return broken(check, f"{error.filename or 'a file'}: {error.strerror or error}", "check its owner and its mode")
    return broken(check, f"{type(error).__name__}: {error}", "this is a fault of loractl: tell its developers")
