"""How long the rest of an evaluation takes, from measurements: scoring rows is much faster than generating answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loractl.common.placement.duration import ANSWER_EACH, ANSWER_STEP

ADAPTED = 1.2
"""The tuned model's time as a multiple of the base's, because of the adapter's products. 1.1 to 1.25 were measured."""

ENDING_S = 1.2
"""Seconds for the intervals after the last answer: 10,000 draws for each measure, on one core."""

ROWS, ANSWERS, LABELS, SHOTS = "rows", "answers", "labels", "shots"
"""Kinds of work: scored rows, generated answers and labels, and answers of the base with examples in its prompt."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Work of one kind that one model does without a break."""

    kind: str
    costs: tuple[float, ...]  # of each row or answer, in the order of the work, in scored tokens

    @property
    def count(self) -> int:
        return len(self.costs)

    @property
    def tokens(self) -> float:
        """The cost of all of it."""
        return sum(self.costs)

    @property
    def adapted(self) -> Stretch:
        """The same work by the tuned model."""
        return Stretch(kind=self.kind, costs=tuple(ADAPTED * cost for cost in self.costs))


def scored(kind: str, parts: Iterable[Sequence[int]]) -> Stretch:
    """Rows of these lengths, each part longest first, as score_rows takes them."""
    return Stretch(kind=kind, costs=tuple(float(n) for part in parts for n in sorted(part, reverse=True)))


def answered(kind: str, prompts: Sequence[int], longest: int, batch: int) -> Stretch:
    """Answers of at most `longest` tokens to prompts of these lengths, as generate makes them: a batch at a time, so
    that answers in a small batch cost more each."""
    costs, ordered = list[float](), sorted(prompts, reverse=True)
    for at in range(0, len(ordered), batch):
        lengths = ordered[at : at + batch]
        costs += len(lengths) * [lengths[0] + longest * (ANSWER_STEP / len(lengths) + ANSWER_EACH)]
    return Stretch(kind=kind, costs=tuple(costs))


class Stopwatch:
    """Times an evaluation's stretches, which follow each other in the given order."""

    def __init__(self, stretches: Sequence[Stretch], now: float) -> None:
        self._stretches = stretches
        self._done, self._last = 0, now
        self._took: dict[str, float] = {}  # seconds, by kind
        self._tokens: dict[str, float] = {}  # of finished work

    def lap(self, done: int, now: float) -> None:
        """Note how many are done by now, over all stretches."""
        fresh = self._parts(self._done, done)
        whole = sum(tokens for _, tokens in fresh)
        for stretch, tokens in fresh:
            self._took[stretch.kind] = self._took.get(stretch.kind, 0.0) + (now - self._last) * tokens / whole
            self._tokens[stretch.kind] = self._tokens.get(stretch.kind, 0.0) + tokens
        self._done, self._last = done, now

    @property
    def left_seconds(self) -> float | None:
        """None before anything is done. A kind that has not begun is assumed to go like the others."""
        known = sum(self._tokens.values())
        if not known:
            return None
        usual = sum(self._took.values()) / known
        left = 0.0
        for stretch, costs in self._parts(self._done, sum(stretch.count for stretch in self._stretches)):
            tokens = self._tokens.get(stretch.kind)
            left += costs * (self._took[stretch.kind] / tokens if tokens else usual)
        return left

    def _parts(self, begin: int, end: int) -> list[tuple[Stretch, float]]:
        """The part of each stretch between two counts, and its cost."""
        parts, at = [], 0
        for stretch in self._stretches:
            costs = stretch.costs[max(0, begin - at) : max(0, end - at)]
            at += stretch.count
            if costs:
                parts.append((stretch, sum(costs)))
        return parts
