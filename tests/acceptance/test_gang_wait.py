"""A job that one card can't hold waits for two of a box, as a person sees it: simulated cards, real trainings."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from loractl.common.job.status import Status
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB

from ..conftest import Cli
from ..models import write_job
from ..waiting import until_job

LARGE = ("--set=dataset.max_length=131072", "--set=training.per_device_train_batch_size=66")
"""About 40 GiB by the plan that submit makes, for rows of max_length. They are short: it trains within seconds."""

LASTING = (
    "--set=training.max_steps=15000",
    "--set=training.save_steps=1000",
    "--set=training.logging_steps=1000",
    "--set=resources.exclusive=true",
)
"""Longer than the test, and on a slow machine too less than the hour for which a card stays idle for such a job."""


@dataclass
class Box:
    """A box with two cards of 24 GiB and a worker, and what its people do."""

    cli: Cli
    model: Path
    folder: Path
    small: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = connect(load_settings(self.cli.environment))
        self.store = Store(self.engine)

    def submit(self, name: str, user: str, *options: str) -> int:
        file = write_job(self.folder, self.model, name=name)
        return int(self.cli.with_environment(LORACTL_USER=user)("submit", file, *options).stdout.split()[1])

    def why(self, job_id: int) -> dict[str, Any]:
        return dict(json.loads(self.cli("why", job_id, "--json").stdout))

    def answers(self, command: str, key: str) -> dict[Any, Any]:
        return {row[key]: row for row in json.loads(self.cli(command, "--json").stdout)}

    def older(self, job_id: int, seconds: float) -> None:
        """As if it had been submitted earlier: no test waits for half an hour."""
        at = self.store.job(job_id).submitted_at - dt.timedelta(seconds=seconds)
        with Session(self.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == job_id).values(submitted_at=at))

    def stream(self, until: Callable[[], object], seconds: float = 60) -> None:
        """Submit small jobs, each of which would fit at once, so that one waits all the time."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self.cli("status", "-a").stdout
            if not any(self.store.job(job_id).status is Status.QUEUED for job_id in self.small[-1:]):
                self.small.append(self.submit("small", f"user{len(self.small) % 3}"))
            time.sleep(0.05)

    def began(self) -> dict[int, dt.datetime]:
        """The small jobs that have started, and when."""
        jobs = [self.store.job(job_id) for job_id in self.small]
        return {job.job_id: job.started_at for job in jobs if job.started_at is not None}


@pytest.fixture
def box(make_cli: Callable[..., Cli], tiny_model: Path, tmp_path: Path) -> Iterator[Box]:
    cli = make_cli(LORACTL_DEVICES="sim:24GiB,24GiB", LORACTL_HOST="heron", LORACTL_LEASE="6s")
    cli("status")
    worker, found = cli.start("worker", warm_start=True), Box(cli, tiny_model, tmp_path)
    try:
        yield found
    finally:
        found.engine.dispose()
        worker.terminate()
        worker.communicate(timeout=60)


def test_a_job_for_two_cards_says_what_it_waits_for_and_is_not_passed_for_ever(box: Box) -> None:
    busy = box.submit("busy", "bob", *LASTING)
    until_job(box.cli, busy, lambda job: job.eta_seconds)
    large = box.submit("large", "ada", *LARGE)
    assert 39 * GIB < (box.store.job(large).vram_lora or 0) < 41 * GIB
    lacks = f"waits for a second card of 20.7 GiB on heron when {busy} ends"
    assert box.why(large)["sentence"] == lacks
    assert lacks in box.answers("status", "job_id")[large]["message"]

    # for half an hour small jobs may pass it, and the sentence stays true
    box.stream(lambda: len(box.began()) >= 3)
    both = (f"waits for 2 cards of 20.7 GiB on heron when {busy} and {job_id} end" for job_id in box.small)
    assert box.why(large)["sentence"] in {lacks, *both}
    box.older(large, RESERVE_AFTER_S)
    since = time.monotonic()

    # now the card that gets free is kept for it
    for job_id in box.small:
        until_job(box.cli, job_id, lambda job: job.status is Status.SUCCEEDED or kept_from(job, large, box))
    passed, later = len(box.began()), time.monotonic() + 2
    box.stream(lambda: time.monotonic() > later)
    assert len(box.began()) == passed
    assert box.why(large)["sentence"] == f"{lacks} (kept for it)"
    (idle,) = [node for node, seen in box.answers("gpus", "node").items() if not seen["jobs"]]
    waiting = box.why(box.small[-1])
    assert waiting["word"] == "kept"
    assert f"{idle} is kept for {large}" in waiting["sentence"]

    # the busy one ends, and both cards are its
    box.cli.with_environment(LORACTL_USER="bob")("cancel", busy)
    cancelled = time.monotonic()
    job = until_job(box.cli, large, lambda job: job.status is Status.RUNNING)
    print(f"it started {time.monotonic() - cancelled:.1f} s after the job on the second card was cancelled")
    print(f"{passed} small jobs passed it, none in the {time.monotonic() - since:.1f} s after its half hour")
    ended = box.store.job(busy).ended_at
    assert ended is not None and job.started_at is not None and ended <= job.started_at
    assert len(box.began()) == passed
    cards = box.answers("gpus", "node")
    assert [[j["job_id"] for j in seen["jobs"]] for seen in cards.values()] == [[large], [large]]
    until_job(box.cli, large, lambda job: job.status is Status.SUCCEEDED, seconds=120)
    training = json.loads(box.cli("report", large, "--json").stdout)["training"]
    assert (training["cards"], training["parallel"]) == (2, "sharded")
    until_job(box.cli, box.small[-1], lambda job: job.status is Status.SUCCEEDED)


def kept_from(job: Job, large: int, box: Box) -> bool:
    """Whether the job waits, and a card stands idle for the large one."""
    reserved = [d.reserved for d in box.store.fleet().decisions if d.reserved is not None]
    return job.status is Status.QUEUED and any(kept.job.job_id == large for kept in reserved)
