"""The file that `loractl predict -o` writes, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loractl.worker.commands.predict import write_outcomes
from loractl.worker.serving.prediction import Outcome


def _broken_off(after: int) -> Iterator[Outcome]:
    yield from (Outcome(row=n, label="good", probability=0.5) for n in range(1, after + 1))
    raise KeyboardInterrupt


def test_a_ctrl_c_says_which_rows_are_done_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_outcomes(_broken_off(2), 9, tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.part"
    assert f"Interrupted after 2 of 9 rows; {part} has them." in capsys.readouterr().err
    assert len(part.read_text().splitlines()) == 2 and not (tmp_path / "out.jsonl").exists()


def test_a_ctrl_c_before_the_first_row_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_outcomes(_broken_off(0), 9, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
