"""The picture of a comparison: training losses over the steps, and each job's change against the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from loractl.common.text import clean_line
from loractl.scheduler.figure import save, without_box

if TYPE_CHECKING:
    from loractl.scheduler.answers.comparison import Comparison

_COLORS = ("#0b3d91", "#b5541c", "#3f9b8f", "#7a4fa3", "#8a8a8a")


def draw_comparison(answer: Comparison, path: Path) -> None:
    """Write the picture as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    jobs = answer.jobs
    figure = Figure(figsize=(9, 4.2 + 0.35 * len(jobs)), dpi=120, layout="constrained")
    curves, changes = figure.subplots(2, 1, height_ratios=(10, 2 + len(jobs)))
    for place, job in enumerate(jobs):
        style = {"color": _COLORS[min(place, 4)], "linewidth": 2.0 if place == 0 else 1.3}
        points = [(s, v) for s, v in job.report["training"]["losses"] if v is not None]
        named = f"{job.job_id} {clean_line(job.report['job']['name'])}"
        curves.plot([s for s, _ in points], [v for _, v in points], label=named, **style)
        if job.against and math.isfinite(job.against.low):
            changes.plot([job.against.low, job.against.high], [-place, -place], **style)
        if job.against or place == 0:
            changes.plot([job.against.change if job.against else 0], [-place], "o", color=style["color"])
    curves.set_title("Training loss over the steps", loc="left", fontsize=10)
    curves.legend(loc="upper right", frameon=False, fontsize=9)
    changes.axvline(0, color="black", linewidth=0.8)
    changes.set_yticks([-n for n in range(len(jobs))], [str(job.job_id) for job in jobs])
    changes.set_title("Held-out loss against the best, 95 % interval (right: worse)", loc="left", fontsize=10)
    for axes in (curves, changes):
        without_box(axes)
    save(figure, path)
