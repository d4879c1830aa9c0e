"""The evaluation report as report.html: one self-contained page."""

from __future__ import annotations

import functools
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.chart import forest, loss_chart
from loractl.common.job.kinds import kind_of
from loractl.common.text import signed
from loractl.common.units import amount, duration, gib, thousands
from loractl.common.verdict import answer_groups, badge, written

if TYPE_CHECKING:
    from jinja2 import Template


def write_page(report: dict[str, Any], folder: Path) -> None:
    """report.html."""
    (folder / "report.html").write_text(render_html(report), "utf-8")


def render_html(report: dict[str, Any]) -> str:
    """The page: no script, no font, no picture from elsewhere; everything typed by people is escaped."""
    losses, held_out = report["training"]["losses"], report["training"]["eval_losses"]
    return page_template().render(
        report=report,
        charts=[
            (size, loss_chart([losses], held_out, width=width, height=height))
            for size, width, height in (("broad", 920, 290), ("narrow", 380, 260))
        ],
        forest=forest(report["evaluation"]["metrics"]),
        groups=answer_groups(report["evaluation"]["answers"]),
        badge=badge(report["verdict"]["reading"]),
        loss_of=kind_of(report.get("task_type")).loss_of,
    )


@functools.cache
def page_template() -> Template:
    """Compiled once per process: that takes longer than rendering the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        amount=amount, duration=duration, gib=gib, thousands=thousands, signed=signed, written=written
    )
    return environment.from_string((files(__package__) / "report.html.jinja").read_text("utf-8"))
