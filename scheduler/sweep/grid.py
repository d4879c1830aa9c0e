"""The points of a sweep: which settings vary, and which of their combinations run."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loractl.common.errors import UsageError

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
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting} is not of the form KEY=VALUE,VALUE,...", _EXAMPLE)
        if key in seen:
            raise UsageError(f"--set {key} is given twice", f"write all its values in one: --set {key}=A,B,C")
        seen.add(key)
        axis = _axis(key, text.strip())
        if axis is None:
            fixed.append(setting)
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
        return list(_all_points(grid))
    if trials > MAX_MEMBERS:
        raise UsageError(f"--trials {trials}: a sweep has at most {MAX_MEMBERS} jobs", "draw fewer")
    if trials > size:
        raise UsageError(f"--trials {trials}: there are only {size:.0f} points", "draw fewer, or give more values")
    return _drawn(grid, trials, seed)


def _all_points(grid: Grid) -> Iterator[Point]:
    lists = [axis.texts for axis in grid.axes if isinstance(axis, Values)]
    for texts in itertools.product(*lists):
        yield {axis.key: text for axis, text in zip(grid.axes, texts, strict=True)}


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
