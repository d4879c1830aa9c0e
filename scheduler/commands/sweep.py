"""loractl sweep: one job file with different settings, as a group of jobs of which losers may be stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import SpecError, SpecProblem, UsageError

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec
    from loractl.common.job.sweep import SweepView
    from loractl.common.settings import Settings
    from loractl.common.store.records import Submission
    from loractl.common.store.store import Store
    from loractl.scheduler.submission.grid import Grid, Point

_NAME_LENGTH = 63

_OTHER_LOSSES = ("base_model", "revision", "dataset", "evaluation", "training.label_smoothing_factor")
"""Keys and sections whose change makes held-out losses that say nothing of each other."""


@click.command()
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUES",
    help="Values to try, like lora.r=8,16,32, or a range to draw from: log:1e-5..1e-3, uniform:0..0.1, int:4..64.",
)  # fmt: skip
@click.option("--early-stop", is_flag=True, help="Stop members that lose at 25 % and at 50 % of their steps.")
@click.option("--trials", type=click.IntRange(2), metavar="N", help="Draw N points instead of running all.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Of the draw, 0 unless given.")
@click.option("--dry-run", is_flag=True, help="Check and print the members, and queue nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sweep(
    job_file: Path,
    settings: tuple[str, ...],
    early_stop: bool,
    trials: int | None,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Try settings of a job file: a group of jobs, compared, whose losers may stop early.

    Every member is checked before any is queued, and all are queued or none. One value alone holds for all members.
    """
    from loractl.common.job.halving import RUNGS
    from loractl.common.job.sweep import NewSweep
    from loractl.scheduler.submission.grid import points, read_grid

    from .submit import warn_of_data

    if seed is not None and trials is None:
        raise UsageError("--seed is for draws", "say how many to draw: --trials 20")
    if trials is not None and seed is None:
        seed = 0
    grid = read_grid(settings)
    _refuse(grid, early_stop)
    specs = _members(job_file, grid, points(grid, trials, seed or 0), early_stop)
    for spec in _with_different_data(specs):
        warn_of_data(spec, job_file)
    named = [_numbered(spec, number) for number, spec in enumerate(specs, 1)]
    rungs = RUNGS if early_stop else None
    if dry_run:
        drawn = "" if trials is None else f", drawn with seed {seed}"
        _print_members(named, grid, rungs, drawn, as_json)
        return
    from loractl.scheduler.session import open_session

    context, store = open_session()
    new = NewSweep(name=specs[0].name, user=context.user, varied=grid.given, rungs=rungs, trials=trials, seed=seed)
    view = store.sweep(store.submit_sweep(new, _submissions(named, context, store)))
    _print_queued(view, as_json)
    _warn_and_wake(view, named, context, store)
    if not as_json:
        click.echo(click.style(f"Follow it: loractl status --sweep {view.sweep_id}", dim=True), err=True)


def _refuse(grid: Grid, early_stop: bool) -> None:
    """Raises UsageError for a key that can't be varied, or not where members are compared on their way."""
    for key in grid.given:
        if key == "name":
            raise UsageError("--set name can't take several values", "members are called NAME-1, NAME-2, ... anyway")
        if early_stop and any(_overlap(key, other) for other in _OTHER_LOSSES):
            raise UsageError(
                f"--early-stop compares held-out losses, which jobs of another {key} do not have in common",
                f"leave out --early-stop, or make a sweep for each {key}",
            )


