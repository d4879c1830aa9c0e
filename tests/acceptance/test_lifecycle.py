"""What signals do to a worker and its jobs, on real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.settings import TRAINER

from .. import warm
from ..conftest import Cli
from ..models import write_job
from ..waiting import until_job
from .quick_lab import Lab

LONG = "--set=training.max_steps=100000"


@pytest.fixture
def worker(cli: Cli) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        started.append(cli.start("worker"))
        return started[-1]

    yield start
    for process in started:
        for child in [*_tree(process.pid), process]:
            if child.poll() is None if isinstance(child, subprocess.Popen) else child.is_running():
                child.kill()
        process.wait()


def test_ctrl_c_saves_a_checkpoint_and_the_next_worker_goes_on_from_it(lab: Lab) -> None:
    """That the resumed training equals an undisturbed one: integration/test_resume_proof.py."""
    job_id = lab.submit("--set=training.save_steps=100000", steps=60)
    first = lab.start()
    lab.until(job_id, lambda job: (job.step or 0) >= 5)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=90) == 0
    assert (lab.store.jobs.get(job_id).status, lab.reasons(job_id)) == (Status.QUEUED, [Reason.DRAINED])
    second = lab.start("--drain-when-idle")
    done = lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert second.wait(timeout=30) == 0 and done.step == 60
    assert (lab.store.attempts.of_job(job_id)[1].resumed_from_step or 0) >= 5


@pytest.mark.long
def test_a_second_ctrl_c_stops_at_once_and_gives_the_job_back(
    cli: Cli, worker: Callable, tiny_model: Path, tmp_path: Path
) -> None:
    cli("submit", write_job(tmp_path, tiny_model), LONG)
    process = worker()
    until_job(cli, 1, lambda job: job.stage == "preparing")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert any("Ctrl-C again stops at once" in line for line in process.stdout), "what a person reads before the second"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (0, 130)
    job = json.loads(cli("status", 1, "--json").stdout)
    assert job["status"] == "queued"
    assert not _trainers(cli)


def test_a_killed_node_leaves_no_trainer_behind(cli: Cli, worker: Callable, tiny_model: Path, tmp_path: Path) -> None:
    cli("submit", write_job(tmp_path, tiny_model), LONG)
    process = worker()
    until_job(cli, 1, lambda job: (job.step or 0) >= 2)
    assert _trainers(cli)
    for child in _tree(process.pid):
        if child.status() != psutil.STATUS_ZOMBIE and "loractl.worker.node" in child.cmdline():
            child.send_signal(signal.SIGKILL)
    process.kill()
    deadline = time.monotonic() + 15
    while _trainers(cli) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _trainers(cli)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _trainers(cli: Cli) -> list[int]:
    """Trainer processes of this test's home that still run; other tests have theirs at the same time."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if (
            {TRAINER, warm.__name__} & set(process.info["cmdline"] or [])  # a forked one ends with who asked for it
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ):
            environment = process.environ() if process.uids().real == os.getuid() else {}
            if environment.get("LORACTL_HOME") == cli.environment["LORACTL_HOME"]:
                found.append(process.pid)
    return found
