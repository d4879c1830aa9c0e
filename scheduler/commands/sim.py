"""The command that replays a trace of jobs on a fleet of one's choice, under our placement rule and others."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from loractl.common.placement.cards import Card
    from loractl.common.placement.replay import Rule
    from loractl.scheduler.simulation.outcome import Outcome
    from loractl.scheduler.simulation.workload import Chosen

CONTENTION = 0.5
"""Two jobs on a card run at two thirds of their speed each: between cards that are shared for nothing (0) and jobs
that take turns (1). Small fine-tunes leave a large card idle between kernels, large ones don't."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was replayed, and what came of it under each rule."""

    chosen: Chosen
    cards: tuple[Card, ...]
    compress: float
    contention: float
    load: float  # see outcome.load_of
    outcomes: Mapping[str, Outcome]  # by rule; ours is "loractl"


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
    from loractl.common.errors import UsageError
    from loractl.common.units import parse_duration
    from loractl.scheduler.simulation.workload import choose, parse_fleet, read_trace
    from loractl.scheduler.text import jobs as render
    from loractl.scheduler.text import simulation as render_sim

    if not (math.isfinite(compress) and compress > 0):
        raise UsageError(f"--compress {compress:g} is not above 0", "2 lets the jobs arrive twice as fast")
    if not math.isfinite(contention):
        raise UsageError(f"--contention {contention:g} is not a number", "0: sharing is free; 1: jobs take turns")
    try:
        bound = math.inf if longest is None else parse_duration(longest)
    except ValueError as error:
        raise UsageError(f"--longest {longest} {error}", "like --longest 1d") from error
    if plot is not None:
        from loractl.scheduler.simulation.picture import require_matplotlib

        require_matplotlib("sim")
    cards, found = parse_fleet(fleet, max_jobs_per_gpu), read_trace(trace)
    chosen = choose(found, cards, bound, limit)
    if not chosen.jobs:
        raise UsageError(f"{trace} has no job that this fleet and these options leave", "larger cards: --fleet 80GiB")
    done = simulate(chosen, cards, compress, contention)
    if plot is not None:
        from loractl.scheduler.simulation.picture import draw

        draw(done, plot)
        click.echo(f"The picture is in {plot}.", err=True)
    click.echo(json.dumps(render_sim.fields(done)) if as_json else render_sim.text(done, render.detect_screen()))


def simulate(chosen: Chosen, cards: Sequence[Card], compress: float, contention: float) -> Simulation:
    """Replay the chosen jobs under each rule."""
    from loractl.common.placement.replay import PlacementRule, replay
    from loractl.scheduler.simulation.baselines import best_fit, fifo, shortest_first
    from loractl.scheduler.simulation.outcome import load_of, outcome_of
    from loractl.scheduler.simulation.workload import BEGIN, to_replay

    rules: dict[str, Callable[[], Rule]] = {
        "loractl": PlacementRule,
        "fifo": fifo,
        "shortest_first": shortest_first,
        "best_fit": best_fit,
    }
    jobs, outcomes = to_replay(chosen.jobs, compress), {}
    with click.progressbar(rules, label="Replaying", file=sys.stderr, hidden=not sys.stderr.isatty()) as names:
        for name in names:
            replayed = replay(jobs, cards, BEGIN, rules[name](), contention=contention)
            outcomes[name] = outcome_of(jobs, cards, replayed)
    return Simulation(
        chosen=chosen,
        cards=tuple(cards),
        compress=compress,
        contention=contention,
        load=load_of(jobs, cards),
        outcomes=outcomes,
    )
