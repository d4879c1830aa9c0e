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

    def number(pattern: str, count: int = 1) -> int:
        """The number at the end of the worker's line that says so for the COUNTth time."""
        deadline = time.monotonic() + 240
        while len(found := [m for line in said.copy() if (m := re.search(pattern, line))]) < count:
            assert time.monotonic() < deadline and worker.poll() is None, said
            time.sleep(0.05)
        return int(found[count - 1][1])

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
        number(r"a spare trainer is ready, process (\d+)", 2)
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
        return own and "loractl.worker.training.trainer" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
