"""A log that nothing can make endless, and whose beginning and end are always there."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.worker.attempt.log import CHUNK, FILE_LIMIT, IS_LONG, LEFT_OUT, LogBook, LogFile, opened


def test_a_short_log_is_handed_on_whole_and_once() -> None:
    book = LogBook()
    book.put("a\n")
    assert book.take() == "a\n"
    book.written()
    assert book.take() == ""
    book.put("b\n")
    assert book.take(last=True) == "b\n"


def test_lines_that_could_not_be_written_are_sent_again_with_the_new_ones() -> None:
    book = LogBook()
    book.put("a\n")
    book.take()
    book.put("b\n")
    assert book.take() == "a\nb\n"
    book.written()
    assert book.take() == ""


def test_lines_that_come_faster_than_the_heartbeat_are_left_out_with_a_note() -> None:
    book = LogBook()
    for n in range(CHUNK):
        book.put(f"line {n}\n")
    text = book.take()
    assert text.startswith(LEFT_OUT) and text.endswith(f"line {CHUNK - 1}\n")
    assert len(text) <= CHUNK + len(LEFT_OUT)


def test_a_long_log_is_cut_with_a_line_that_says_so_and_its_last_lines_come_at_the_end() -> None:
    book, limit = LogBook(limit=3 * CHUNK), 3 * CHUNK
    written = ""
    for n in range(200):
        book.put(f"beat {n} " + "x" * 2000 + "\n")
        written += book.take()
        book.written()
    assert written.startswith("beat 0 ") and written.endswith(IS_LONG)
    assert "beat 199" not in written
    book.put("Traceback: what a person needs\n")
    last = book.take(last=True)
    assert "beat 199" in last and last.endswith("Traceback: what a person needs\n")
    assert len(written + last) <= limit + len(IS_LONG) + len(LEFT_OUT) + 1


def test_the_line_that_says_so_is_not_lost_while_the_database_is_away() -> None:
    book = LogBook(limit=CHUNK + 10)
    book.put("x" * 30)
    assert book.take().endswith(IS_LONG)
    assert book.take().endswith(IS_LONG), "not written yet"
    book.written()
    assert book.take() == ""


@given(st.lists(st.tuples(st.text(max_size=40), st.booleans(), st.booleans()), max_size=40), st.integers(0, 100))
def test_a_log_never_exceeds_its_limit(steps: list[tuple[str, bool, bool]], room: int) -> None:
    book, written = LogBook(limit=CHUNK + room), 0
    for text, take, through in steps:
        book.put(text)
        if take:
            taken = book.take()
            if through:
                book.written()
                written += len(taken)
    written += len(book.take(last=True))
    assert written <= CHUNK + room + len(IS_LONG) + len(LEFT_OUT) + 1


def read_log(pipe: IO[str], file: IO[str], book: LogBook, limit: int = FILE_LIMIT) -> None:
    """All that the pipe has, a piece at a time, as a trainer's supervisor does."""
    log = LogFile(file, book, limit)
    while line := pipe.readline(CHUNK):
        log.put(line)


def test_an_endless_print_fills_neither_the_file_nor_the_memory(tmp_path: Path) -> None:
    """A real process that prints 8 MiB, half of it one line, into a file that may have 1 MiB."""
    code = (
        "import sys; sys.stderr.write('y' * 2**22 + '\\n'); [sys.stderr.write('z' * 1000 + '\\n') for _ in range(4200)]"
    )
    path, book = tmp_path / "log.txt", LogBook()
    path.write_text("of the first trainer\n")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stderr is not None
    with path.open("a", encoding="utf-8") as file:
        read_log(process.stderr, file, book, limit=2**20)
    assert process.wait(30) == 0, "it was never kept waiting"
    text = path.read_text()
    assert text.startswith("of the first trainer\ny") and text.endswith("\n[the log file ends here: it has 1 MiB]\n")
    assert 2**20 - CHUNK < len(text) < 2**20 + 100
    assert book.take(last=True).endswith("z" * 1000 + "\n")


def test_the_log_goes_on_where_a_full_disk_ends_its_file() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    book = LogBook()
    read_log(io.StringIO("a\nb\n"), Full(), book)
    assert book.end() == ["a\n", "[the log file ends here: No space left on device]\n", "b\n"]


def test_closing_a_log_file_on_a_full_disk_fails_nothing() -> None:
    book = LogBook()
    with opened(Path("/dev/full")) as file:
        read_log(io.StringIO("a\n"), file, book)
    assert book.end()[0] == "a\n"


@pytest.mark.parametrize("limit", [0, 3])
def test_a_full_file_gets_only_the_closing_line(limit: int) -> None:
    file = io.StringIO()
    read_log(io.StringIO("abcd\nefgh\n"), file, LogBook(), limit=limit)
    assert file.getvalue() == "\n[the log file ends here: it has 0 MiB]\n"
