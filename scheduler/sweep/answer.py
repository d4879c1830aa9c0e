"""What sweep would queue: a member for each point that settings make of a job file. Points that can't be compared are
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.errors import SpecError, SpecProblem, UsageError
from loractl.common.job.sweep import RUNGS, NewSweep, meets_rungs, setting, unlike

from .grid import Grid, Point, points, read_grid

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


_NAME_LENGTH, _RUN_NAME_LENGTH = 63, 100


def member_specs(path: Path, grid: Grid, *, trials: int | None, seed: int, early_stop: bool) -> list[JobSpec]:
    """The spec of each point, under the job file's own name.

    Raises SpecError with the problems of all of them, UsageError.
    """
    if "name" in grid.given:
        raise UsageError("--set name can't take several values", "members are called NAME-1, NAME-2, ... anyway")
    if early_stop:
        _refuse_unlike(grid, None)  # before what the values have of other faults
    chosen = points(grid, trials, seed)
    specs = _specs(path, grid, chosen)
    if early_stop:
        _refuse_unlike(grid, specs[0].task_type)
    first: dict[str, Point] = {}
    for spec, point in zip(specs, chosen, strict=True):
        twin = first.setdefault(spec.model_dump_json(), point)
        if twin is not point:
            raise UsageError(f"{_told(twin)} and {_told(point)} are the same job", "leave one of the values out")
    return [_on_rungs(spec) for spec in specs] if early_stop else specs


def numbered(specs: Sequence[JobSpec]) -> list[JobSpec]:
    """The members under their own names: the job file's, and a number. A tracker's run gets the same number."""
    suffixes = [f"-{number}" for number in range(1, len(specs) + 1)]
    return [
        _named_run(spec.model_copy(update={"name": _numbered(spec.name, suffix, _NAME_LENGTH)}), suffix)
        for spec, suffix in zip(specs, suffixes, strict=True)
    ]


def _numbered(name: str, suffix: str, longest: int) -> str:
    """The name with the suffix, cut to what a job file takes."""
    return f"{name[: longest - len(suffix)]}{suffix}"


def _named_run(spec: JobSpec, suffix: str) -> JobSpec:
    tracker = spec.training.tracker
    if tracker.run_name is None:
        return spec
    named = tracker.model_copy(update={"run_name": _numbered(tracker.run_name, suffix, _RUN_NAME_LENGTH)})
    return spec.model_copy(update={"training": spec.training.model_copy(update={"tracker": named})})


def _refuse_unlike(grid: Grid, task: str | None) -> None:
    """Raises UsageError if the members can't be compared in mid-training."""
    if (key := unlike(grid.given, task)) is not None:
        raise UsageError(
            f"--early-stop compares held-out losses, which jobs of another {key} do not have in common",
            f"leave out --early-stop, or make a sweep for each {key}",
        )


def _specs(path: Path, grid: Grid, chosen: Sequence[Point]) -> list[JobSpec]:
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
    return specs


def _told(point: Point) -> str:
    return ", ".join(f"{key}={text}" for key, text in point.items())


def _on_rungs(spec: JobSpec) -> JobSpec:
    """The member, evaluated at the rungs. Raises UsageError if its own eval_steps contradicts that."""
    every = spec.training.eval_steps
    if every is None:
        return spec.model_copy(update={"training": spec.training.model_copy(update={"eval_steps": RUNGS[0]})})
    if not meets_rungs(every, spec.training.max_steps):
        raise UsageError(
            f"--early-stop compares at 25 % and 50 % of the steps, training.eval_steps {every} does not evaluate there",
            "leave training.eval_steps out, or write a share like 0.25, 0.125 or 0.05",
        )
    return spec


@dataclass(frozen=True, kw_only=True)
class SweepDraft(NewSweep):
    """What a sweep would queue."""

    specs: tuple[JobSpec, ...]  # of the members

    @property
    def points(self) -> list[tuple[str, dict[str, Any]]]:
        """Each member's name and its values of the varied keys."""
        trees = [spec.model_dump(mode="json") for spec in self.specs]
        return [(tree["name"], {key: setting(tree, key) for key in self.varied}) for tree in trees]

    def as_json(self) -> dict[str, Any]:
        """`varied`; `rungs`, null without early stops; `members`: each with `name`, `settings` and resolved `spec`."""
        members = [
            {"name": name, "settings": settings, "spec": spec.model_dump(mode="json")}
            for (name, settings), spec in zip(self.points, self.specs, strict=True)
        ]
        return {"varied": dict(self.varied), "rungs": self.rungs, "members": members}


def sweep_draft(
    job_file: Path, settings: Sequence[str], *, trials: int | None, seed: int | None, early_stop: bool
) -> SweepDraft:
    """The sweep that `KEY=VALUES` settings make from a job file. Raises SpecError, UsageError."""
    if seed is not None and trials is None:
        raise UsageError("--seed is for draws", "say how many to draw: --trials 20")
    grid = read_grid(settings)
    specs = member_specs(job_file, grid, trials=trials, seed=seed or 0, early_stop=early_stop)
    return SweepDraft(
        name=specs[0].name,
        varied=grid.given,
        rungs=RUNGS if early_stop else None,
        trials=trials,
        seed=None if trials is None else seed or 0,
        specs=tuple(numbered(specs)),
    )
