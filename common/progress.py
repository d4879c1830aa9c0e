"""Progress of what takes more than a moment: a bar on a terminal, or a line from time to time in a pipe, too."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from .units import duration

Report = Callable[[str, int, int], None]
"""What is done, how much of it, and of how much."""

SHOWN_AFTER_S = 1.0
REDRAWN_AFTER_S = 0.2


LINES_EVERY_S = 10.0
"""Between two lines in a pipe."""


@contextlib.contextmanager
def working(what: str, total: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Says on the stream (stderr) how much of it is done, also while nothing is reported: a line each few seconds, or
    one on a terminal, which is gone at the end. Takes how much is done."""
    stream, stopped, done, began = stream or sys.stderr, threading.Event(), 0, time.monotonic()
    drawn = stream.isatty()

    def take(count: int) -> None:
        nonlocal done
        done = count

    def say() -> None:
        while not stopped.wait(SHOWN_AFTER_S if drawn else LINES_EVERY_S):
            text = f"{what}: {done} of {total}, {duration(time.monotonic() - began)}"
            stream.write(f"\r\x1b[K{text}" if drawn else f"{text}\n")
            stream.flush()

    thread = threading.Thread(target=say, name="progress", daemon=True)
    thread.start()
    try:
        yield take
    finally:
        stopped.set()
        thread.join()
        if drawn and time.monotonic() - began > SHOWN_AFTER_S:
            stream.write("\r\x1b[K")
            stream.flush()


@contextlib.contextmanager
def progress_bar(stream: TextIO | None = None) -> Iterator[Report]:
    """Reports draw a line on the stream (stderr) if it is a terminal; the line is gone at the end."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield lambda what, done, total: None
        return
    bar = _Bar(stream)
    try:
        yield bar.report
    finally:
        bar.clear()


class _Bar:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._due = time.monotonic() + SHOWN_AFTER_S
        self._drawn = False

    def report(self, what: str, done: int, total: int) -> None:
        if time.monotonic() < self._due:
            return
        share = min(1.0, done / total) if total else 0.0
        room = max(10, min(40, shutil.get_terminal_size().columns - len(what) - 12))
        filled = round(share * room)
        self._stream.write(f"\r\x1b[K{what}  [{'#' * filled}{'-' * (room - filled)}] {share:4.0%}")
        self._stream.flush()
        self._drawn, self._due = True, time.monotonic() + REDRAWN_AFTER_S

    def clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
