"""The positions in a page's drawings: cards as bars, losses as lines. Coordinates in percent or in units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loractl.common.chart import Axes, axes_of, finite, loss_chart
from loractl.scheduler.fleet.answer import DeviceState

from .dossier import JobCourse


@dataclass(frozen=True, kw_only=True)
class BarPart:
    """A part of a card's bar, in percent of the card."""

    kind: str  # job, outside
    at: float
    width: float
    size: int  # bytes
    used: float = 0.0  # of the card, measured
    user: str = ""
    job_id: int | None = None


def card_parts(device: DeviceState) -> list[BarPart]:
    """What holds a card: other people's programs, then our jobs."""
    card, total = device.card, device.card.total
    if not total:
        return []
    parts: list[BarPart] = []
    at = 0.0

    def add(kind: str, size: int, **more: Any) -> None:
        nonlocal at
        width = max(0.0, min(100.0 - at, 100 * size / total))
        if width >= 0.2:
            parts.append(BarPart(kind=kind, at=round(at, 2), width=round(width, 2), size=size, **more))
            at += width

    add("outside", card.outside)
    for job in card.running:
        used = round(min(100.0, 100 * job.used / total), 2)
        add("job", max(job.reserved, job.used), used=used, user=job.user, job_id=job.job_id)
    return parts


BARS_PX = {"slim": 176, "middle": 270, "ample": 410}
"""A card's least bar width, by class; page.css shows one of these: slim in a window of 1,041 px, where the second
column begins, middle on a phone, ample from 1,280 px on."""

CHARACTER_PX, PADDING_PX = 6.6, 14
"""The width of a label's character, and the space next to a label."""


def labels(width: float, *texts: str) -> list[tuple[str, str]]:
    """The labels for a part of a bar with a width in percent, each with the kinds of bars that show it."""
    shown: dict[str, list[str]] = {}
    for kind, pixels in BARS_PX.items():
        shown.setdefault(_fitting(width / 100 * pixels, texts), []).append(kind)
    return [(" ".join(kinds), text) for text, kinds in shown.items() if text]


def _fitting(width: float, texts: Sequence[str]) -> str:
    """The first of the texts that fits into the pixels; empty if none fits."""
    return next((text for text in texts if len(text) <= (width - PADDING_PX) / CHARACTER_PX), "")


def spark(values: Sequence[float], width: int = 84, height: int = 22) -> str:
    """A small line as a path's d; empty for fewer than two values."""
    drawn = [value for value in values if math.isfinite(value)]
    if len(drawn) < 2:
        return ""
    low, high = min(drawn), max(drawn)
    reach = (high - low) or 1.0
    points = (
        f"{width * n / (len(drawn) - 1):.1f} {2 + (height - 4) * (high - value) / reach:.1f}"
        for n, value in enumerate(drawn)
    )
    return "M" + "L".join(points)


def course_charts(course: JobCourse) -> list[tuple[str, dict[str, Any]]]:
    """The loss of a job for a wide and for a narrow screen: lines, attempts below them, repeated steps."""
    charts = []
    for size, width, height in (("broad", 920, 290), ("narrow", 380, 250)):
        chart = loss_chart(course.runs, course.held_out, width=width, height=height)
        axes = chart.get("axes")
        spans = [_span(axes, span) for span in course.spans] if isinstance(axes, Axes) else []
        charts.append((size, {**chart, "spans": spans, "best": _best(axes, course.held_out)}))
    return charts


def _span(axes: Axes, span: Any) -> dict[str, Any]:
    left, right = axes.x(span.first), axes.x(span.last)
    again = axes.x(span.last - span.repeated)
    return {
        "span": span,
        "x": left,
        "width": round(max(2.0, right - left - 1.5), 1),
        "again": again if span.repeated else None,
        "again_width": round(right - again, 1),
        "wide": right - left > 90,
    }


def _best(axes: Any, held_out: Sequence[tuple[int, float]]) -> tuple[float, float, int] | None:
    """Where the least held-out loss is, unless that is its only or its last point."""
    points = finite(held_out)
    if not isinstance(axes, Axes) or len(points) < 2:
        return None
    step, value = min(points, key=lambda point: point[1])
    return None if step == points[-1][0] else (axes.x(step), axes.y(value), step)


def contest_charts(
    lines: Mapping[int, Sequence[tuple[int, float]]], leaders: Sequence[int]
) -> list[tuple[str, dict[str, Any]]]:
    """A sweep's lines for a wide and for a narrow screen: the leaders are named, the rest are grey."""
    charts = []
    for size, width, height in (("broad", 920, 300), ("narrow", 380, 260)):
        drawn = {job_id: finite(line) for job_id, line in lines.items()}
        axes = axes_of(drawn.values(), width=width, height=height)
        if axes is None:
            return []
        named = [(job_id, drawn[job_id][-1]) for job_id in leaders if drawn.get(job_id)]
        places = _apart([axes.y(value) for _, (_, value) in named], 14)
        charts.append(
            (
                size,
                {
                    "width": width,
                    "height": height,
                    "right": axes.x(axes.last_step),
                    **axes.labels(),
                    "grey": [axes.path(line) for job_id, line in drawn.items() if job_id not in leaders],
                    "named": [
                        (place + 1, job_id, axes.path(drawn[job_id]), axes.x(point[0]), y)
                        for place, ((job_id, point), y) in enumerate(zip(named, places, strict=True))
                    ],
                },
            )
        )
    return charts


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The places, moved down until they are this far apart, in the given order."""
    moved = dict[int, float]()
    last = -math.inf
    for n in sorted(range(len(places)), key=lambda n: places[n]):
        last = max(places[n], last + least)
        moved[n] = round(last, 1)
    return [moved[n] for n in range(len(places))]


def interval(low: float, high: float, middle: float, ends: tuple[float, float]) -> dict[str, float]:
    """An interval on an axis with these ends, in percent."""
    reach = (ends[1] - ends[0]) or 1.0
    place = {"low": low, "high": high, "at": middle, "zero": 0.0}
    return {key: round(min(100.0, max(0.0, 100 * (value - ends[0]) / reach)), 1) for key, value in place.items()}
