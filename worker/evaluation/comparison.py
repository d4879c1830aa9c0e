"""One metric of base and tuned, and how certain the difference is: paired bootstrap intervals. If answers are labels,
accuracy, macro F1 and the confusion of both.

The labels are those that the training rows teach. Any other answer counts as wrong, and as "other"; so does any answer
to a held-out row that expects some other text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from loractl.common.verdict import MIN_NEW, NEW_ROWS, MeasuredChange

BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 7
MIN_TURNED = 6
"""Minimum net number of cases that became right, or wrong, or in which a percentage rose, or fell. Fewer all turn the
same way by chance more than 5 % of the time (a sign test, on both sides), and the bootstrap does not see that: its
samples of few cases are too alike."""

_DRAWS_AT_ONCE = 100  # keeps a hundred thousand rows within 80 MB

Array = np.ndarray[Any, np.dtype[np.float64]]


def draws(cases: int) -> Iterator[Array]:
    """How often each sample contains each case, 100 samples at a time: float64 of shape (100, cases). The same for
    every metric with this number of cases (Efron and Tibshirani 1993, chapter 13)."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    for _ in range(BOOTSTRAP_SAMPLES // _DRAWS_AT_ONCE):
        yield rng.multinomial(cases, np.full(cases, 1 / cases), size=_DRAWS_AT_ONCE).astype(np.float64)


