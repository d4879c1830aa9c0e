"""What a killed supervisor's trainer has started is found by its card, and ended."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loractl.common.settings import load_settings
from loractl.worker.device.occupancy import CARD_VARIABLE, RUN_VARIABLE, card_mark, end_leftovers, run_mark, runs_of


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """As a data loader's process may be: in its own session, without a parent left."""
    environment = {**os.environ, CARD_VARIABLE: "card", RUN_VARIABLE: run_mark("token")}
    process = subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_a_process_of_a_card_is_found_by_its_run_and_ended(sleeper: subprocess.Popen[bytes]) -> None:
    assert runs_of("card") == {run_mark("token")}
    assert runs_of("another card") == set()
    assert end_leftovers(run_mark("token")) == []
    assert not psutil.pid_exists(sleeper.pid)


def test_the_same_card_of_another_home_is_another_one(tmp_path: Path) -> None:
    ours, theirs = (load_settings({"LORACTL_HOME": str(tmp_path / name)}) for name in ("ours", "theirs"))
    assert card_mark(ours, "heron:0") != card_mark(theirs, "heron:0")
