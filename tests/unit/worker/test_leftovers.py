"""What a killed supervisor's trainer has started is found by its card, and ended."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from loractl.common.settings import load_settings
from loractl.worker.device.occupancy import (
    CARD_VARIABLE,
    RANK_VARIABLE,
    RUN_VARIABLE,
    card_mark,
    end_leftovers,
    run_mark,
    runs_of,
)
from loractl.worker.node.health.leftovers import end_all

from ...waiting import until_shown


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """As a data loader's process may be: in its own session, without a parent left."""
    environment = {**os.environ, CARD_VARIABLE: "card", RUN_VARIABLE: run_mark("token")}
    process = subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True)
    until_shown(process.pid)
    yield process
    process.kill()
    process.wait()


def test_a_process_of_a_card_is_found_by_its_run_and_ended(sleeper: subprocess.Popen[bytes]) -> None:
    assert runs_of("card", CARD_VARIABLE) == {run_mark("token")}
    assert runs_of("another card", CARD_VARIABLE) == runs_of("card", RANK_VARIABLE) == set()
    assert end_leftovers(run_mark("token")) == []
    assert not psutil.pid_exists(sleeper.pid)


def test_a_node_ends_what_an_earlier_one_of_its_card_left_even_if_it_is_frozen(tmp_path: Path) -> None:
    """A frozen trainer does not notice that its pipe has closed."""
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    place: Any = SimpleNamespace(settings=settings, node="heron:0")
    marks = {CARD_VARIABLE: card_mark(settings, "heron:0"), RUN_VARIABLE: run_mark("token")}
    frozen = subprocess.Popen(["sleep", "60"], env={**os.environ, **marks}, start_new_session=True)
    until_shown(frozen.pid).suspend()
    end_all(place)
    assert not psutil.pid_exists(frozen.pid)


def test_the_same_card_of_another_home_is_another_one(tmp_path: Path) -> None:
    ours, theirs = (load_settings({"LORACTL_HOME": str(tmp_path / name)}) for name in ("ours", "theirs"))
    assert card_mark(ours, "heron:0") != card_mark(theirs, "heron:0")
