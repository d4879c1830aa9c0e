"""A worker that stops by itself, or on notice: when, and what it leaves behind."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from loractl.common.errors import ExitCode, UsageError
from loractl.common.job.status import Reason, Status
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB
from loractl.worker.attempt.workplace import STOP_SHARE
from loractl.worker.commands.worker import GRACE_S, Window, read_window
from loractl.worker.device.devices import SimulatedDevice
from loractl.worker.node import box
from loractl.worker.node.box import Box
from loractl.worker.node.monitor import NodeOptions

from ...held_lab import HeldLab
from ..factories import NOON, node_state, submission
from .test_box import run
from .test_lifecycle import UNSAVED, deaf

GANG = ("--set=dataset.max_length=131072", "--set=training.per_device_train_batch_size=66")
"""More than a card of 24 GiB has."""


def at(hour: int, minute: int = 0) -> dt.datetime:
    return dt.datetime(2026, 1, 14, hour, minute).astimezone()


@pytest.mark.parametrize(
    ("until", "lasts_s", "slurm", "ends", "said_by"),
    [
        ("18:00", None, None, at(18), "--until"),
        ("11:00", None, None, at(11) + dt.timedelta(days=1), "--until"),
        ("2026-01-14T18:30", None, None, at(18, 30), "--until"),
        (None, 7200.0, None, at(14), "--for"),
        (None, None, at(16), at(16), "SLURM_JOB_END_TIME"),
        ("18:00", 7200.0, at(13), at(13), "SLURM_JOB_END_TIME"),
        ("13:00", 7200.0, at(16), at(13), "--until"),
    ],
)
def test_the_earliest_end_holds(
    until: str | None, lasts_s: float | None, slurm: dt.datetime | None, ends: dt.datetime, said_by: str
) -> None:
    environment = {} if slurm is None else {"SLURM_JOB_END_TIME": str(int(slurm.timestamp()))}
    window = read_window(until, lasts_s, None, environment, at(12))
    assert window == Window(ends=ends, said_by=said_by, grace_s=GRACE_S)
    assert window.stops == ends - dt.timedelta(seconds=GRACE_S)


def test_without_an_end_a_worker_stays() -> None:
    assert read_window(None, None, 20.0, {}, NOON) is None


@pytest.mark.parametrize(
    ("given", "slurm", "said"),
    [
        (("soon", None, None), None, "--until: 'soon' is neither a duration nor a time"),
        ((None, 120.0, None), None, "--for: only 2 min are left, but a stop may take 3 min"),
        ((None, None, None), "tomorrow", "SLURM_JOB_END_TIME is not a time in seconds since 1970: 'tomorrow'"),
        ((None, None, None), "1000000000", "SLURM_JOB_END_TIME: that time has passed"),
    ],
)
def test_an_end_that_leaves_no_time_is_refused(
    given: tuple[str | None, float | None, float | None], slurm: str | None, said: str
) -> None:
    with pytest.raises(UsageError) as told:
        read_window(*given, {} if slurm is None else {"SLURM_JOB_END_TIME": slurm}, NOON)
    assert told.value.sentence == said
    assert told.value.hint


def options(held: HeldLab, seconds: float, grace_s: float = 60.0) -> NodeOptions:
    """Of a worker that begins to stop in so long."""
    return NodeOptions(until=held.time().timestamp() + seconds, window_s=seconds, grace_s=grace_s)


def test_a_job_that_is_longer_than_its_window_ends_in_the_next_one_on_another_disk(held: HeldLab) -> None:
    first = held.start(options=options(held, 8), LORACTL_HOST="n1", LORACTL_HOME=str(held.folder / "n1"))
    held.submit(UNSAVED, steps=250)  # 12.5 s
    held.until(1, lambda job: (job.step or 0) >= 100)
    assert ", until " in held.cli("gpus")
    held.clock.sleep(held.store.cards.fleet().cards["n1:0"].left_s or 0)
    held.stop(first)  # as the worker does then
    job = held.store.jobs.get(1)
    assert (job.status, job.retries_used, held.reasons(1)) == (Status.QUEUED, 0, [Reason.DRAINED])
    assert job.has_checkpoint, "the next box has another disk"
    assert (job.checkpoint_s or 0) > 7, "it was stored as the worker stopped"
    held.start(options=options(held, 60), LORACTL_HOST="n2", LORACTL_HOME=str(held.folder / "n2"))
    held.until(1, lambda job: job.status is Status.SUCCEEDED)
    assert (held.store.attempts.of_job(1)[1].resumed_from_step or 0) >= 100


def test_a_job_on_two_cards_goes_back_with_its_checkpoint_too(held: HeldLab) -> None:
    places = held.start(options=options(held, 20), LORACTL_DEVICES="sim:24GiB,24GiB")
    held.submit(*GANG, UNSAVED, steps=1000)
    held.until(1, lambda job: (job.step or 0) >= 20)
    assert len(held.store.cards.fleet().cards_of(1)) == 2
    held.stop(places)
    job = held.store.jobs.get(1)
    assert (job.status, job.retries_used, job.has_checkpoint) == (Status.QUEUED, 0, True)


def test_a_trainer_that_does_not_stop_leaves_time_to_give_its_job_back(held: HeldLab) -> None:
    (place,) = held.start(deaf, options(held, 20, grace_s=30.0), LORACTL_LEASE="60s")
    held.submit(steps=1000)
    held.until(1, lambda job: (job.step or 0) >= 5)
    began = held.clock.now()
    held.stop([place])
    assert STOP_SHARE * 30 <= held.clock.now() - began < 30
    assert (held.alive, held.reasons(1)) == (0, [Reason.DRAINED])
    assert held.store.jobs.get(1).retries_used == 0


Worker = Callable[..., Box]


@pytest.fixture
def worker(tmp_path: Path, upgraded_home: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker of one device with a shell script for its node: $1 gets what it was told."""

    def make(script: str, **more: Any) -> Box:
        popen = subprocess.Popen

        def node(command: list[str], **how: Any) -> subprocess.Popen[str]:
            (tmp_path / "options").write_text(command[-1])
            process = popen(["sh", "-c", script, "sh", str(tmp_path / "told")], **how)
            while not (tmp_path / "told.begun").exists():
                assert process.poll() is None
            return process

        monkeypatch.setattr(box.subprocess, "Popen", node)
        settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
        (settings.home / "run").mkdir(parents=True)
        device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
        return Box(settings, Store(connect(settings)), [device], {}, **more)

    return make