def _overlap(key: str, other: str) -> bool:
    """Whether one of two keys is the other, or a section that holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _members(path: Path, grid: Grid, chosen: Sequence[Point], early_stop: bool) -> list[JobSpec]:
    """The spec of each point. Raises SpecError with the problems of all of them, UsageError."""
    from loractl.common.job.file import load_spec

    problems: dict[str, SpecProblem] = {}
    specs: list[JobSpec] = []
    for point in chosen:
        try:
            specs.append(load_spec(path, [*grid.fixed, *(f"{key}={text}" for key, text in point.items())]))
        except SpecError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise SpecError(list(problems.values()))
    first: dict[str, Point] = {}
    for spec, point in zip(specs, chosen, strict=True):
        twin = first.setdefault(spec.model_dump_json(), point)
        if twin is not point:
            raise UsageError(f"{_told(twin)} and {_told(point)} are the same job", "leave one of the values out")
    return [_on_rungs(spec) for spec in specs] if early_stop else specs


def _told(point: Point) -> str:
    return ", ".join(f"{key}={text}" for key, text in point.items())


def _on_rungs(spec: JobSpec) -> JobSpec:
    """The member, evaluated at the rungs. Raises UsageError where its own eval_steps says otherwise."""
    from loractl.common.job.halving import RUNGS, meets_rungs

    every = spec.training.eval_steps
    if every is None:
        return spec.model_copy(update={"training": spec.training.model_copy(update={"eval_steps": RUNGS[0]})})
    if not meets_rungs(every, spec.training.max_steps):
        raise UsageError(
            f"--early-stop compares at 25 % and 50 % of the steps, training.eval_steps {every} does not evaluate there",
            "leave training.eval_steps out, or write a share like 0.25, 0.125 or 0.05",
        )
    return spec


def _numbered(spec: JobSpec, number: int) -> JobSpec:
    """The member under a name of its own: the sweep's and its number."""
    suffix = f"-{number}"
    return spec.model_copy(update={"name": f"{spec.name[: _NAME_LENGTH - len(suffix)]}{suffix}"})


def _with_different_data(specs: Sequence[JobSpec]) -> list[JobSpec]:
    """One member for each set of rows: data are checked once."""
    return list({(spec.dataset.model_dump_json(), spec.evaluation.regression): spec for spec in specs}.values())


def _submissions(specs: Sequence[JobSpec], context: Settings, store: Store) -> list[Submission]:
    """What is written of each member; a data set that several of them name is uploaded once."""
    from loractl.scheduler.submission.need import plan_job

    from .submit import store_data

    stored: dict[str, dict[str, Any]] = {}
    found = []
    for spec in specs:
        key = json.dumps(spec.data_sets(), sort_keys=True)
        if key not in stored:
            stored[key] = store_data(spec, context)
        found.append(plan_job(spec, context.user, stored[key], store))
    return found


def _print_queued(view: SweepView, as_json: bool) -> None:
    from loractl.scheduler.text import sweep as render_sweep
    from loractl.scheduler.text.screen import detect_screen

    if as_json:
        click.echo(json.dumps(render_sweep.fields(view)))
        return
    jobs = render_sweep.listed([member.job_id for member in view.members])
    losers = f"; losers stop after {render_sweep.shares(view.rungs)} of their steps" if view.rungs else ""
    click.echo(f"Sweep {view.sweep_id}: {len(view.members)} jobs ({jobs}) are queued{losers}.")
    if view.trials is not None:
        rows = [(str(member.job_id), member.settings) for member in view.members]
        click.echo("\n".join(["", f"Drawn with seed {view.seed}:", *render_sweep.points("JOB", rows, detect_screen())]))


def _print_members(
    specs: Sequence[JobSpec], grid: Grid, rungs: tuple[float, ...] | None, drawn: str, as_json: bool
) -> None:
    from loractl.common.job.sweep import setting
    from loractl.scheduler.text import sweep as render_sweep
    from loractl.scheduler.text.screen import detect_screen

    trees = [spec.model_dump(mode="json") for spec in specs]
    found = [
        (spec.name, {key: setting(tree, key) for key in grid.given}) for spec, tree in zip(specs, trees, strict=True)
    ]
    if as_json:
        members = [{"name": name, "settings": values} for name, values in found]
        specs_too = [{**member, "spec": tree} for member, tree in zip(members, trees, strict=True)]
        click.echo(json.dumps({"varied": grid.given, "rungs": rungs, "members": specs_too}))
        return
    click.echo("\n".join(render_sweep.points("NAME", found, detect_screen())))
    losers = f" Losers would stop after {render_sweep.shares(rungs)} of their steps." if rungs else ""
    click.echo(f"\n{len(specs)} jobs{drawn}; none is queued.{losers}")


def _warn_and_wake(view: SweepView, specs: Sequence[JobSpec], context: Settings, store: Store) -> None:
    """Say what would keep the largest member waiting, and wake whoever may take one."""
    from .submit import wake_for, warn_of_need

    jobs = store.jobs(sweep_id=view.sweep_id)[::-1]
    job, spec = max(zip(jobs, specs, strict=True), key=lambda pair: pair[0].vram_needed or 0)
    warn_of_need(job.job_id, spec, job.vram_needed, store)
    safe = f"Sweep {view.sweep_id} is safe in the database and starts"
    wake_for(sorted({job.vram_class for job in jobs}), context, safe)
