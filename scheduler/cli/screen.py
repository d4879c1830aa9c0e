"""What a terminal can show, and the pieces that are drawn on it: tables, bars, text that fits, text drawn over itself.

Numbers are aligned right, states have a word as well as a colour, and a pipe gets the same text without escapes.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from loractl.common.errors import UsageError
from loractl.common.text import clean_line, clean_text

_EIGHTHS = "▏▎▍▌▋▊▉█"
_SPARKS = "▁▂▃▄▅▆▇█"

NAME_COLUMNS = 20
"""Columns of a card's name."""

LEAST_FIRST = 12
"""Columns that a wrapped first column keeps."""

ROOM_TO_WRAP = 24
"""Columns in which a wrapped sentence can still be read."""

_ASCII = str.maketrans({"–": "-", "…": "~", "→": ">", "±": "+-", "×": "x"})


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What the output can show."""

    width: int
    unicode: bool
    color: bool
    height: int | None = None  # lines; None: no terminal, or one that may scroll

    def style(self, text: str, **style: Any) -> str:
        return click.style(text, **style) if self.color else text

    def dim(self, text: str) -> str:
        return self.style(text, dim=True)


def detect_screen() -> Screen:
    """The terminal's size and abilities; 80 columns, no height and no colour in a pipe; no colour with NO_COLOR."""
    tty = sys.stdout.isatty()
    size = shutil.get_terminal_size((80, 24))
    width = size.columns if tty or "COLUMNS" in os.environ else 80
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return Screen(
        width=max(60, width),
        unicode=encoding.startswith("utf"),
        color=tty and "NO_COLOR" not in os.environ,
        height=size.lines if tty else None,
    )


def bar(share: float, width: int, screen: Screen) -> str:
    """A progress bar of `width` columns, in eighths of a block if the terminal has them."""
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
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    screen: Screen,
    right: Sequence[str] = (),
    *,
    wraps: bool = False,
) -> list[str]:
    """Lines of a table without borders; columns named in `right` are aligned right. `wraps`: on a narrow screen, the
    first column wraps, not at a no-break space; it has no colour."""
    if wraps and rows:
        rows = _first_wrapped(rows, headers, screen)
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


def _first_wrapped(rows: Sequence[Sequence[str]], headers: Sequence[str], screen: Screen) -> list[list[str]]:
    others = ([click.unstyle(cell) for cell in row[1:]] for row in [headers, *rows])
    room = max(LEAST_FIRST, screen.width - sum(max(map(len, cells)) + 2 for cells in zip(*others, strict=True)))
    wrapped_rows = []
    for first, *rest in rows:
        begins, *more = textwrap.wrap(first, room, subsequent_indent="  ", break_on_hyphens=False) or [""]
        wrapped_rows += [[begins, *rest], *([line, *("" for _ in rest)] for line in more)]
    return [[first.replace("\N{NO-BREAK SPACE}", " "), *rest] for first, *rest in wrapped_rows]


def fit(text: str, width: int) -> str:
    """The plain text in at most `width` columns."""
    text = clean_line(text)
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def block(text: str, indent: int = 0) -> str:
    """Text of several lines, indented; control characters of a model's answer must not reach the terminal."""
    first, *rest = clean_text(text, keep="\n").splitlines() or [""]
    return "\n".join([first, *(" " * indent + line for line in rest)])


def wrapped_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    colors: Sequence[str],
    screen: Screen,
    right: Sequence[str],
) -> list[str]:
    """A table with a coloured last column, which wraps on a narrow screen."""
    plain_rows = [[click.unstyle(cell) for cell in row] for row in rows]
    taken = sum(max([len(h), *(len(row[n]) for row in plain_rows)]) + 2 for n, h in enumerate(headers[:-1]))
    room = screen.width - taken
    indent = taken if room >= ROOM_TO_WRAP else 4  # with little room it goes below its row
    parts = []
    for row in rows:
        text = clean_line(row[-1])
        below = textwrap.wrap(text, screen.width - indent, break_on_hyphens=False)
        parts.append([text] if len(text) <= room else below if indent == taken else ["", *below])
    first = [[*row[:-1], screen.style(part[0], fg=c or None)] for row, part, c in zip(rows, parts, colors, strict=True)]
    header, *lines = table(headers, first, screen, right=right)
    shown = [header]
    for line, part, color in zip(lines, parts, colors, strict=True):
        shown += [line, *(" " * indent + screen.style(rest, fg=color or None) for rest in part[1:])]
    return shown


def wrapped(text: str, bold: str, screen: Screen) -> list[str]:
    """The text in lines that fit the screen; its first `bold` is shown bold, unless a line breaks it."""
    text = clean_line(text) if screen.unicode else clean_line(text).translate(_ASCII)
    lines = textwrap.wrap(text, screen.width, break_on_hyphens=False) or [""]
    bold = clean_line(bold)
    if bold:
        lines[0] = lines[0].replace(bold, screen.style(bold, bold=True), 1)
    return lines


def card_name(node: str) -> str:
    """The card's name, without its beginning if it is long: cards of one box differ at the end."""
    return node if len(node) <= NAME_COLUMNS else f"…{node[1 - NAME_COLUMNS :]}"


def joined(lines: Sequence[str], screen: Screen) -> str:
    """The lines as one text, in ASCII if the screen has no other letters."""
    text = "\n".join(lines)
    return text if screen.unicode else text.translate(_ASCII).encode("ascii", "replace").decode()


def number_columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The heads of those columns in which every cell is a number: they are aligned right."""
    return [head for n, head in enumerate(headers) if all(_is_number(row[n]) for row in rows)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


REDRAW_S = 2.0


class LiveText:
    """Text that is drawn over itself; the last text stays."""

    def __init__(self) -> None:
        self._lines = 0

    def draw(self, text: str, *, last: bool = False) -> None:
        """Draw it over the previous text. Lines that would scroll off the top, where no terminal can draw over them,
        are left out, except in the last text."""
        screen = detect_screen()
        shown = text if last or screen.height is None else in_height(text, screen, screen.height - 1)
        back = f"\x1b[{self._lines}A\r\x1b[J" if self._lines else ""
        click.echo(back + shown)
        self._lines = sum(_rows(line, screen) for line in shown.split("\n"))


def in_height(text: str, screen: Screen, height: int) -> str:
    """The text in at most that many rows: its beginning, how many lines are left out, and its last line, the next
    command."""
    lines = text.split("\n")
    if sum(_rows(line, screen) for line in lines) <= height:
        return text
    *body, end = lines
    kept: list[str] = []
    room = height - 1 - _rows(end, screen)
    for line in body:
        room -= _rows(line, screen)
        if room < 0:
            break
        kept.append(line)
    return "\n".join([*kept, screen.dim(f"+{len(body) - len(kept)} more lines"), end])


def _rows(line: str, screen: Screen) -> int:
    """The rows of a line: several if it is wider than the terminal."""
    return max(1, -(-len(click.unstyle(line)) // screen.width))


def redraw(draw: Callable[[], tuple[str, bool]]) -> None:
    """Draw a text again and again until it is the last one. Raises UsageError without a terminal.

    `draw`: the text, and whether anything may still change.
    """
    if not sys.stdout.isatty():
        raise UsageError("--watch without a JOB needs a terminal", "loractl status JOB --watch works in a pipe")
    live, goes_on = LiveText(), True
    while goes_on:
        text, goes_on = draw()
        live.draw(text, last=not goes_on)
        if goes_on:
            time.sleep(REDRAW_S)
