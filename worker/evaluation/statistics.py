"""Paired bootstrap intervals: how certain a difference between base and tuned is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 7
_DRAWS_AT_ONCE = 100  # keeps a hundred thousand rows within 80 MB

Array = np.ndarray[Any, np.dtype[np.float64]]


def draws(cases: int) -> Iterator[Array]:
    """How often each sample contains each case, 100 samples at a time: float64 of shape (100, cases). The same for
    every metric with this number of cases (Efron and Tibshirani 1993, chapter 13)."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    for _ in range(BOOTSTRAP_SAMPLES // _DRAWS_AT_ONCE):
        yield rng.multinomial(cases, np.full(cases, 1 / cases), size=_DRAWS_AT_ONCE).astype(np.float64)


def interval(changes: Array) -> tuple[float, float]:
    """The 95% percentile interval."""
    low, high = np.nanpercentile(changes, [2.5, 97.5])
    return float(low), float(high)


def paired_interval(
    base: Array, tuned: Array, weight: Array, transform: Callable[[Array], Array] = lambda x: x
) -> tuple[float, float, float, float]:
    """(base, tuned, low, high): means sum(x)/sum(weight), and the interval of tuned - base over samples of the cases,
    the same cases for both."""
    values = np.stack([weight, base, tuned], axis=1)
    totals = np.concatenate([some @ values for some in draws(len(weight))])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        changes = transform(totals[:, 2] / totals[:, 0]) - transform(totals[:, 1] / totals[:, 0])
        means = [float(transform(np.array([part.sum() / weight.sum()]))[0]) for part in (base, tuned)]
    return means[0], means[1], *interval(changes)
