"""How long the rest of an evaluation takes, by what was measured: rows are scored much faster than answers are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GENERATED = 8
"""Tokens that are scored in the time in which one is generated, before that is measured. 7 were seen on a processor."""


ROWS, ANSWERS, LABELS = "rows", "answers", "labels"
"""Kinds of work: rows that are scored, answers and labels that are generated."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Work of one kind that one model does at a stretch."""

    kind: str
    count: int
    tokens: int  # that it costs, in tokens that are scored


class Stopwatch:
    """Times an evaluation's stretches, which follow each other as they are given."""

    def __init__(self, stretches: Sequence[Stretch], now: float) -> None:
        self._stretches = stretches
        self._done, self._last = 0, now
        self._took: dict[str, float] = {}  # seconds, by kind
        self._tokens: dict[str, float] = {}  # of those that were done

    def lap(self, done: int, now: float) -> None:
        """So many are done by now, of all stretches together."""
        fresh = self._parts(self._done, done)
        whole = sum(part * _cost(stretch) for stretch, part in fresh)
        for stretch, part in fresh:
            tokens = part * _cost(stretch)
            self._took[stretch.kind] = self._took.get(stretch.kind, 0.0) + (now - self._last) * tokens / whole
            self._tokens[stretch.kind] = self._tokens.get(stretch.kind, 0.0) + tokens
        self._done, self._last = done, now

    @property
    def left_seconds(self) -> float | None:
        """None before anything is done. A kind that has not begun is taken to go as the others do."""
        known = sum(self._tokens.values())
        if not known:
            return None
        usual = sum(self._took.values()) / known
        left = 0.0
        for stretch, part in self._parts(self._done, sum(stretch.count for stretch in self._stretches)):
            tokens = self._tokens.get(stretch.kind)
            left += part * _cost(stretch) * (self._took[stretch.kind] / tokens if tokens else usual)
        return left

    def _parts(self, begin: int, end: int) -> list[tuple[Stretch, int]]:
        """How much of each stretch lies between two counts."""
        parts, at = [], 0
        for stretch in self._stretches:
            part = min(end, at + stretch.count) - max(begin, at)
            at += stretch.count
            if part > 0:
                parts.append((stretch, part))
        return parts


def _cost(stretch: Stretch) -> float:
    return max(1, stretch.tokens) / stretch.count