def interval(changes: Array) -> tuple[float, float]:
    """The 95% percentile interval; NaN where no number decides an end."""
    if not np.isfinite(changes).any():
        return np.nan, np.nan
    low, high = np.nanpercentile(changes, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(
    base: Array, tuned: Array, weight: Array, transform: Callable[[Array], Array] = lambda x: x
) -> tuple[float, float, float, float]:
    """(base, tuned, low, high): means sum(x)/sum(weight), and the interval of tuned - base over samples of the cases,
    the same cases for both."""
    values = np.stack([weight, base, tuned], axis=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        totals = np.concatenate([some @ values for some in draws(len(weight))])
        changes = transform(totals[:, 2] / totals[:, 0]) - transform(totals[:, 1] / totals[:, 0])
        means = [float(transform(np.array([part.sum() / weight.sum()]))[0]) for part in (base, tuned)]
    return means[0], means[1], *interval(changes)


@dataclass(frozen=True, kw_only=True)
class Compared(MeasuredChange):
    """One metric of base and tuned; its interval is from paired bootstrap samples."""

    name: str
    label: str
    tuned: float
    unmeasured: int = 0  # cases in which a number of base or tuned is infinite or none
    own: bool = False  # defined by the job file
    decides: bool = False  # the job's evaluation.decide_by

    def borne_by(self, turned: int) -> Self:
        """This change; its interval reaches zero if fewer than MIN_TURNED cases bear it. `turned`: the cases that rose
        less those that fell."""
        if turned * math.copysign(1, self.change) >= MIN_TURNED:
            return self
        return replace(self, low=min(self.low, 0.0), high=max(self.high, 0.0))

    def without_cases(self) -> Self:
        """The same measure, of nothing."""
        none = math.nan
        return replace(self, cases=0, unmeasured=0, base=none, tuned=none, change=none, low=none, high=none)

    def as_json(self) -> dict[str, Any]:
        """What MeasuredChange has, and the fields below under their own names, `own` and `decides` only if true;
        `change`: tuned less base; `reading`: better, worse, no clear change or not known."""
        facts = {**vars(self), "reading": self.reading}
        return {key: value for key, value in facts.items() if value or key not in ("own", "decides")}


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
        """A sum over rows divided by a sum of weights; rows without weight are not cases. A percentage's interval
        reaches zero if fewer than MIN_TURNED cases turned."""
        cases = weight > 0
        unmeasured = int((cases & ~(np.isfinite(base) & np.isfinite(tuned))).sum())
        numbers = paired_interval(base, tuned, weight, transform)
        found = self.compared(int(cases.sum()), *numbers, unmeasured=unmeasured)
        return found.borne_by(int((tuned > base).sum() - (tuned < base).sum())) if self.unit == "%" else found

    def compared(
        self, cases: int, base: float, tuned: float, low: float, high: float, *, unmeasured: int = 0
    ) -> Compared:
        """With an interval that is already known."""
        return Compared(
            **vars(self), cases=cases, base=base, tuned=tuned, change=tuned - base, low=low, high=high,
            unmeasured=unmeasured,
        )  # fmt: skip


def percent(name: str, label: str) -> Measure:
    """A measure in percent; more is better."""
    return Measure(name=name, label=label, unit="%", higher_is_better=True)


def compare_shares(name: str, label: str, base: list[bool], tuned: list[bool]) -> Compared:
    """The share of rows that each gets right, in percent."""
    before, after = (100 * np.array(right, float) for right in (base, tuned))
    return percent(name, label).compare(before, after, np.ones(len(base)))


Mask = np.ndarray[Any, np.dtype[np.bool_]]


def judged_apart(given_away: Mask) -> bool:
    """Whether rows to train on give away some of the rows, and leave enough others to judge by."""
    return bool(given_away.any() and (~given_away).sum() >= MIN_NEW)


def with_new_rows(every: list[Compared], new: list[Compared] | None = None) -> list[Compared]:
    """Measures of all rows, each followed by that of `new`, the rows that no row to train on gives away, if its cases
    are others. What was not measured on these has no case there."""
    if new is None:
        return every
    apart = {metric.name: metric for metric in new}
    found = list[Compared]()
    for metric in every:
        other = apart.pop(metric.name, None) or metric.without_cases()
        found += [metric] if other.cases == metric.cases else [metric, _of_new_rows(other)]
    return [*found, *map(_of_new_rows, apart.values())]


def _of_new_rows(metric: Compared) -> Compared:
    return replace(metric, name=f"{NEW_ROWS}{metric.name}", label=f"{metric.label}, rows like none that is trained on")


OTHER = "other"

MACRO_F1 = percent("macro_f1", "macro F1 of the labels")


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What base and tuned answered when a label was expected; numbers are indices in `names`, OTHER's is the last."""

    names: list[str]
    expected: list[int]
    base: list[int]
    tuned: list[int]
    other: int | None = None  # OTHER's index, which is never right; None: a head answers only with labels

    @classmethod
    def of(cls, names: Sequence[str], expected: Sequence[str], base: Sequence[str], tuned: Sequence[str]) -> Labels:
        place = {_folded(name): n for n, name in enumerate(names)}

        def places(texts: Sequence[str]) -> list[int]:
            return [place.get(_folded(text), len(names)) for text in texts]

        said = {"expected": places(expected), "base": places(base), "tuned": places(tuned)}
        return cls(names=[*names, OTHER], other=len(names), **said)

    def among(self, rows: Mask) -> Labels:
        """Those of some rows."""
        expected, base, tuned = (list(itertools.compress(of, rows)) for of in (self.expected, self.base, self.tuned))
        return replace(self, expected=expected, base=base, tuned=tuned)

    def right(self, answers: Sequence[int]) -> list[bool]:
        """For each row, whether the answer is its expected label."""
        return [answer == expected != self.other for answer, expected in zip(answers, self.expected, strict=True)]

    def confusion(self, answers: Sequence[int]) -> list[list[int]]:
        """Rows: the expected label; columns: the answered label."""
        counts = np.zeros((len(self.names), len(self.names)), dtype=int)
        np.add.at(counts, (np.array(self.expected), np.array(answers)), 1)
        return [[int(value) for value in row] for row in counts]

    def macro_f1(self) -> tuple[float, float, float, float]:
        """(base, tuned, low, high) in percent: the mean of each expected label's F1, 2 tp / (answered + expected), with
        the 95% interval of the change over paired bootstrap samples of the rows."""
        present = sorted(set(self.expected))
        rows = np.ones((1, len(self.expected)))
        base, tuned = (self._f1(answers, present, rows)[0] for answers in (self.base, self.tuned))
        sampled = draws(len(self.expected))
        changes = np.concatenate(
            [self._f1(self.tuned, present, some) - self._f1(self.base, present, some) for some in sampled]
        )
        low, high = interval(changes)
        return float(base), float(tuned), low, high

    def _f1(self, answers: Sequence[int], present: Sequence[int], rows: Array) -> Array:
        """Macro F1 in percent for each sample; `rows` says how often it contains each row (samples x rows)."""
        expected = np.array(self.expected)[:, None] == np.array(present)
        answered = np.array(answers)[:, None] == np.array(present)
        hit = expected & answered & np.array(self.right(answers))[:, None]
        right, there, said = rows @ hit, rows @ expected, rows @ answered
        with np.errstate(invalid="ignore"):
            f1 = np.where(there > 0, 2 * right / (there + said), np.nan)  # of the labels that a sample expects
        return 100 * np.nanmean(f1, axis=1)


def label_metrics(labels: Labels) -> list[Compared]:
    """Accuracy and macro F1, which follows the same answers and is as certain only if more of them turned."""
    base, tuned = labels.right(labels.base), labels.right(labels.tuned)
    macro = MACRO_F1.compared(len(labels.expected), *labels.macro_f1())
    return [compare_shares("accuracy", "labels right", base, tuned), macro.borne_by(sum(tuned) - sum(base))]


def labels_taught(shares: Mapping[str, float] | None) -> list[str]:
    """The labels that training answers consist of, the most frequent first; empty if they are not labels.

    `shares`: of each answer, see label_shares.
    """
    return list(shares) if shares is not None and len(shares) > 1 else []


def _folded(text: str) -> str:
    return " ".join(text.split())
