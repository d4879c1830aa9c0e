"""Text that is drawn over itself on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from loractl.common.errors import UsageError

from .screen import Screen, detect_screen

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
