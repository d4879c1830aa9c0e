"""The log of a node or a worker whose terminal nobody reads, for a while or for ever."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from loractl.worker.node import terminal
from loractl.worker.node.terminal import LogHandler, Terminal


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A page of what nobody has read yet, from which to read, and the stream that writes there."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(write, "w") as stream:
        yield read, stream
        os.close(read)


def log_of(stream: TextIO, form: str | None = None) -> tuple[logging.Logger, LogHandler]:
    logger, handler = logging.Logger("node"), LogHandler(Terminal(stream), form)
    logger.addHandler(handler)
    return logger, handler


def read_until(read: int, end: str) -> list[str]:
    said = b""
    while not said.endswith(f"{end}\n".encode()):
        said += os.read(read, 65536)
    return said.decode().splitlines()


def test_a_terminal_that_nobody_reads_holds_up_no_thread_and_is_told_later_what_it_missed(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-S: supervisors that waited lost their leases, and the watchdog could end nothing."""
    monkeypatch.setattr(terminal, "FLUSH_S", 0.05)
    monkeypatch.setattr(terminal, "MOST_LINES", 300)
    read, stream = pipe
    logger, handler = log_of(stream)
    for number in range(1000):
        logger.warning("step %s of 1000", number)
    handler.flush()  # at the end of the process, which must not wait for a reader either
    lines = read_until(read, "since nobody read them")
    kept = len(lines) - 1
    assert 300 <= kept < 1000
    assert lines == [
        *(f"step {number} of 1000" for number in range(kept)),
        f"{1000 - kept} lines were dropped here, since nobody read them",
    ]
    logger.warning("and on")
    assert read_until(read, "and on") == ["and on"]


def test_a_line_is_clean_and_one_that_can_t_be_written_is_reported(pipe: tuple[int, TextIO]) -> None:
    read, stream = pipe
    logger, handler = log_of(stream)
    logger.warning("%d jobs", "three")
    logger.warning("%s", "postgresql://ada:secret@db/lab \x1b[2J")
    handler.flush()
    *report, clean = os.read(read, 4096).decode().splitlines()
    assert __file__ in report[0] and report[-1].startswith("TypeError: ")
    assert clean == "postgresql://ada:***@db/lab \N{REPLACEMENT CHARACTER}[2J"


def test_lines_that_nobody_can_ever_read_are_dropped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node whose worker was killed, or that began without standard error."""
    told, (away, write) = io.StringIO(), os.pipe()
    monkeypatch.setattr(sys, "stderr", None)
    without = Terminal()
    monkeypatch.setattr(sys, "stderr", told)
    os.close(away)
    with os.fdopen(write, "w") as unread:
        closed = Terminal(unread)
        for one in (closed, without):
            one.say("the database is away")
            one.flush()
    closed.say("the worker is gone")
    closed.flush()
    assert told.getvalue() == ""


END = """
import logging, sys
from loractl.worker.node.terminal import LogHandler, Terminal
logging.basicConfig(handlers=[LogHandler(Terminal(), "%(levelname)s %(message)s")])
for number in range(50):
    logging.warning("line %s, Universit\\u00e4t", number)
sys.exit(3)
"""


def test_the_last_lines_are_out_when_a_process_ends() -> None:
    latin = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", END], env=latin, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3
    assert ended.stderr.splitlines() == [f"WARNING line {number}, Universit\\xe4t" for number in range(50)]
