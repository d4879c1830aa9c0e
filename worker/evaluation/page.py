"""The evaluation report as report.html: one page that stands alone."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from loractl.common.text import signed
from loractl.common.units import duration, gib, thousands
from loractl.common.verdict import badge, written

MIN_POINTS_TO_SMOOTH = 40
"""A smoothed line through fewer points lags behind them and misleads."""


def write_page(report: dict[str, Any], folder: Path) -> None:
    """report.html."""
    (folder / "report.html").write_text(render_html(report), "utf-8")


def render_html(report: dict[str, Any]) -> str:
    """The page: no script, no font, no picture from elsewhere; everything typed by people is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=duration, gib=gib, thousands=thousands, signed=signed, written=written)
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text("utf-8"))
    return template.render(
        report=report,
        charts=[
            ("broad", loss_chart(report["training"], width=920, height=290)),
            ("narrow", loss_chart(report["training"], width=380, height=260)),
        ],
        forest=_forest(report["evaluation"]["metrics"]),
        groups=_groups(report["evaluation"]["answers"]),
        badge=badge(report["verdict"]["reading"]),
    )


LEFT, RIGHT, TOP, BOTTOM = 46, 78, 26, 42
"""Room around the curves for the axes' labels and the last values, in units of the picture."""


def loss_chart(training: dict[str, Any], *, width: int, height: int) -> dict[str, Any]:
    """Coordinates of the loss curves in a picture of that size, and its axes' labels."""
    points = [(s, v) for s, v in training["losses"] if math.isfinite(v)]
    evals = [(s, v) for s, v in training["eval_losses"] if math.isfinite(v)]
    if not points:
        return {"raw": "", "smooth": "", "evals": [], "x": [], "y": [], "last": None}
    columns = 4 if width > 500 else 2
    values = [v for _, v in points + evals]
    low, high = _ticks(min(values), max(values))
    last_step = max(s for s, _ in points + evals)

    def at(step: float, value: float) -> tuple[float, float]:
        across, down = width - LEFT - RIGHT, height - TOP - BOTTOM
        return round(LEFT + across * step / max(1, last_step), 1), round(TOP + down * (high - value) / (high - low), 1)

    def path(line: list[tuple[int, float]]) -> str:
        return "M" + "L".join(f"{x} {y}" for x, y in (at(s, v) for s, v in line))

    smooth, mean = [], points[0][1]
    for step, value in points if len(points) >= MIN_POINTS_TO_SMOOTH else ():
        mean = 0.7 * mean + 0.3 * value
        smooth.append((step, mean))
    grid = [low + (high - low) * n / 4 for n in range(5)]
    return {
        "raw": path(points),
        "smooth": path(smooth) if smooth else "",
        "line": path(evals) if len(evals) > 1 else "",
        "evals": [(*at(s, v), s, v) for s, v in evals],
        "width": width,
        "height": height,
        "bottom": height - BOTTOM,
        "right": width - RIGHT,
        "x": [
            (at(last_step * n / columns, low)[0], thousands(round(last_step * n / columns))) for n in range(columns + 1)
        ],
        "y": [(at(0, v)[1], f"{v:.2f}") for v in grid],
        "last": (*at(*points[-1]), f"{points[-1][1]:.2f}"),
        "held": _beside(at(*evals[-1]), at(*points[-1]), evals[-1][1]) if evals else None,
    }


def _beside(held: tuple[float, float], last: tuple[float, float], value: float) -> tuple[float, float, str]:
    """Where the held-out loss is written: at its last point, but not over the training loss."""
    x, y = max(held[0], last[0]), held[1]
    if abs(y - last[1]) < 26:
        y = last[1] + (26 if y >= last[1] else -26)
    return x, y, f"{value:.2f}"


def _forest(metrics: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each metric, its interval on an axis of its own unit: left end, point and right end in 0..100, base at 50."""
    rows = {}
    for m in metrics:
        reach = max(abs(m["low"]), abs(m["high"]), abs(m["change"]), 1e-9) * 1.1 if m["low"] is not None else 1.0
        rows[m["name"]] = {key: 50 + 50 * (m[key] or 0.0) / reach for key in ("low", "change", "high")}
    return rows


def _groups(answers: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(key, title, answers) by what changed: repaired and broken first."""
    kinds = [
        ("repaired", "base wrong, tuned right", False, True),
        ("broken", "base right, tuned wrong", True, False),
        ("wrong", "both wrong", False, False),
        ("right", "both right", True, True),
    ]
    return [
        (key, title, [a for a in answers if (a["base_exact"], a["tuned_exact"]) == (b, t)])
        for key, title, b, t in kinds
    ]


def _ticks(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis, rounded outwards to a step that people read easily."""
    span = max(high - low, 0.1)
    step = 10 ** math.floor(math.log10(span)) / 2
    return math.floor(low / step) * step, math.ceil(high / step) * step + (step if high == low else 0)
