"""What happens to a running job when people or accidents interfere, on real processes."""

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

from loractl.common.settings import TRAINER

from .. import warm
from ..conftest import Cli
from ..models import write_job
from ..waiting import until_job

LONG = "--set=training.max_steps=100000"

SOON = {"LORACTL_LEASE": "6s"}
"""Where the time until a node looks is no subject: a beat every second, while a trainer takes a processor."""


@pytest.fixture
def worker(cli: Cli) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*, warm_start: bool = False, **environment: str) -> subprocess.Popen[str]:
        started.append(cli.with_environment(**environment).start("worker", warm_start=warm_start))
        return started[-1]

    yield start
    for process in started:
        for child in [*_tree(process.pid), process]:
            if child.poll() is None if isinstance(child, subprocess.Popen) else child.is_running():
                child.kill()
        process.wait()


def test_a_cancel_stops_a_running_trainer_within_ten_seconds(
    cli: Cli, worker: Callable, tiny_model: Path, tmp_path: Path
) -> None:
    cli("submit", write_job(tmp_path, tiny_model), LONG)
    worker()
    until_job(cli, 1, lambda job: (job.step or 0) >= 5)
    assert _trainers(cli)
    began = time.monotonic()
    said = cli("cancel", 1).stdout
    assert "nothing of its training is kept, so loractl retry 1 would begin anew." in said
    until_job(cli, 1, lambda job: job.status == "cancelled", seconds=15)
    took = time.monotonic() - began
    assert took < 12, f"the cancel took {took:.1f} s"
    assert not _trainers(cli)
    assert "already been cancelled" in cli("cancel", 1, code=1).stderr


def test_ctrl_c_saves_a_checkpoint_and_the_next_worker_goes_on_from_it(
    cli: Cli, worker: Callable, tiny_model: Path, tmp_path: Path
) -> None:
    cli("submit", write_job(tmp_path, tiny_model), "--set=training.max_steps=120", "--set=training.save_steps=100000")
    first = worker()
    until_job(cli, 1, lambda job: (job.step or 0) >= 5)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=90) == 0
    given_back = json.loads(cli("show", 1, "--json").stdout)
    assert given_back["status"] == "queued" and given_back["attempts"][0]["reason"] == "drained"

    cli("worker", "--drain-when-idle", timeout=240)
    done = json.loads(cli("show", 1, "--json").stdout)
    assert done["status"] == "succeeded"
    assert done["attempts"][1]["resumed_from_step"] >= 5
    assert done["step"] == 120


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


def test_a_job_over_its_time_limit_keeps_a_checkpoint_and_a_retry_with_more_goes_on_from_it(
    cli: Cli, worker: Callable, tiny_model: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path, tiny_model)
    cli("submit", job, LONG, "--set=training.save_steps=100000", "--set=resources.time_limit=1h")
    worker(warm_start=True, **SOON)
    until_job(cli, 1, lambda job: (job.step or 0) >= 5)
    told = cli("edit", 1, "--set=resources.time_limit=1s", "--set=labels.team=a").stdout
    assert told == 'Job 1 is changed: resources.time_limit 60 min -> 1 s, labels {} -> {"team": "a"}.\n'
    until_job(cli, 1, lambda job: job.status == "failed", seconds=60)
    over = json.loads(cli("status", 1, "--json").stdout)
    assert (over["reason"], over["labels"]) == ("timed_out", {"team": "a"})
    assert "loractl retry 1 --set resources.time_limit=2h goes on" in cli("status", 1).stdout
    refused = cli("retry", 1, "--set=training.learning_rate=0.1", code=2).stderr
    assert "loractl submit --like 1 --set training.learning_rate=..." in refused

    cli("retry", 1, "--set=resources.time_limit=2h")
    until_job(cli, 1, lambda job: job.attempt == 2 and (job.step or 0) > over["step"], seconds=60)
    second = json.loads(cli("show", 1, "--json").stdout)["attempts"][1]
    assert second["resumed_from_step"] >= over["step"], "no step was taken again"


def test_two_simulated_cards_run_two_jobs_at_once(
    make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path
) -> None:
    cli = make_cli(LORACTL_DEVICES="sim:8GiB,24GiB")
    for n in range(2):
        cli("submit", write_job(tmp_path, tiny_model, name=f"job-{n}"), "--set=training.max_steps=40")
    cli("worker", "--drain-when-idle", timeout=180)
    shown = [json.loads(cli("show", n, "--json").stdout) for n in (1, 2)]
    assert [job["status"] for job in shown] == ["succeeded", "succeeded"]
    assert {job["gpu"] for job in shown} == {"SIM-0", "SIM-1"}


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
