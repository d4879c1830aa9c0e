"""A large data file is checked in little memory, and a person sees how far it is."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common import progress
from loractl.common.data.examples import IN_A_BLOCK, IN_MEMORY, Example, Examples, Turn
from loractl.common.data.inspection import check_examples
from loractl.scheduler.submit.data import check_data

from ...factories import spec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def example(number: int) -> Example:
    if number % 3 == 0:
        return Example(number=number, prompt="q", text=f"q{number}\ud800", label=None)
    said = (Turn(role="user", content=f"question {number % 1000}"), Turn(role="assistant", content="yes"))
    return Example(number=number, turns=said, label="l" if number % 5 else None)


@pytest.mark.parametrize("count", [3, 2 * IN_A_BLOCK + 7, 3 * IN_A_BLOCK])
@pytest.mark.parametrize("characters", [0, 3000, IN_MEMORY])
def test_many_examples_are_those_that_were_added_in_any_part_of_them(
    count: int, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loractl.common.data.examples.IN_MEMORY", characters)
    plain = [example(number) for number in range(count)]
    examples = Examples(plain)
    assert len(examples) == count and list(examples) == plain
    assert list(examples.digests) == [e.digest() for e in plain]
    assert (examples[0], examples[-1], examples[1:3]) == (plain[0], plain[-1], plain[1:3])
    odd = examples.part(range(1, count, 2))
    assert list(odd) == plain[1::2] and odd[-1] == plain[1::2][-1]
    again = odd.part(range(0, len(odd), 3))
    assert list(again) == plain[1::2][::3] and list(again.digests) == [e.digest() for e in again]
    with pytest.raises(IndexError):
        examples[count]


@given(st.lists(st.text(max_size=3), min_size=2, max_size=9))
def test_digests_sort_as_the_hashes_by_which_rows_are_held_out(texts: list[str]) -> None:
    rows = [Example(number=n, text=text) for n, text in enumerate(texts)]
    by_hash = sorted(rows, key=lambda row: (row.content_hash(), row.number))
    assert sorted(rows, key=lambda row: (row.digest(), row.number)) == by_hash


@pytest.mark.long
def test_a_file_is_checked_in_much_less_memory_than_it_has_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        for number in range(8_000):
            row = {"prompt": f"{number} " + "word " * 700, "completion": f" answer {number} " + "more " * 700}
            file.write(json.dumps(row) + "\n")
    heard: list[tuple[str, int, int]] = []
    tracemalloc.start()
    try:
        findings = check_data(spec(dataset={"path": str(path)}), lambda *told: heard.append(told))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [finding.kind for finding in findings] == ["trailing space"]
    assert peak < 2.2 * IN_MEMORY < path.stat().st_size / 3, f"{peak} bytes"
    assert {what for what, _, _ in heard} == {"Reading the data", "Looking at the rows"}
    assert all(0 <= done <= total for _, done, total in heard)


def test_findings_do_not_depend_on_where_the_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loractl.common.data.examples.IN_MEMORY", 1000)
    plain = [example(number % 700 + 1) for number in range(1000)]
    apart = Examples(plain)
    assert check_examples(apart, apart.part(range(50))) == check_examples(plain, plain[:50])


def test_a_bar_is_drawn_on_a_terminal_and_wiped_and_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    terminal, pipe = Terminal(), io.StringIO()
    with progress.progress_bar(terminal) as report:
        report("Reading the data", 1, 4)
    assert "Reading the data  [##########" in terminal.getvalue() and " 25%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    with progress.progress_bar(pipe) as report:
        report("Reading the data", 1, 4)
    assert pipe.getvalue() == ""
    monkeypatch.setattr(progress, "LINES_EVERY_S", 0.01)
    for stream, line in ((Terminal(), "\r\x1b[KRows: 3 of 7, 0 s"), (io.StringIO(), "Rows: 3 of 7, 0 s\n")):
        with progress.working("Rows", 7, stream) as done:
            done(3)
            while line not in stream.getvalue():  # though nothing more is reported
                time.sleep(0.001)
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 60.0)
    quick = Terminal()
    with progress.progress_bar(quick) as report:
        report("Reading the data", 1, 4)
    assert quick.getvalue() == "", "what is done in a moment needs no bar"
