"""loractl sim: replay a trace of jobs on a given fleet, under our placement rule and others."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from loractl.common.errors import UsageError
from loractl.scheduler.cli.output import show

CONTENTION = 0.5
"""Two jobs on a card run at two thirds of their speed each: between cards that are shared at no cost (0) and jobs that
take turns (1). Small fine-tunes leave a large card idle between kernels, large ones don't."""


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="TRACE")
@click.option(
    "--fleet",
    required=True,
    metavar="SIZES",
    help="The cards, like 2x12GiB,80GiB; of cards that go, '24GiB open 4h shut 2h' or '24GiB until 3d'.",
)
@click.option("--max-jobs-per-gpu", type=click.IntRange(1), help="Jobs that may share a card; by default as a worker.")
@click.option("--compress", type=float, default=1.0, show_default=True, help="Let jobs arrive this many times as fast.")
@click.option(
    "--contention",
    type=click.FloatRange(0.0),
    default=CONTENTION,
    show_default=True,
    help="What sharing a card costs: each of k jobs runs at 1/(1 + C(k-1)) of its speed.",
)
@click.option("--base-size", metavar="SIZE", help="Size of the base that each job loads first, if the trace has none.")
@click.option("--fork-server/--no-fork-server", default=True, show_default=True, help="As for a worker.")
@click.option(
    "--roomy/--no-roomy", default=False, show_default=True, help="Let jobs recompute less, as 8B in 16 bit would."
)
@click.option(
    "--predictions",
    type=click.Choice(["exact", "noisy", "absent"]),
    default="noisy",
    show_default=True,
    help="What our rule knows of durations before a start; noisy: off by a factor of e at one sigma.",
)
@click.option(
    "--quota",
    "quotas",
    multiple=True,
    metavar="USER=HOURS/WINDOW[:soft]",
    help="What a user may use, like ada=100h/week. Repeatable.",
)
@click.option("--longest", metavar="DURATION", help="Leave out jobs that take longer, like 1d.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N jobs to arrive.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw waits and memory use into a PNG, like sim.png.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sim(
    trace: Path,
    fleet: str,
    max_jobs_per_gpu: int | None,
    compress: float,
    contention: float,
    base_size: str | None,
    fork_server: bool,
    roomy: bool,
    predictions: str,
    quotas: tuple[str, ...],
    longest: str | None,
    limit: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay a trace of jobs on a fleet under the placement rule and others.

    TRACE is a CSV with the columns arrival, vram, duration and user, and perhaps priority and base_size, or openb's
    list of pods. If the size of its base is known, a job loads it before its first step. When a card goes away, its
    jobs save a checkpoint and go back to the queue.
    """
    from loractl.scheduler.cli.figure import require_matplotlib
    from loractl.scheduler.cli.screen import detect_screen

    from .outcome import Nodes, policies_for, simulate
    from .quotas import parse_quotas
    from .text import text
    from .workload import Predictions, choose, parse_fleet, parse_presences, read_trace, without_slow

    bound = math.inf if longest is None else _seconds("--longest", longest)
    _check(compress, contention)
    nodes = Nodes(fork_server=fork_server, roomy=roomy, presences=parse_presences(fleet))
    if plot is not None:
        require_matplotlib("sim")
    cards = parse_fleet(fleet, max_jobs_per_gpu)
    chosen = choose(read_trace(trace), cards, bound, limit)
    if base_size is not None:
        chosen = chosen.on_bases_of(_size(base_size))
    allowed = parse_quotas(quotas, {job.user for job in chosen.workload.jobs})
    chosen = without_slow(chosen, cards, nodes.presences, forks=fork_server)
    if not chosen.jobs:
        hint = "cards that stay longer" if chosen.slow else "larger cards: --fleet 80GiB"
        raise UsageError(f"{trace} has no job that this fleet and these options leave", hint)
    names = policies_for(nodes, allowed)
    with click.progressbar(names, label="Replaying", file=sys.stderr, hidden=not sys.stderr.isatty()) as policies:
        done = simulate(chosen, cards, compress, contention, nodes, policies, allowed, Predictions(predictions))
    if plot is not None:
        from .picture import draw

        draw(done, plot)
        click.echo(f"The picture is in {plot}.", err=True)
    show(done, as_json, lambda: text(done, detect_screen()))


def _check(compress: float, contention: float) -> None:
    """Raises UsageError for numbers that make no sense."""
    if not (math.isfinite(compress) and compress > 0):
        raise UsageError(f"--compress {compress:g} is not above 0", "2 lets the jobs arrive twice as fast")
    if not math.isfinite(contention):
        raise UsageError(f"--contention {contention:g} is not a number", "0: sharing is free; 1: jobs take turns")


def _size(text: str) -> int:
    """The bytes of --base-size. Raises UsageError."""
    from loractl.common.units import parse_size

    try:
        if size := parse_size(text):
            return size
        raise ValueError("is not a base; write its size with a unit")
    except ValueError as error:
        raise UsageError(f"--base-size {text} {error}", "like --base-size 5GiB") from error


def _seconds(option: str, text: str) -> float:
    """An option's duration in seconds. Raises UsageError."""
    from loractl.common.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option} {text} {error}", f"like {option} 1d") from error
