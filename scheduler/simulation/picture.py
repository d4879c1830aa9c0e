"""The picture of a simulation: above how long jobs waited, below how much memory was reserved."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from loractl.common.units import GIB, thousands
from loractl.scheduler.cli.figure import save, without_box

from .outcome import POLICIES, RuleOutcome, Simulation
from .workload import fleet_text

# Lines differ in shade, width and dash, so that a grey print is readable too.
_STYLES: dict[str, dict[str, Any]] = {
    "loractl": {"color": "#0b3d91", "linewidth": 2.6, "linestyle": "-", "zorder": 5},
    "without_quotas": {"color": "#7a4fb5", "linewidth": 1.8, "linestyle": (0, (4, 1, 1, 1)), "zorder": 4},
    "blind": {"color": "#b0306a", "linewidth": 1.8, "linestyle": (0, (5, 1)), "zorder": 4},
    "recomputing": {"color": "#7a9be8", "linewidth": 1.8, "linestyle": (0, (3, 2)), "zorder": 4},
    "fifo": {"color": "#b5541c", "linewidth": 1.6, "linestyle": "-"},
    "shortest_first": {"color": "#8a8a8a", "linewidth": 1.4, "linestyle": ":"},
    "best_fit": {"color": "#3f9b8f", "linewidth": 1.4, "linestyle": "--"},
}
_TICKS = ((60, "1 min"), (600, "10 min"), (3600, "1 h"), (6 * 3600, "6 h"), (86400, "1 d"), (5 * 86400, "5 d"))
_BINS = 120


def draw(done: Simulation, path: Path) -> None:
    """Write the picture as a PNG. Raises UsageError if the file can't be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.4), dpi=120, layout="constrained")
    waits, memory = figure.subplots(2, 1)
    _draw_waits(waits, done)
    _draw_memory(memory, done)
    title = f"{thousands(len(done.chosen.jobs))} jobs on {fleet_text(done.cards, done.nodes.presences)}"
    figure.suptitle(f"{title} ({done.how_loaded}contention {done.contention:g})", fontsize=11)
    save(figure, path)


def _draw_waits(axes: Any, done: Simulation) -> None:
    """The share of jobs that have started, by their time in the queue."""
    for name, out in done.outcomes.items():
        waits = sorted(course.wait for course in out.courses)
        shares = [n / len(waits) for n in range(1, len(waits) + 1)]
        axes.step([max(wait, 1.0) for wait in waits], shares, where="post", label=POLICIES[name].title, **_STYLES[name])
    axes.set_xscale("log")
    axes.set_xlim(10, None)
    ticks = [(at, label) for at, label in _TICKS if at <= max(60.0, *axes.get_xlim())]
    axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title("Share of jobs that started within a wait", loc="left", fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    without_box(axes)


def _draw_memory(axes: Any, done: Simulation) -> None:
    """Bytes reserved over time, as means over equal spans."""
    longest = max(out.makespan for out in done.outcomes.values())
    unit, name = (86400, "days") if longest > 2 * 86400 else (3600, "hours")
    for rule, out in done.outcomes.items():
        means = binned(out, longest, _BINS)
        times = [(n + 0.5) * longest / _BINS / unit for n in range(_BINS)]
        axes.plot(times, [size / GIB for size in means], label=POLICIES[rule].title, **_STYLES[rule])
    total = sum(card.total for card in done.cards) / GIB
    axes.axhline(total, color="black", linewidth=0.8)
    axes.annotate(f"all cards: {total:g} GiB", (0, total), (2, 3), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, longest / unit)
    axes.set_ylim(0, total * 1.12)
    axes.set_xlabel(f"{name} since the first arrival")
    axes.set_title("Memory reserved, GiB", loc="left", fontsize=10)
    without_box(axes)


def binned(out: RuleOutcome, span: float, bins: int) -> Sequence[float]:
    """Mean bytes reserved in each of `bins` equal parts of `span` seconds."""
    times = [at for at, _ in out.reserved]
    areas = [0.0]  # byte-seconds up to each time
    for (at, size), after in zip(out.reserved, times[1:], strict=False):
        areas.append(areas[-1] + size * (after - at))

    def area(moment: float) -> float:
        index = bisect.bisect_right(times, moment) - 1
        return areas[index] + out.reserved[index][1] * (moment - times[index])

    edges = [area(span * n / bins) for n in range(bins + 1)]
    return [(after - before) / (span / bins) for before, after in pairwise(edges)] if span else [0.0] * bins
