"""A job's log, with a limit in each place: in the supervisor's memory, in its file and in the database."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from loractl.worker.clock import SYSTEM, NodeClock

MIB = 1 << 20

LOG_FILE = "log.txt"
"""The whole log of an attempt, next to its result and in it."""

FILE_LIMIT = 64 * MIB
"""Characters of an attempt's log file, which becomes an artifact."""

DATABASE_LIMIT = 2 * MIB
"""Characters of an attempt's log in the database: its beginning, and its last lines."""

CHUNK = 64 * 1024
"""Characters that one heartbeat carries; also of the last lines."""

END_LINES = 40
"""The last lines that say why a process ended: an abort's backtrace is below its cause."""

LEFT_OUT = "[lines are left out here]\n"
IS_LONG = f"[over {DATABASE_LIMIT // MIB} MiB of log: the last lines follow; all of it is stored with the result]\n"


class LogBook:
    """What the database gets of an attempt's log. Lines come from any thread; `take` and `written` from one."""

    def __init__(self, limit: int = DATABASE_LIMIT, clock: NodeClock = SYSTEM) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._new: deque[str] = deque()  # not taken yet; at most the newest CHUNK characters
        self._size = 0
        self._cut = False  # older lines had to go from _new
        self._taken = ""  # handed out, maybe not written yet
        self._room = limit - CHUNK  # the rest is kept free for the last lines
        self._full = False
        self.heard = self._clock.now()  # when the last line came
        self._end: deque[str] = deque(maxlen=END_LINES)

    def put(self, text: str) -> None:
        """Add the trainer's output."""
        with self._lock:
            self.heard = self._clock.now()
            self._end.append(text[:1000])
            self._new.append(text[-CHUNK:])
            self._size += len(self._new[-1])
            self._cut |= len(text) > CHUNK
            while self._size > CHUNK:
                self._size -= len(self._new.popleft())
                self._cut = True

    def take(self, *, last: bool = False) -> str:
        """The text to write now: new lines, after those taken before unless `written` was called.

        Once the limit is reached it is empty; with `last`, the last lines.
        """
        with self._lock:
            if self._full and not last:
                return self._taken
            text = self._taken + (LEFT_OUT if self._cut else "") + "".join(self._new)
            self._new, self._size, self._cut = deque(), 0, False
            if len(text) > CHUNK:
                text = LEFT_OUT + text[-CHUNK:]
            if not last and len(text) > self._room:
                self._full = True
                rest, text = text[self._room :], text[: self._room] + "\n" + IS_LONG
                self._new, self._size = deque([rest[-CHUNK:]]), min(len(rest), CHUNK)
            self._taken = text
            return text

    def end(self) -> list[str]:
        """The last lines, each with its beginning."""
        with self._lock:
            return list(self._end)

    def written(self) -> None:
        """The taken text has reached the database."""
        with self._lock:
            self._room -= len(self._taken)
            self._taken = ""


class LogFile:
    """A job's lines go into its file, up to `limit` characters in all, and into its book."""

    def __init__(self, file: IO[str], book: LogBook, limit: int = FILE_LIMIT) -> None:
        self._file, self._book, self._limit = file, book, limit
        self._room, self._whole = limit - file.tell(), True

    def put(self, line: str) -> None:
        """With a full disk or file it goes into the book alone."""
        self._book.put(line)
        if not self._whole:
            return
        try:
            if len(line) > self._room:
                self._whole = False
                line = f"\n[the log file ends here: it has {self._limit / MIB:.0f} MiB]\n"
            self._file.write(line)
            self._file.flush()
            self._room -= len(line)
        except OSError as error:
            self._whole = False
            self._book.put(f"[the log file ends here: {error.strerror}]\n")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """The file for a trainer's lines. Raises OSError if it can't be opened; data that a full disk refused is no error
    on close."""
    file = path.open("a", encoding="utf-8")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def append_line(path: Path, line: str) -> None:
    """Add a line to a log's file into which no trainer writes now, unless it is full. Raises OSError."""
    with path.open("a", encoding="utf-8") as file:
        if file.tell() + len(line) <= FILE_LIMIT:
            file.write(line)
