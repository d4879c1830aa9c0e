"""What sweep would queue: which settings vary, which of their combinations run, and a member for each. Points that
can't be compared are refused.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.errors import SpecError, SpecProblem, UsageError
from loractl.common.job.spec import JobSpec
from loractl.common.job.sweep import RUNGS, NewSweep, meets_rungs, setting, unlike

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


Point = dict[str, str]
"""The value of each varied key, as YAML."""

MAX_MEMBERS = 200

DIGITS = 4
"""Significant digits of a drawn number: what is printed is what runs."""

_EXAMPLE = "like --set lora.r=8,16,32 --set training.learning_rate=1e-4,3e-4"
_RANGE = re.compile(r"(?P<kind>log|uniform|int):(?P<low>.+)\.\.(?P<high>.+)")
_TRIES_A_POINT = 1000


@dataclass(frozen=True, kw_only=True)
class Values:
    """A key with its values."""

    key: str
    texts: tuple[str, ...]

    @property
    def count(self) -> float:
        return len(self.texts)

    def draw(self, rng: random.Random) -> str:
        return self.texts[int(rng.random() * len(self.texts))]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A key with the interval from which its values are drawn: evenly, evenly on a logarithmic scale, or as whole
    numbers."""

    key: str
    kind: str  # uniform, log, int
    low: float
    high: float

    @property
    def count(self) -> float:
        return self.high - self.low + 1 if self.kind == "int" else math.inf

    def draw(self, rng: random.Random) -> str:
        share = rng.random()
        if self.kind == "int":
            return str(int(self.low + math.floor(share * self.count)))
        if self.kind == "log":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return f"{min(self.high, max(self.low, float(f'{value:.{DIGITS}g}'))):.{DIGITS}g}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep varies, and the overrides for all of its members."""

    axes: tuple[Values | Range, ...]
    fixed: tuple[str, ...]  # key=value
    given: dict[str, str]  # text by varied key


def read_grid(settings: Sequence[str]) -> Grid:
    """The axes that `KEY=VALUE,VALUE,...` and `KEY=KIND:LOW..HIGH` name; a single value applies to all.

    Raises UsageError.
    """
    axes: list[Values | Range] = []
    fixed: list[str] = []
    given: dict[str, str] = {}
    seen: set[str] = set()
    for override in settings:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {override} is not of the form KEY=VALUE,VALUE,...", _EXAMPLE)
        if key in seen:
            raise UsageError(f"--set {key} is given twice", f"write all its values in one: --set {key}=A,B,C")
        seen.add(key)
        axis = _axis(key, text.strip())
        if axis is None:
            fixed.append(override)
            continue
        axes.append(axis)
        given[key] = text.strip()
    if not axes:
        raise UsageError("a sweep needs a setting with several values", _EXAMPLE)
    return Grid(axes=tuple(axes), fixed=tuple(fixed), given=given)


def points(grid: Grid, trials: int | None, seed: int) -> list[Point]:
    """Every combination of the values, or `trials` different ones drawn with the seed.

    Raises UsageError: a range without trials, more than MAX_MEMBERS points, or more trials than there are points.
    """
    size = math.prod(axis.count for axis in grid.axes)
    if trials is None:
        for axis in grid.axes:
            if isinstance(axis, Range):
                raise UsageError(f"--set {axis.key} is a range, so its points are drawn", "say how many: --trials 20")
        if size > MAX_MEMBERS:
            raise UsageError(
                f"the grid has {size:.0f} points, a sweep at most {MAX_MEMBERS} jobs",
                f"draw some of them: --trials {MAX_MEMBERS // 10}",
            )
        lists = [axis.texts for axis in grid.axes if isinstance(axis, Values)]
        return [dict(zip(grid.given, texts, strict=True)) for texts in itertools.product(*lists)]
    if trials > MAX_MEMBERS:
        raise UsageError(f"--trials {trials}: a sweep has at most {MAX_MEMBERS} jobs", "draw fewer")
    if trials > size:
        raise UsageError(f"--trials {trials}: there are only {size:.0f} points", "draw fewer, or give more values")
    return _drawn(grid, trials, seed)


def _drawn(grid: Grid, trials: int, seed: int) -> list[Point]:
    """Different points; the first n of a seed are the same for every number of trials."""
    rng = random.Random(seed)  # noqa: S311  no secret hangs on it
    points: dict[tuple[str, ...], Point] = {}
    for _ in range(trials * _TRIES_A_POINT):
        point = {axis.key: axis.draw(rng) for axis in grid.axes}
        points.setdefault(tuple(point.values()), point)
        if len(points) == trials:
            return list(points.values())
    raise UsageError(f"the ranges are too narrow for {trials} different points", "widen them, or draw fewer")


def _axis(key: str, text: str) -> Values | Range | None:
    """None for a single value."""
    if (match := _RANGE.fullmatch(text)) is not None:
        return _range(key, text, match["kind"], match["low"], match["high"])
    texts = _split(text)
    if len(texts) == 1:
        return None
    if "" in texts:
        raise UsageError(f"--set {key}={text} has an empty value", _EXAMPLE)
    if twice := next((text for n, text in enumerate(texts) if text in texts[:n]), None):
        raise UsageError(f"--set {key} has the value {twice} twice", "leave one of them out")
    return Values(key=key, texts=tuple(texts))


def _range(key: str, text: str, kind: str, low_text: str, high_text: str) -> Range:
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UsageError(f"--set {key}={text} is not a range of numbers", f"like --set {key}={kind}:1..10")
    if low >= high:
        raise UsageError(f"--set {key}={text} begins above its end", f"like --set {key}={kind}:1..10")
    if kind == "log" and low <= 0:
        raise UsageError(f"--set {key}={text}: a logarithmic range begins above 0", f"like --set {key}=log:1e-5..1e-3")
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise UsageError(f"--set {key}={text} has ends that are not whole numbers", f"like --set {key}=int:4..64")
    return Range(key=key, kind=kind, low=low, high=high)


def _split(text: str) -> list[str]:
    """The values between commas outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
