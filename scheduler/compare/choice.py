"""The best of several jobs, corrected for the choice: it was measured on the very rows that made it the best.

The correction draws rows with replacement, the same ones for every job. The job that is best on the drawn rows is
measured on the others, which had no part in that choice (bootstrap bias correction, Tsamardinos, Greasidou and
Borboudakis 2018, https://doi.org/10.1007/s10994-018-5714-4). The mean over the draws is the corrected change, and the
middle 95 % of the draws are its interval. A draw leaves out about 37 % of the rows, so the interval is rather too wide.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loractl.common.verdict import MIN_CASES, MeasuredChange

from .answer import Comparison, FinishedJob

DRAWS = 1000
SEED = 7

MOST_GROUPS = 500
"""More rows than this are drawn in this number of groups: that takes less time, and the interval stays the same."""

OUT_OF_REACH = 1e-9
"""A job whose difference from the best is less likely by chance than this wins no draw."""

Column = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CorrectedChange(MeasuredChange):
    """The best job's held-out loss against its base, as it would be on rows that did not choose it."""

    among: int  # jobs that might be the best; 1: no other comes close, and the choice changes nothing
    results: int  # all that were measured

    @property
    def metric(self) -> dict[str, Any]:
        """As a report holds a metric."""
        return {**vars(self), "name": "loss", "tuned": self.base + self.change, "reading": self.reading}

    def as_json(self) -> dict[str, Any]:
        """`among`, `results`, `rows`, `base`, `tuned`, `change`, `low`, `high` and `reading`."""
        kept = ("base", "tuned", "change", "low", "high", "reading")
        counts = {"among": self.among, "results": self.results, "rows": self.cases}
        return {**counts, **{key: self.metric[key] for key in kept}}


def corrected(comparison: Comparison) -> CorrectedChange | None:
    """None if it can't be computed: too few rows, a report without the losses of its rows, or a report on other
    rows."""
    best, measured = comparison.best, [job for job in comparison.jobs if job.measured_loss is not None]
    if any(job.rows is None or job.rows != best.rows for job in measured):
        return None
    near = [job for job in measured if job is best or (job.against and job.against.p > OUT_OF_REACH)]
    losses = best.report["evaluation"]["row_losses"]
    if len(losses) < MIN_CASES or any(None in row for job in near for row in job.report["evaluation"]["row_losses"]):
        return None
    weights, base = (_column(best, place) for place in (1, 2))
    loss = best.metrics["loss"]
    if not sum(weights) or None in (loss["base"], loss["low"], loss["high"]):
        return None
    if len(near) == 1:
        change, low, high = best.loss - loss["base"], float(loss["low"]), float(loss["high"])
    else:
        change, low, high = _out_of_bag(weights, base, tuple(_column(job, 3) for job in near))
    return CorrectedChange(
        among=len(near),
        results=len(measured),
        cases=len(losses),
        base=float(loss["base"]),
        change=change,
        low=low,
        high=high,
    )


def _column(job: FinishedJob, place: int) -> Column:
    """The values of all rows, or with many rows the sums of groups, the same groups for each job."""
    values = [float(row[place]) for row in job.report["evaluation"]["row_losses"]]
    groups = min(len(values), MOST_GROUPS)
    return tuple(math.fsum(values[first::groups]) for first in range(groups))


@functools.lru_cache(maxsize=32)  # a page asks again and again
def _out_of_bag(weights: Column, base: Column, losses: Sequence[Column]) -> tuple[float, float, float]:
    """(change, low, high) against the base: of the job that wins a draw, on the rows that the draw left out."""
    rng = random.Random(SEED)  # noqa: S311  no secret: the same draws each time
    rows, changes = range(len(weights)), list[float]()
    for _ in range(DRAWS):
        drawn = rng.choices(rows, k=len(weights))
        of_drawn = operator.itemgetter(*drawn)
        wins = losses[min(range(len(losses)), key=[sum(of_drawn(column)) for column in losses].__getitem__)]
        left = sorted(set(rows) - set(drawn))
        if tokens := sum(map(weights.__getitem__, left)):
            changes.append(math.fsum(wins[row] - base[row] for row in left) / tokens)
    ends = statistics.quantiles(changes, n=40)
    return statistics.fmean(changes), ends[0], ends[-1]
