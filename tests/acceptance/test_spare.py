"""A worker with a spare trainer, as a person starts it: the real stack, a job that takes it, and no orphan."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ..conftest import Cli
from ..models import write_job
from ..waiting import until_job


@pytest.mark.cold
def test_a_job_takes_the_imported_spare_and_a_killed_node_leaves_none(
    make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    cli, said = make_cli(), []
    cli("status")
    worker = cli.start("worker", "--spare")
    assert worker.stdout
    reader = threading.Thread(target=lambda: said.extend(iter(worker.stdout.readline, "")), daemon=True)
    reader.start()

    def until(holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 240
        while not holds():
            assert time.monotonic() < deadline and worker.poll() is None, f"no {what}: {said}"
            time.sleep(0.1)

    def number(pattern: str) -> int:
        """The number at the end of the worker's first line that says so."""
        found: list[re.Match[str]] = []
        until(lambda: found.extend(m for line in said.copy() if (m := re.search(pattern, line))) or found, pattern)
        return int(found[0][1])

    try:
        spare = number(r"a spare trainer is ready, process (\d+)")
        loaded = {Path(region.path).name for region in psutil.Process(spare).memory_maps()}
        assert "libtorch_cpu.so" in loaded, "it has the stack in its memory"
        cli("submit", write_job(tmp_path, tiny_model))
        assert number(r"job 1: takes the spare trainer, process (\d+)") == spare
        until_job(cli, 1, lambda job: job.status == "succeeded", seconds=240)
        assert not psutil.pid_exists(spare)
        log = cli("logs", 1).stdout
        assert "starts the trainer" in log and "taken" not in log
        until(lambda: any(_is_trainer(process, cli) for process in psutil.process_iter()), "another spare")
        for child in psutil.Process(worker.pid).children():
            if "loractl.worker.node" in child.cmdline():
                child.send_signal(signal.SIGKILL)
    finally:
        worker.kill()
        worker.wait()
    deadline = time.monotonic() + 30
    while left := [p for p in psutil.process_iter() if _is_trainer(p, cli)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _is_trainer(process: psutil.Process, cli: Cli) -> bool:
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        own = process.environ().get("LORACTL_HOME") == cli.environment["LORACTL_HOME"]
        return own and "loractl.worker.recipe.trainer" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
