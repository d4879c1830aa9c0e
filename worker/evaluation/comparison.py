"""One metric of base and tuned, and how certain the difference is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loractl.common.verdict import MeasuredChange, Reading

from .statistics import Array, paired_interval


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of base and tuned, with a 95% interval of the change from paired bootstrap samples."""

    name: str
    label: str
    unit: str  # nats, %, ...
    higher_is_better: bool | None  # None: neither is better
    cases: int
    base: float
    tuned: float
    low: float
    high: float

    @property
    def change(self) -> float:
        return self.tuned - self.base

    @property
    def reading(self) -> Reading:
        return MeasuredChange(
            base=self.base,
            change=self.change,
            low=self.low,
            high=self.high,
            cases=self.cases,
            unit=self.unit,
            higher_is_better=self.higher_is_better,
        ).reading

    def as_json(self) -> dict[str, Any]:
        """The metric as in report.json."""
        return {**vars(self), "change": self.change, "reading": self.reading}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured: a name for programs, a label for people, the unit, and which way is better."""

    name: str
    label: str
    unit: str = "nats"
    higher_is_better: bool | None = False  # None: neither is better

    def compare(
        self, base: Array, tuned: Array, weight: Array, transform: Callable[[Array], Array] = lambda x: x
    ) -> Compared:
        """A sum over rows divided by a sum of weights; rows without weight are not cases."""
        return self.compared(int((weight > 0).sum()), *paired_interval(base, tuned, weight, transform))

    def compared(self, cases: int, base: float, tuned: float, low: float, high: float) -> Compared:
        """With an interval that is already known."""
        return Compared(**vars(self), cases=cases, base=base, tuned=tuned, low=low, high=high)


def percent(name: str, label: str) -> Measure:
    """A measure in percent; more is better."""
    return Measure(name=name, label=label, unit="%", higher_is_better=True)


def compare_shares(name: str, label: str, base: list[bool], tuned: list[bool]) -> Compared:
    """The share of rows that each gets right, in percent."""
    before, after = (100 * np.array(right, float) for right in (base, tuned))
    return percent(name, label).compare(before, after, np.ones(len(base)))
