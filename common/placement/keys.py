"""The queue key: a text with everything that the rule reads of a waiting job, except its age."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .lines import Openings
from .sizes import size_step


def queue_key(priority: int, least: int | None, requires: Mapping[str, str], user: str) -> str:
    """The line in which a job waits. For the rule, jobs with the same key differ only in their age.

    Keys sort by priority, the highest first, then by the size's step, so that one index answers what could fit.
    """
    labels = json.dumps(requires, sort_keys=True, ensure_ascii=True) if requires else ""
    return f"{10_000 - priority:05d}|{size_step(least):03d}|{labels}|{user}"


def queue_key_range(priority: int, first_step: int, last_step: int) -> tuple[str, str]:
    """The range of these steps' keys: first text included, last one not."""
    level = f"{10_000 - priority:05d}"
    return f"{level}|{first_step:03d}|", f"{level}|{last_step:03d}}}"  # } is the next character after the separator


@dataclass(frozen=True, kw_only=True)
class QueueKey:
    """The parts of a key that `queue_key` made."""

    text: str
    level: str
    step: int
    requires: frozenset[tuple[str, str]]
    user: str

    @classmethod
    def parse(cls, text: str) -> QueueKey:
        """Raises ValueError for a text that `queue_key` has not made."""
        level, step, rest = text.split("|", 2)
        try:
            labels, end = json.JSONDecoder().raw_decode(rest) if rest.startswith("{") else ({}, 0)
        except RecursionError:
            raise ValueError("labels within labels") from None
        if not all(isinstance(value, str) for value in labels.values()):
            raise ValueError("a label that is no text")
        return cls(text=text, level=level, step=int(step), requires=frozenset(labels.items()), user=rest[end + 1 :])

    def may_fit(self, openings: Openings) -> bool:
        """False when no job under this key can be admitted."""
        return openings.may_admit(self.step, self.requires)

    def all_fit(self, openings: Openings) -> bool:
        """True only when every job under this key is admitted, given that some may be."""
        return openings.admit_all(self.step)
