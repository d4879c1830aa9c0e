"""A long training yields its card to short ones, in real workers that are killed, or lose their database, meanwhile.

The trainer is that of the chaos suite: a step left out, or done twice, shows in its adapter. Decisions:
tests/unit/common/store/test_yielding.py.
"""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest
from sqlalchemy import create_engine, text

from loractl.common.artifacts import ArtifactStore
from loractl.common.job.status import Reason, Status
from loractl.common.store.tables import Job
from loractl.worker.protocol.marker import MARKER

from ..chaos.checker import examine
from ..chaos.trainer import TRAP
from ..quick_trainer import SLOW
from .quick_lab import LEASE_S, Lab, family, until

TRAINER = "tests.chaos.trainer"
STEPS = 400
LEAST_S = 1.0

UNSAVED = "--set=training.save_steps=100000"  # but by a stop


@pytest.fixture
def lab(lab: Lab) -> Lab:
    """In which a job yields after a second, twice as long after each stop."""
    lab.cli = lab.cli.with_environment(LORACTL_TRAINER=TRAINER, LORACTL_DEVICES="sim:8GiB")
    lab.store.lab.set("give-way", str(LEAST_S))
    return lab


def long_one(lab: Lab, steps: int = STEPS, name: str = "long") -> int:
    return lab.submit(UNSAVED, f"--set=labels.{SLOW}=very", name=name, steps=steps)


def short_one(lab: Lab, steps: int = 10) -> int:
    """Held: what a submit takes is the machine's affair."""
    job_id = lab.submit(name="short", steps=steps, user="bob")
    lab.store.jobs.hold(job_id, "bob", "")
    lab.change(job_id, work_left_s=1.0)
    return job_id


def comes(lab: Lab, *short: int) -> None:
    for job_id in short:
        lab.store.jobs.release(job_id, "bob")


def trains(job: Job) -> bool:
    return (job.step or 0) >= 20


def ended(job: Job) -> bool:
    return job.status is Status.SUCCEEDED


def all_end_well(lab: Lab, *jobs: int) -> None:
    """Each as its steps lead to, without a retry; and nobody yields for ever."""
    for job_id in jobs:
        job = lab.until(job_id, ended, seconds=120)
        assert examine(ArtifactStore(f"{(lab.home / 'artifacts').as_uri()}"), vars(job)) is None
        assert job.retries_used == 0 and job.preempted_by is None
        attempts = lab.store.attempts.of_job(job_id)
        ran_s = sum((one.ended_at - one.started_at).total_seconds() for one in attempts if one.ended_at is not None)
        assert job.stops == lab.reasons(job_id).count(Reason.PREEMPTED) <= math.log2(ran_s / LEAST_S + 1)


def trainers(worker: subprocess.Popen[str]) -> list[psutil.Process]:
    return [one for one in family(worker.pid) if TRAINER in one.cmdline()]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)  # first: else one would see another's end
    for process in processes:
        process.kill()


def asked(lab: Lab, long: int) -> Callable[[], object]:
    """Before its trainer has heard of it, or in its last step."""
    return lambda: (job := lab.store.jobs.get(long)).preempted_by or job.stops


def standing(lab: Lab, long: int) -> Callable[[], object]:
    """In the middle of the checkpoint's files."""
    (lab.home / TRAP).touch()
    return lambda: list(lab.home.glob(f"{TRAP}.*"))


def saved(lab: Lab, long: int) -> Callable[[], object]:
    """The checkpoint is whole on the box, and the card is not given back."""
    return lambda: list(lab.home.rglob(f"work/**/checkpoint-*/{MARKER}"))


MOMENTS = {"before the checkpoint": asked, "in the checkpoint": standing, "after the checkpoint": saved}


