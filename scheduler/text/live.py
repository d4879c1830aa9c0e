"""Text that is drawn over itself on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from loractl.common.errors import UsageError

from .screen import detect_screen

REDRAW_S = 2.0


class LiveText:
    """Text that is drawn over itself; the last one stays."""

    def __init__(self) -> None:
        self._lines = 0

    def draw(self, text: str) -> None:
        width = detect_screen().width
        back = f"\x1b[{self._lines}A\r\x1b[J" if self._lines else ""
        click.echo(back + text)
        # a line that is wider than the terminal takes several rows
        self._lines = sum(max(1, -(-len(click.unstyle(line)) // width)) for line in text.split("\n"))


def redraw(draw: Callable[[], tuple[str, bool]]) -> None:
    """Draw a text again and again until it is the last one. Raises UsageError without a terminal.

    `draw`: the text, and whether anything may still change.
    """
    if not sys.stdout.isatty():
        raise UsageError("--watch without a JOB needs a terminal", "loractl status JOB --watch works in a pipe")
    live, goes_on = LiveText(), True
    while goes_on:
        text, goes_on = draw()
        live.draw(text)
        if goes_on:
            time.sleep(REDRAW_S)
