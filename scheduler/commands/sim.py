"""loractl sim: replay a trace of jobs on a given fleet, under our placement rule and others."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from loractl.common.errors import UsageError

from .output import show

CONTENTION = 0.5
"""Two jobs on a card run at two thirds of their speed each: between cards that are shared for nothing (0) and jobs
that take turns (1). Small fine-tunes leave a large card idle between kernels, large ones don't."""


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="TRACE")
@click.option("--fleet", required=True, metavar="SIZES", help="The cards, like 2x12GiB,2x24GiB,80GiB.")
@click.option("--max-jobs-per-gpu", type=click.IntRange(1), help="Jobs that may share a card; by default as a worker.")
@click.option("--compress", type=float, default=1.0, show_default=True, help="Let jobs arrive so many times as fast.")
@click.option(
    "--contention",
    type=click.FloatRange(0.0),
    default=CONTENTION,
    show_default=True,
    help="What sharing a card costs: each of k jobs runs at 1/(1 + C(k-1)) of its speed.",
)
@click.option("--longest", metavar="DURATION", help="Leave out jobs that take longer, like 1d.")
@click.option("--limit", type=click.IntRange(1), help="Only so many jobs, the first to arrive.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw waits and memory use into a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sim(
    trace: Path,
    fleet: str,
    max_jobs_per_gpu: int | None,
    compress: float,
    contention: float,
    longest: str | None,
    limit: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay a trace of jobs on a fleet under the placement rule and others.

    TRACE is a CSV with the columns arrival, vram, duration and user, and perhaps priority, or openb's list of pods.
    """
    from loractl.scheduler.figure import require_matplotlib
    from loractl.scheduler.simulation.outcome import RULES, simulate
    from loractl.scheduler.simulation.workload import choose, parse_fleet, read_trace
    from loractl.scheduler.text.screen import detect_screen
    from loractl.scheduler.text.simulation import text

    bound = _checked(compress, contention, longest)
    if plot is not None:
        require_matplotlib("sim")
    cards = parse_fleet(fleet, max_jobs_per_gpu)
    chosen = choose(read_trace(trace), cards, bound, limit)
    if not chosen.jobs:
        raise UsageError(f"{trace} has no job that this fleet and these options leave", "larger cards: --fleet 80GiB")
    with click.progressbar(RULES, label="Replaying", file=sys.stderr, hidden=not sys.stderr.isatty()) as rules:
        done = simulate(chosen, cards, compress, contention, rules)
    if plot is not None:
        from loractl.scheduler.simulation.picture import draw

        draw(done, plot)
        click.echo(f"The picture is in {plot}.", err=True)
    show(done, as_json, lambda: text(done, detect_screen()))


def _checked(compress: float, contention: float, longest: str | None) -> float:
    """The seconds that --longest means. Raises UsageError for numbers that make no sense."""
    from loractl.common.units import parse_duration

    if not (math.isfinite(compress) and compress > 0):
        raise UsageError(f"--compress {compress:g} is not above 0", "2 lets the jobs arrive twice as fast")
    if not math.isfinite(contention):
        raise UsageError(f"--contention {contention:g} is not a number", "0: sharing is free; 1: jobs take turns")
    try:
        return math.inf if longest is None else parse_duration(longest)
    except ValueError as error:
        raise UsageError(f"--longest {longest} {error}", "like --longest 1d") from error