STOPS = 'trap "echo term >> $1; exit 0" TERM; echo > "$1.begun"; while :; do sleep 0.01; done'

DEAF = 'trap "" TERM; echo > "$1.begun"; read order; echo "$order" > "$1"'


def in_seconds(seconds: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds - 1)


def test_a_worker_stops_before_its_end_and_says_why(
    worker: Worker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(worker(STOPS, stops=in_seconds(1.1), grace_s=1.0), drain_when_idle=False) == ExitCode.OK
    assert (tmp_path / "told").read_text() == "term\n"
    assert "the worker's time is over" in capfd.readouterr().err


def test_a_node_that_does_not_stop_in_the_grace_is_stopped_at_once(worker: Worker, tmp_path: Path) -> None:
    assert run(worker(DEAF, stops=in_seconds(0.2), grace_s=0.2), drain_when_idle=False) == ExitCode.OK
    assert (tmp_path / "told").read_text() == "now\n"


def test_a_notice_stops_after_a_checkpoint_however_often_it_comes(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends it to all of a step, and a shell hands it on: a second one is not a second Ctrl-C."""
    made = worker(STOPS, grace_s=30.0)
    monkeypatch.setattr(box.Terminal, "say", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    began = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    began.start()
    assert run(made, drain_when_idle=False) == ExitCode.OK
    assert (tmp_path / "told").read_text() == "term\n"


def test_a_worker_with_an_end_is_idle_if_it_has_no_time_for_any_waiting_job(
    worker: Worker, upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it wait for jobs of other boxes: it would hold its allocation for them."""
    store = Store(connect(load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})))
    store.cards.see(node_state("other:0", total=8 * GIB, max_jobs=1))
    store.jobs.submit(submission(lora=4, qlora=None, method="lora"))
    assert store.attempts.claim("other:0") is not None
    made = worker(STOPS, stops=in_seconds(3600), grace_s=1.0)
    monkeypatch.setattr(box.time, "sleep", lambda _: store.cards.see(node_state("heron:0", total=8 * GIB)))
    assert run(made, drain_when_idle=True) == ExitCode.OK


def test_jobs_that_such_a_worker_had_no_time_for_wait_for_one_that_stays_longer(
    worker: Worker, upgraded_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(connect(load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})))
    job_id = store.jobs.submit(submission(lora=4, qlora=None, method="lora"))
    with Session(store.engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id == job_id).values(checkpoint_s=7200.0))
    made = worker(STOPS, stops=in_seconds(3600), grace_s=1.0)
    monkeypatch.setattr(box.time, "sleep", lambda _: store.cards.see(node_state("heron:0", total=8 * GIB)))
    assert run(made, drain_when_idle=True) == ExitCode.OK
    said = "No job that fits this box is left: job 1 waits for another box, or for a worker that stays longer."
    assert capfd.readouterr().err.splitlines()[-1] == said
