"""A progress bar on a terminal, and nothing in a pipe: for what takes more than a moment."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

Report = Callable[[str, int, int], None]
"""What is done, how much of it, and of how much."""

SHOWN_AFTER_S = 1.0
REDRAWN_AFTER_S = 0.2


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
