"""What a terminal can show, and the pieces that are drawn on it: tables, bars, times, text that fits.

Numbers stand right, states have a word as well as a colour, and a pipe gets the same text without escapes.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from loractl.common.text import clean_line, clean_text

_EIGHTHS = "▏▎▍▌▋▊▉█"
_SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What the output can show."""

    width: int
    unicode: bool
    color: bool

    def style(self, text: str, **style: Any) -> str:
        return click.style(text, **style) if self.color else text

    def dim(self, text: str) -> str:
        return self.style(text, dim=True)


def detect_screen() -> Screen:
    """The terminal's width and abilities; 80 columns and no colour in a pipe or with NO_COLOR."""
    tty = sys.stdout.isatty()
    width = shutil.get_terminal_size((80, 24)).columns if tty or "COLUMNS" in os.environ else 80
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return Screen(width=max(60, width), unicode=encoding.startswith("utf"), color=tty and "NO_COLOR" not in os.environ)


def bar(share: float, width: int, screen: Screen) -> str:
    """A progress bar of `width` columns, in eighths of a block where the terminal has them."""
    share = min(1.0, max(0.0, share))
    if not screen.unicode:
        full = int(share * width)
        return "#" * full + "." * (width - full)
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    blocks = "█" * full + (_EIGHTHS[rest - 1] if rest else "")
    return blocks + "·" * (width - len(blocks))


def sparkline(values: Sequence[float], width: int, screen: Screen) -> str:
    """The course of a value in `width` columns."""
    if not values or not screen.unicode:
        return ""
    step = max(1, len(values) / width)
    points = [values[int(n * step)] for n in range(min(width, len(values)))]
    low, high = min(points), max(points)
    span = (high - low) or 1.0
    return "".join(_SPARKS[int((v - low) / span * 7)] for v in points)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], screen: Screen, right: Sequence[str] = ()
) -> list[str]:
    """Lines of a table without borders; columns named in `right` are aligned right, the last one may be cut."""
    plain = [[click.unstyle(cell) for cell in row] for row in rows]
    widths = [max(len(h), *(len(row[n]) for row in plain)) if rows else len(h) for n, h in enumerate(headers)]

    def line(cells: Sequence[str], dimmed: bool = False) -> str:
        parts = []
        for n, cell in enumerate(cells):
            gap = " " * (widths[n] - len(click.unstyle(cell)))
            parts.append(gap + cell if headers[n] in right else cell + gap)
        text = "  ".join(parts).rstrip()
        return screen.dim(text) if dimmed else text

    return [line(headers, dimmed=True), *(line(row) for row in rows)]


def fit(text: str, width: int) -> str:
    """The plain text in at most `width` columns."""
    text = clean_line(text)
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def clock(moment: dt.datetime | None, now: dt.datetime) -> str:
    """HH:MM today, the weekday this week, else the date; local time."""
    if moment is None:
        return "–"
    local, today = moment.astimezone(), now.astimezone()
    if local.date() == today.date():
        return local.strftime("%H:%M")
    return local.strftime("%a %H:%M") if abs((local - today).days) < 6 else local.strftime("%d %b")


def block(text: str, screen: Screen, indent: int = 0) -> str:
    """Text of several lines, indented; control characters of a model's answer must not reach the terminal."""
    first, *rest = clean_text(text, keep="\n").splitlines() or [""]
    return "\n".join([first, *(" " * indent + line for line in rest)])
