"""loractl compare: finished jobs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from loractl.common.errors import UsageError
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_stores


@click.command()
@click.argument("job_ids", type=int, metavar="JOB...", nargs=-1)
@click.option("--sweep", "sweep_id", type=int, metavar="N", help="The members of a sweep, and which of them is best.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw loss curves and changes into a PNG, like jobs.png.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(job_ids: tuple[int, ...], sweep_id: int | None, plot: Path | None, as_json: bool) -> None:
    """Compare finished jobs: losses, memory, time, and their settings.

    The job with the least held-out loss comes first. Jobs that were measured on the same rows are compared with it, row
    by row.
    """
    from .answer import comparison
    from .text import comparison_text, draw_comparison, require_matplotlib, sweep_comparison_text
    from .winner import sweep_comparison

    if sweep_id is None and len(set(job_ids)) < 2:
        raise UsageError("there is nothing to compare", "name two jobs or more: loractl compare 12 13")
    if sweep_id is not None and job_ids:
        raise UsageError("--sweep compares the members of one sweep", f"alone: loractl compare --sweep {sweep_id}")
    if plot is not None:
        require_matplotlib()
    settings, store, artifacts = open_stores()
    if sweep_id is None:
        compared = comparison(store, artifacts, dict.fromkeys(job_ids))
        show(compared, as_json, lambda: comparison_text(compared, detect_screen()))
    else:
        members = sweep_comparison(store, artifacts, sweep_id, settings.user)
        compared = members.comparison
        show(members, as_json, lambda: sweep_comparison_text(members, detect_screen()))
    if plot is not None:
        draw_comparison(compared, plot)
        click.echo(f"The picture is in {plot}.", err=True)
