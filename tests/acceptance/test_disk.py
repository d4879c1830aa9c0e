"""A worker's disk is never filled by what a trainer prints. One that is full: tests/unit/worker/test_space.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loractl.common.store.database import make_engine
from loractl.common.store.store import Store
from loractl.worker.attempt.log import DATABASE_LIMIT, FILE_LIMIT, IS_LONG, LEFT_OUT

from ..conftest import Cli
from ..models import write_job

PRINTS = """
import sys

from tests.warm import client

for number in range(400_000):
    sys.stderr.write(f"line {number} " + "x" * 190 + "\\n")
sys.stderr.write("y" * 1_000_000)  # a line that does not end
sys.stderr.flush()
sys.exit(client("tests.warm", []))
"""
"""A trainer that prints more than anybody wants, and trains."""


@pytest.mark.long
def test_a_trainer_that_prints_without_end_fills_neither_disk_nor_database(
    cli: Cli, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "noisy.py").write_text(PRINTS)
    noisy = cli.with_environment(LORACTL_TRAINER="noisy", PYTHONPATH=f"{tmp_path}:{cli.environment['PYTHONPATH']}")
    noisy("submit", write_job(tmp_path, tiny_model), "--set=training.max_steps=3")
    noisy("worker", "--drain-when-idle", timeout=240)
    assert json.loads(cli("status", 1, "--json").stdout)["status"] == "succeeded"

    whole = (home / "artifacts" / "jobs" / "1" / "attempt-1" / "log.txt").read_text()
    assert "line 0 x" in whole[:100_000]
    assert FILE_LIMIT - 10**6 < len(whole) < FILE_LIMIT + 100
    assert whole.endswith("\n[the log file ends here: it has 64 MiB]\n")

    engine = make_engine(f"sqlite:///{home / 'loractl.db'}")
    kept = sum(len(chunk.text) for chunk in Store(engine).jobs.log(1))
    engine.dispose()
    assert kept <= DATABASE_LIMIT + len(IS_LONG) + 100 * len(LEFT_OUT)
    assert cli("logs", 1, "--tail", 2).stdout, "the last lines are there, whatever came before"