@pytest.mark.parametrize(
    ("moment", "whole"),
    [
        pytest.param(moment, whole, marks=[] if (moment, whole) == ("in the checkpoint", True) else pytest.mark.long)
        for moment in MOMENTS
        for whole in (True, False)
    ],
)
def test_a_kill_in_the_middle_of_giving_way_loses_neither_job(lab: Lab, moment: str, whole: bool) -> None:
    """Of the whole worker, or of the trainer alone."""
    short = short_one(lab)
    worker = lab.start(cold=True)
    long = long_one(lab)
    lab.until(long, trains)
    reached = MOMENTS[moment](lab, long)
    comes(lab, short)
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill([*family(worker.pid), psutil.Process(worker.pid)] if whole else trainers(worker))
    (lab.home / TRAP).unlink(missing_ok=True)
    for trap in lab.home.glob(f"{TRAP}.*"):
        trap.unlink()
    if whole:
        worker.wait()
        lab.start()
    all_end_well(lab, short, long)
    first = lab.reasons(long)[0]
    assert first in ({Reason.WORKER_LOST} if whole else {Reason.PREEMPTED, Reason.KILLED}), lab.reasons(long)
    if moment == "after the checkpoint":
        assert lab.store.attempts.of_job(long)[-1].resumed_from_step, "what was written is not trained again"


@pytest.mark.long
@pytest.mark.parametrize("lab", ["upgraded_postgres"], indirect=True)
@pytest.mark.parametrize("away_s", [1.0, 2.5 * LEASE_S])
def test_a_database_that_is_away_while_a_job_gives_way_costs_nothing(
    lab: Lab, postgres_server: str, away_s: float
) -> None:
    short = short_one(lab)
    lab.start(cold=True)
    long = long_one(lab)
    lab.until(long, trains)
    comes(lab, short)
    until(asked(lab, long))
    name = lab.engine.url.database
    server = postgres_server.replace("postgresql://", "postgresql+psycopg://", 1)
    admin = create_engine(server).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        put_out = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(put_out, {"name": name})
        time.sleep(away_s)
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    admin.dispose()
    lab.engine.dispose()
    all_end_well(lab, short, long)
    assert set(lab.reasons(long)) <= {Reason.PREEMPTED, Reason.OK} and lab.reasons(short) == [Reason.OK]


@pytest.mark.parametrize("lab", [pytest.param("upgraded_postgres", marks=pytest.mark.long)], indirect=True)
def test_of_two_boxes_on_postgresql_jobs_yield_and_go_on_on_either(lab: Lab) -> None:
    shorts = [short_one(lab, steps=40) for _ in range(3)]
    for box in ("heron", "owl"):
        lab.start(
            cold=True, LORACTL_HOST=box, LORACTL_HOME=str(lab.folder / box),
            LORACTL_ARTIFACTS_URL=(lab.home / "artifacts").as_uri(),
            LORACTL_REDIS_URL=f"redis+socket://{lab.home / 'run' / 'valkey.sock'}",
        )  # fmt: skip
    until(lambda: len(lab.store.cards.fleet().nodes) == 2)
    # on a busy machine the second one may begin long after the first
    longs = [long_one(lab, steps=3 * STEPS, name=f"long-{n}") for n in range(2)]
    for job_id in longs:
        lab.until(job_id, trains)
    comes(lab, *shorts)
    all_end_well(lab, *shorts, *longs)
    assert sum(lab.store.jobs.get(job_id).stops for job_id in longs) >= 1
    boxes = {one.node for job_id in longs for one in lab.store.attempts.of_job(job_id)}
    assert boxes == {"heron:0", "owl:0"}


@pytest.mark.long
@pytest.mark.parametrize("at_once", [True, False])
def test_twenty_short_jobs_stop_a_long_one_no_more_often_than_its_bound(lab: Lab, at_once: bool) -> None:
    shorts = [short_one(lab, steps=4) for _ in range(20)]
    lab.start()
    long = long_one(lab, steps=600)
    lab.until(long, trains)
    for short in shorts:
        comes(lab, short)
        if not at_once:
            lab.until(short, ended, seconds=180)
    all_end_well(lab, *shorts, long)
    assert lab.store.jobs.get(long).stops >= 1
