"""What a worker and its nodes print on standard error, without ever waiting for it.

A terminal that nobody reads (Ctrl-S, the copy mode of screen, a pager) makes its writers wait. A supervisor that waited
would lose its lease, and a watchdog could not act.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import traceback
from typing import TextIO

from loractl.common.text import clean_text, without_passwords

MOST_LINES = 1000
"""Lines that wait for a reader; further ones are dropped."""

FLUSH_S = 2.0
"""Seconds that the end of a process waits for a reader."""


class Terminal:
    """Prints lines by a thread of its own. If nobody reads, it drops lines, and later says how many.

    It writes to the descriptor: a thread that is stuck in `sys.stderr` would hold its lock, and Python aborts a process
    that ends meanwhile.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: standard error if None."""
        self._stream: TextIO | None = stream or sys.stderr  # None: the process began with it closed
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may print, whatever its thread prints at that moment
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def say(self, line: str) -> None:
        """Print the line soon; returns at once."""
        with self._lock:
            if self._dropped or self._lines.qsize() >= MOST_LINES:  # none overtakes the count of those before it
                self._dropped += 1
                return
            self._lines.put(line)
            if self._thread is None:
                with contextlib.suppress(RuntimeError):  # no thread can be started: the next line tries again
                    thread = threading.Thread(target=self._print, name="terminal", daemon=True)
                    thread.start()
                    self._thread = thread

    def flush(self) -> None:
        """Wait until all lines are printed, but not long."""
        if self._thread is not None:
            printed = threading.Event()
            self._lines.put(printed)
            printed.wait(FLUSH_S)

    def _print(self) -> None:
        lost = 0
        while True:
            line = self._lines.get()
            if isinstance(line, str):
                lost += not self._write(line)
            if self._lines.empty():
                with self._lock:
                    lost, self._dropped = lost + self._dropped, 0
                if lost and self._write(f"{lost} lines were dropped here, since nobody read them"):
                    lost = 0
            if isinstance(line, threading.Event):
                line.set()

    def _write(self, line: str) -> bool:
        """False: nobody reads any more. A node outlives a worker that was killed."""
        if self._stream is None:
            return False
        rest = f"{line}\n".encode(self._stream.encoding, "backslashreplace")
        try:
            while rest:
                rest = rest[os.write(self._stream.fileno(), rest) :]
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False
        return True


class LogHandler(logging.Handler):
    """Logs to a terminal, without passwords of URLs, and without control characters: a model's error may contain ones
    that would steer the owner's terminal."""

    def __init__(self, terminal: Terminal, form: str | None = None) -> None:
        """`form`: a line's, as logging.Formatter takes it; None: only the message."""
        super().__init__()
        self._terminal = terminal
        self.setFormatter(_CleanFormatter(form, datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  what a library's object raises when it is printed
            self.handleError(record)
        else:
            self._terminal.say(line)

    def flush(self) -> None:
        """What logging calls at the end of the process."""
        self._terminal.flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Report a line that can't be formatted. Logging itself would print to `sys.stderr`, and wait."""
        error = f"{record.pathname}:{record.lineno}: this line can't be logged:\n{traceback.format_exc()}"
        self._terminal.say(_clean(error.rstrip()))


class _CleanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _clean(super().format(record))


def _clean(text: str) -> str:
    return clean_text(without_passwords(text))
