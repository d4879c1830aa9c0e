"""Several boxes, one database: an outage, equal names."""

from __future__ import annotations

import datetime as dt
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import create_engine, make_url, select, text

from loractl.common.job.status import Status
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import FleetRound
from loractl.common.units import GIB

from ..conftest import Cli
from ..databases import UPGRADED, database
from ..unit.factories import node_state, submission
from .test_node import SLOW

LEASE_S = 6


@pytest.fixture
def fleet_url(postgres_server: str) -> Iterator[str]:
    with database(postgres_server, UPGRADED) as url:
        yield url


@pytest.mark.cold
def test_a_node_that_starts_in_an_outage_of_the_database_takes_no_living_job_over(
    make_cli: Callable[..., Cli], fleet_url: str, postgres_server: str
) -> None:
    cli = make_cli(LORACTL_DATABASE_URL=fleet_url, LORACTL_HOST="owl", LORACTL_LEASE=f"{LEASE_S}s")
    engine = make_engine(fleet_url)
    store = Store(engine, lease_s=LEASE_S)
    worker = cli.start("worker")
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
            (node,) = [p for p in psutil.Process(worker.pid).children() if "loractl.worker.node" in p.cmdline()]
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


@pytest.mark.cold
def test_a_copied_home_with_an_equal_name_takes_no_running_job(
    make_cli: Callable[..., Cli], home: Path, tmp_path: Path, upgraded_url: str
) -> None:
    (tmp_path / "slow_trainer.py").write_text(SLOW)
    shared = {
        "LORACTL_DATABASE_URL": upgraded_url, "LORACTL_HOST": "heron", "LORACTL_LEASE": f"{LEASE_S}s",
        "LORACTL_TRAINER": "slow_trainer", "PYTHONPATH": str(tmp_path), "LORACTL_REDIS_URL": "redis://127.0.0.1:1",
    }  # fmt: skip
    engine = make_engine(upgraded_url)
    store = Store(engine)
    job_id = store.jobs.submit(submission())
    workers = [make_cli(**shared).start("worker")]
    try:
        _until(lambda: store.jobs.get(job_id).status is Status.RUNNING)
        shutil.copytree(home / "run", tmp_path / "copy" / "run")
        workers.append(make_cli(**shared, LORACTL_HOME=str(tmp_path / "copy")).start("worker"))
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
