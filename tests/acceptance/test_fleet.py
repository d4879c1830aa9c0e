"""Several boxes, one database: an outage, equal names."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, select, text

from loractl.common.job.status import Reason, Status
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import FleetRound
from loractl.common.units import GIB

from ..conftest import Cli
from ..databases import UPGRADED, database
from ..models import write_job
from ..unit.factories import node_state, submission
from .quick_lab import nodes_of, quick_lab
from .test_node import SLOW

LEASE_S = 6


@pytest.fixture
def fleet_url(postgres_server: str) -> Iterator[str]:
    with database(postgres_server, UPGRADED) as url:
        yield url


def test_a_node_that_starts_in_an_outage_of_the_database_takes_no_living_job_over(
    make_cli: Callable[..., Cli], home: Path, fleet_url: str, postgres_server: str, tmp_path: Path
) -> None:
    cli = make_cli(
        LORACTL_DATABASE_URL=fleet_url, LORACTL_HOST="owl", LORACTL_LEASE=f"{LEASE_S}s",
        LORACTL_ARTIFACTS_URL=tmp_path.as_uri(),
    )  # fmt: skip
    engine = make_engine(fleet_url)
    store = Store(engine, lease_s=LEASE_S)
    worker = cli.start("worker", warm_start=True)
    admin = create_engine(make_url(postgres_server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    try:
        _until(lambda: _turn_at(store) is not None)
        store.cards.see(node_state("heron:0", total=8 * GIB))
        store.cards.drain("owl", "ada", "the job is heron's")
        store.jobs.submit(submission(lora=4))
        claim = store.attempts.claim("heron:0")
        assert isinstance(claim, Claim)
        with admin.connect() as server:
            server.execute(text(f"ALTER DATABASE {engine.url.database} ALLOW_CONNECTIONS false"))
            server.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                {"name": engine.url.database},
            )
            (node,) = nodes_of(home)
            node.kill()  # the worker starts it again
            time.sleep(LEASE_S + 1)
            server.execute(text(f"ALTER DATABASE {engine.url.database} ALLOW_CONNECTIONS true"))
        back = store.now()
        _until(lambda: (_turn_at(store) or back) > back)
        assert store.jobs.get(claim.job_id).attempt == 1 and store.attempts.beat(claim, Progress(step=1)).accepted
        _until(lambda: store.jobs.get(claim.job_id).status is Status.QUEUED, seconds=3 * LEASE_S + 20)
    finally:
        worker.send_signal(signal.SIGINT)
        worker.communicate(timeout=60)
        admin.dispose()
        engine.dispose()


def test_a_copied_home_with_an_equal_name_takes_no_running_job(
    make_cli: Callable[..., Cli], home: Path, tmp_path: Path, upgraded_url: str
) -> None:
    (tmp_path / "slow_trainer.py").write_text(SLOW)
    shared = {
        "LORACTL_DATABASE_URL": upgraded_url, "LORACTL_HOST": "heron", "LORACTL_LEASE": f"{LEASE_S}s",
        "LORACTL_TRAINER": "slow_trainer", "PYTHONPATH": str(tmp_path), "LORACTL_REDIS_URL": "redis://127.0.0.1:1",
        "LORACTL_ARTIFACTS_URL": tmp_path.as_uri(),
    }  # fmt: skip
    engine = make_engine(upgraded_url)
    store = Store(engine)
    job_id = store.jobs.submit(submission())
    workers = [make_cli(**shared).start("worker", warm_start=True)]
    try:
        _until(lambda: store.jobs.get(job_id).status is Status.RUNNING)
        shutil.copytree(home / "run", tmp_path / "copy" / "run")
        workers.append(make_cli(**shared, LORACTL_HOME=str(tmp_path / "copy")).start("worker", warm_start=True))
        assert workers[1].stdout is not None
        said = ""
        while "another box is named heron and serves its device 0" not in said:
            line = workers[1].stdout.readline()
            assert line, said
            said += line
        job = store.jobs.get(job_id)
        assert (job.status, job.attempt) == (Status.RUNNING, 1)
        assert [attempt.reason for attempt in store.attempts.of_job(job_id)] == [None]
    finally:
        for worker in reversed(workers):
            worker.send_signal(signal.SIGINT)
            worker.communicate(timeout=60)
        engine.dispose()


def _turn_at(store: Store) -> dt.datetime | None:
    """When a node last took its turn for the fleet."""
    with store.begin(read_only=True) as tx:
        return tx.session.scalar(select(FleetRound.at).where(FleetRound.name == "leases"))


def _until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.05)


@pytest.mark.long
def test_a_box_or_a_client_with_another_store_is_refused_before_it_takes_or_leaves_anything(
    make_cli: Callable[..., Cli], home: Path, tmp_path: Path, fleet_url: str
) -> None:
    owner = make_cli(LORACTL_DATABASE_URL=fleet_url)
    told = owner("db", "upgrade").stderr
    assert "does not know the lab's artifact store yet" in told and "loractl lab adopt-store" in told
    assert "this home's own, and the lab is on PostgreSQL" in owner("worker", "--drain-when-idle", code=4).stderr
    with quick_lab(make_cli, home, tmp_path, fleet_url) as lab:
        file, job_id, away = write_job(tmp_path, tmp_path, name="job"), lab.submit(), tmp_path / "mount" / "lab"
        lost = lab.cli.with_environment(LORACTL_HOME=str(tmp_path / "owl"), LORACTL_HOST="owl")
        for other, why in (
            (lost, "this machine has no such folder"),
            (lost.with_environment(LORACTL_ARTIFACTS_URL=away.as_uri()), "this machine has no such folder"),
            (lost.with_environment(LORACTL_ARTIFACTS_URL=tmp_path.as_uri()), "it has no mark"),
        ):
            for command in (["worker", "--drain-when-idle"], ["submit", file]):
                told = other(*command, code=4).stderr
                assert f"is not the lab's artifact store: {why}\nHint: set LORACTL_ARTIFACTS_URL" in told
            doctor = json.loads(other("doctor", "--json", "--check", "store", code=1).stdout)
            assert why in next(line for line in doctor["checks"] if line["check"] == "store")["sentence"]
        assert not away.exists() and not (tmp_path / "owl" / "artifacts").exists()
        assert len(lab.store.jobs.matching()) == 1
        worker = lab.start("--drain-when-idle")
        lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
        assert worker.wait(30) == 0 and lab.reasons(job_id) == [Reason.OK]

        moved = lab.cli.with_environment(LORACTL_ARTIFACTS_URL=(home / "moved").as_uri())
        assert "lacks the result of job 1" in _refused(moved, home / "moved")
        (home / "artifacts").rename(home / "moved")
        assert moved("lab", "adopt-store").stdout == f"{(home / 'moved').as_uri()} is the lab's artifact store.\n"
        moved("adapters", "pull", job_id, tmp_path / "pulled")


def _refused(cli: Cli, folder: Path) -> str:
    """What adopt-store says of an empty folder, as an unmounted share looks."""
    folder.mkdir()
    told = cli("lab", "adopt-store", code=1).stderr
    folder.rmdir()
    return told
