"""Coordinates of a picture's lines and intervals, for a report's page and for the lab's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .units import thousands
from .verdict import has_interval

Point = tuple[int, float]
"""A step and a value."""

MIN_POINTS_TO_SMOOTH = 40
"""A smoothed line through fewer points lags behind them and misleads."""

LEFT, RIGHT, TOP, BOTTOM = 46, 78, 26, 42
"""Room around the curves for the axes' labels and the last values, in units of the picture."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a picture: steps to the right, values upwards."""

    width: int
    height: int
    last_step: int
    low: float
    high: float
    step: float  # between two numbers of the vertical axis

    def x(self, step: float) -> float:
        return round(LEFT + (self.width - LEFT - RIGHT) * step / max(1, self.last_step), 1)

    def y(self, value: float) -> float:
        return round(TOP + (self.height - TOP - BOTTOM) * (self.high - value) / (self.high - self.low), 1)

    def path(self, line: Sequence[Point]) -> str:
        """A line as a path's d attribute; empty without points."""
        return "M" + "L".join(f"{self.x(s)} {self.y(v)}" for s, v in line) if line else ""

    def labels(self) -> dict[str, list[tuple[float, str]]]:
        """The axes' numbers: x, y and text of each."""
        across = _readable(self.last_step / (4 if self.width > 500 else 2), whole=True) if self.last_step > 1 else 1
        steps = [round(n * across) for n in range(int(self.last_step / across + 1e-9) + 1)]
        values = [self.low + n * self.step for n in range(round((self.high - self.low) / self.step) + 1)]
        digits = next(d for d in range(12) if abs(round(self.step, d) - self.step) < 1e-6 * self.step)
        return {
            "x": [(self.x(step), thousands(step)) for step in dict.fromkeys(steps)],
            "y": [(self.y(value), f"{value:.{digits}f}") for value in values],
        }


def axes_of(lines: Iterable[Sequence[Point]], *, width: int, height: int) -> Axes | None:
    """The axes that hold all finite points of the lines; None if there are none."""
    points = [point for line in lines for point in finite(line)]
    if not points:
        return None
    values = [value for _, value in points]
    step = _readable(max(max(values) - min(values), 0.1) / 4)
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    last, high = max(step for step, _ in points), max(high, low + 2 * step)
    return Axes(width=width, height=height, last_step=last, low=low, high=high, step=step)


def finite(line: Iterable[Sequence[Any]]) -> list[Point]:
    """The points that can be drawn."""
    return [(step, value) for step, value in line if math.isfinite(value)]


def loss_chart(
    runs: Sequence[Sequence[Point]], held_out: Sequence[Point], *, width: int, height: int
) -> dict[str, Any]:
    """Coordinates of the loss curves in a picture of that size, and its axes' labels.

    `runs`: the training loss of each attempt; a resumed attempt replaces the steps that it repeated.
    """
    drawn, evals = [finite(run) for run in runs], finite(held_out)
    course = sorted({step: value for run in drawn for step, value in run}.items())
    axes = axes_of([*drawn, evals], width=width, height=height)
    if axes is None or not course:
        return {"raw": "", "smooth": "", "evals": [], "x": [], "y": [], "last": None}
    last, smooth = course[-1], _smoothed(course)
    return {
        "axes": axes,
        "raw": "".join(map(axes.path, drawn)),
        "smooth": axes.path(smooth),
        "line": axes.path(evals) if len(evals) > 1 else "",
        "evals": [(axes.x(s), axes.y(v), s, v) for s, v in evals],
        "width": width,
        "height": height,
        "bottom": height - BOTTOM,
        "right": width - RIGHT,
        **axes.labels(),
        "last": (axes.x(last[0]), axes.y(last[1]), f"{last[1]:.2f}"),
        "held": _beside(axes, evals[-1], last) if evals else None,
    }


def _smoothed(course: Sequence[Point]) -> list[Point]:
    smooth, mean = [], course[0][1]
    for step, value in course if len(course) >= MIN_POINTS_TO_SMOOTH else ():
        mean = 0.7 * mean + 0.3 * value
        smooth.append((step, mean))
    return smooth


def _beside(axes: Axes, held: Point, last: Point) -> tuple[float, float, str]:
    """Where to write the held-out loss: at its last point, but not over the training loss."""
    x, y, other = axes.x(max(held[0], last[0])), axes.y(held[1]), axes.y(last[1])
    if abs(y - other) < 26:
        y = other + (26 if y >= other else -26)
    return x, y, f"{held[1]:.2f}"


def forest(metrics: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each metric, its interval on an axis of its own unit: left end, point and right end in 0..100, base at 50.

    A metric without a reported interval has both ends at its point.
    """
    rows = {}
    for metric in metrics:
        m = metric if has_interval(metric) else {**metric, "low": metric["change"], "high": metric["change"]}
        reach = max(abs(m["low"]), abs(m["high"]), abs(m["change"]), 1e-9) * 1.1 if m["low"] is not None else 1.0
        rows[m["name"]] = {key: 50 + 50 * (m[key] or 0.0) / reach for key in ("low", "change", "high")}
    return rows


def _readable(least: float, *, whole: bool = False) -> float:
    """The least of 1, 2, 2.5, 5, 10, 20, ... that is no smaller: people read such steps easily. `whole`: whole numbers
    only."""
    power = 10.0 ** math.floor(math.log10(least))
    steps = (factor * power for factor in (1, 2, 2.5, 5, 10))
    return next(step for step in steps if step >= least * (1 - 1e-9) and (not whole or step % 1 == 0))
