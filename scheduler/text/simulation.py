"""How a simulation looks on a terminal and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loractl.common.units import GIB, thousands
from loractl.scheduler.simulation.outcome import Course, Outcome, mean, quantile

from .screen import Screen, table

if TYPE_CHECKING:
    from loractl.scheduler.commands.sim import Simulation

TITLES = {
    "loractl": "loractl",
    "fifo": "fifo",
    "shortest_first": "shortest first*",
    "best_fit": "best fit",
}


def text(done: Simulation, screen: Screen) -> str:
    """A sentence, what each rule made of the jobs, and how long they waited by what they need."""
    ours, fifo = (mean([c.took for c in done.outcomes[name].courses]) for name in ("loractl", "fifo"))
    change = 1 - ours / fifo if fifo else 0.0
    head = (
        f"With loractl a job ends {span(ours)} after it arrives, {abs(change):.0%} "
        f"{'sooner' if change >= 0 else 'later'} than by fifo."
    )
    lines = [screen.style(head, bold=True), *_what(done), ""]
    headers = ["RULE", "MEAN", "P99", "MEAN WAIT", "P99", "LARGEST", "MAKESPAN", "VRAM"]
    lines += table(headers, [_row(name, out) for name, out in done.outcomes.items()], screen, right=headers[1:])
    lines += ["", *_by_class(done, screen), ""]
    notes = [
        "MEAN, P99: from arrival to end. LARGEST: p99 wait of the tenth that needs most.",
        "VRAM: reserved, of all cards, over the makespan.",
        "fifo: whole cards by age, the first blocks the rest. best fit: shared by age.",
        "shortest first*: whole cards; it knows how long each job will take.",
    ]
    return "\n".join([*lines, *(screen.dim(note) for note in notes)])


def fields(done: Simulation) -> dict[str, Any]:
    """The simulation as JSON values. Seconds and bytes."""
    return {
        "jobs": len(done.chosen.jobs),
        "never": done.chosen.never,
        "longer": done.chosen.longer,
        "left_out": done.chosen.trace.left_out,
        "users_are": done.chosen.trace.users_are,
        "fleet": [{"vram": card.total, "max_jobs": card.max_jobs} for card in done.cards],
        "compress": done.compress,
        "contention": done.contention,
        "load": done.load if math.isfinite(done.load) else None,
        "policies": {name: _measures(out) for name, out in done.outcomes.items()},
    }


def span(seconds: float) -> str:
    """A time in one number, so that a column of them can be compared: 45 s, 12 min, 11.0 h, 3.2 d."""
    for below, size, unit in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < below:
            return f"{seconds / size:.{0 if size < 3600 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def fleet_text(done: Simulation) -> str:
    """The fleet as a person would write it: 2x12, 80 GiB."""
    counts = Counter(card.total for card in done.cards)
    sizes = (f"{count}x{size / GIB:g}" if count > 1 else f"{size / GIB:g}" for size, count in sorted(counts.items()))
    return f"{', '.join(sizes)} GiB"


def _what(done: Simulation) -> list[str]:
    chosen, trace = done.chosen, done.chosen.trace
    users = len({job.user for job in chosen.jobs})
    people = f"{users} user{'' if users == 1 else 's'}"
    if trace.users_are != "user":
        people += f" (its {trace.users_are}, for want of users)"
    load = f"load {done.load:.2f}" if math.isfinite(done.load) else "all at once"
    lines = [
        f"{thousands(len(chosen.jobs))} jobs of {people},",
        f"on {fleet_text(done)}; {load}, contention {done.contention:g}.",
    ]
    if chosen.never:
        lines.append(f"Larger than every card, and not replayed: {thousands(chosen.never)}.")
    if chosen.longer:
        lines.append(f"Longer than --longest, and not replayed: {thousands(chosen.longer)}.")
    if trace.left_out:
        lines.append(f"No job on one card with a lifetime, and not read: {thousands(trace.left_out)} rows.")
    return lines


def _row(name: str, out: Outcome) -> list[str]:
    took, waits = [c.took for c in out.courses], [c.wait for c in out.courses]
    return [
        TITLES[name],
        span(mean(took)),
        span(quantile(took, 0.99)),
        span(mean(waits)),
        span(quantile(waits, 0.99)),
        span(quantile([c.wait for c in out.largest_tenth], 0.99)),
        span(out.makespan),
        f"{out.utilisation:.0%}",
    ]


def _by_class(done: Simulation, screen: Screen) -> list[str]:
    """Mean waits by VRAM class, a class a row."""
    classes = {name: out.by_class() for name, out in done.outcomes.items()}
    headers = ["MEAN WAIT BY NEED", "JOBS", *(TITLES[name].upper() for name in classes)]
    rows = [
        [
            f"{'≤' if screen.unicode else 'to'} {size} GiB",
            thousands(len(courses)),
            *(span(mean(_waits(found[size]))) for found in classes.values()),
        ]
        for size, courses in classes["loractl"].items()
    ]
    return table(headers, rows, screen, right=headers[1:])


def _waits(courses: Sequence[Course]) -> list[float]:
    return [course.wait for course in courses]


def _measures(out: Outcome) -> dict[str, Any]:
    took, waits = [c.took for c in out.courses], _waits(out.courses)
    return {
        "mean_jct_s": mean(took),
        "p99_jct_s": quantile(took, 0.99),
        "mean_wait_s": mean(waits),
        "p99_wait_s": quantile(waits, 0.99),
        "largest_tenth_p99_wait_s": quantile(_waits(out.largest_tenth), 0.99),
        "makespan_s": out.makespan,
        "vram_utilisation": out.utilisation,
        "waits_by_class": {
            str(size): {
                "jobs": len(courses),
                "mean_wait_s": mean(_waits(courses)),
                "p99_wait_s": quantile(_waits(courses), 0.99),
            }
            for size, courses in out.by_class().items()
        },
    }
