"""The wish to stop, as a file: what a person asked last and most urgently holds."""

from __future__ import annotations

from pathlib import Path

from loractl.worker.attempt.supervisor import Drain


def test_a_node_that_hears_of_the_first_ctrl_c_late_does_not_take_the_second_one_back(tmp_path: Path) -> None:
    asked, seen = Drain(tmp_path / "run" / "drain-0"), Drain(tmp_path / "run" / "drain-0")
    assert seen.wish is None
    asked.ask("now")
    seen.ask("checkpoint")
    assert asked.wish == seen.wish == "now"
    seen.clear()
    seen.ask("checkpoint")
    assert asked.wish == "checkpoint"
    asked.ask("now")
    assert seen.wish == "now"
