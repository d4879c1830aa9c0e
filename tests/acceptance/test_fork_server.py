"""A worker with its fork server, as a person starts it: the real stack, a job in a fork, and no orphan."""

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

from loractl.common.artifacts import WEIGHTS, attempt_prefix

from ..conftest import Cli
from ..models import write_job
from ..waiting import until_job


@pytest.mark.long
@pytest.mark.cold
def test_a_fork_trains_what_a_new_process_trains_and_a_killed_node_leaves_none(
    make_cli: Callable[..., Cli], home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cli, said = make_cli(LORACTL_FORK_SERVER="1"), []
    cli("status")
    worker = cli.start("worker")
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
        server = psutil.Process(number(r"the fork server is ready, process (\d+)"))
        loaded = {Path(region.path).name for region in server.memory_maps()}
        assert "libtorch_cpu.so" in loaded, "it has the stack in its memory"
        cli("submit", write_job(tmp_path, tiny_model))
        trainer = number(r"job 1: the trainer is a fork, process (\d+)")
        until_job(cli, 1, lambda job: job.status == "succeeded", seconds=240)
        assert server.is_running() and server.num_threads() == 1 and not psutil.pid_exists(trainer)
        server.kill()
        cli("submit", write_job(tmp_path, tiny_model))
        until_job(cli, 2, lambda job: job.status == "succeeded", seconds=240)
        assert not any("job 2: the trainer is a fork" in line for line in said)
        forked, fresh = (home / "artifacts" / attempt_prefix(job, 1) / WEIGHTS for job in (1, 2))
        assert forked.read_bytes() == fresh.read_bytes()
        until(lambda: sum("the fork server is ready" in line for line in said) == 2, "another server")
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
