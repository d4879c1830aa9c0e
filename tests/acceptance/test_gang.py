"""A job on two cards of a box, as a person has it: simulated cards, real trainings on the processor."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from loractl.common.job.status import Status
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_job
from ..waiting import until_job

TWO = ("--set=resources.cards=2", "--set=resources.parallel=sharded")
LASTING = ("--set=training.max_steps=100000", "--set=training.save_steps=2")


@pytest.fixture
def box(make_cli: Callable[..., Cli]) -> Iterator[Cli]:
    """A box with two cards, whose worker runs."""
    cli = make_cli(LORACTL_DEVICES="sim:8GiB,8GiB", LORACTL_HOST="heron")
    cli("status")
    worker = cli.start("worker")
    try:
        yield cli
    finally:
        worker.terminate()
        worker.communicate(timeout=60)


def store_of(cli: Cli) -> Store:
    return Store(connect(load_settings(cli.environment)))


@pytest.mark.long
def test_a_job_trains_on_two_cards(box: Cli, tiny_model: Path, tmp_path: Path) -> None:
    box("submit", write_job(tmp_path, tiny_model), *TWO)
    until_job(box, 1, lambda job: job.status is Status.SUCCEEDED, seconds=120)
    training = json.loads(box("report", 1, "--json").stdout)["training"]
    assert (training["cards"], training["parallel"]) == (2, "sharded")
    assert "sharded over 2 cards" in box("show", 1).stdout
    assert "[rank 1] " in box("logs", 1).stdout


@pytest.mark.long
def test_a_drain_of_either_card_gives_the_job_back_with_a_checkpoint(
    box: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    box("submit", write_job(tmp_path, tiny_model), *TWO, *LASTING)
    for card in ("heron:0", "heron:1"):
        until_job(box, 1, trains, seconds=120)
        box("drain", card, "--now", "--reason", "a fan")
        drained = until_job(box, 1, lambda job: job.status is Status.QUEUED, seconds=60)
        box("undrain", card)
        until_job(box, 1, lambda job, before=drained.attempt: trains(job) and job.attempt > before, seconds=120)
    attempts = store_of(box).attempts.of_job(1)
    assert [attempt.reason for attempt in attempts[:2]] == ["drained", "drained"]
    assert all(attempt.resumed_from_step for attempt in attempts[1:])
    box("cancel", 1)
    until_job(box, 1, lambda job: job.status is Status.CANCELLED, seconds=60)


@pytest.mark.cold
@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed_ends_the_attempt_and_the_next_goes_on(
    box: Cli, tiny_model: Path, tmp_path: Path, killed: int
) -> None:
    box("submit", write_job(tmp_path, tiny_model), *TWO, *LASTING)
    until_job(box, 1, lambda job: trains(job) and job.step > 4, seconds=180)
    ranks = sorted(ranks_of(box), key=lambda process: process.create_time())
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[killed].pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    print(f"both ranks had ended after {time.monotonic() - began:.1f} s")
    until_job(box, 1, lambda job: trains(job) and job.attempt == 2, seconds=180)
    first, second = store_of(box).attempts.of_job(1)
    assert first.reason == "killed" and second.resumed_from_step
    box("cancel", 1)
    until_job(box, 1, lambda job: job.status is Status.CANCELLED, seconds=60)
    assert not ranks_of(box)


def trains(job: Any) -> bool:
    return job.status is Status.RUNNING and job.stage is not None and (job.step or 0) > 2


def ranks_of(cli: Cli) -> list[psutil.Process]:
    """The trainers of this home's jobs that run."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("LORACTL_CARD", "").startswith(cli.environment["LORACTL_HOME"])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if ours and any("recipe.trainer" in word for word in process.cmdline()) and process.status() != "zombie":
            found.append(process)
    return found
