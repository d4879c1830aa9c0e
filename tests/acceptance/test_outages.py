"""What docs/reliability.md promises of services that are away: real ones, and real workers with a quick trainer.

What needs neither: tests/unit/worker/test_outages.py.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import Connection, Engine, create_engine, text

from loractl.common.errors import ExitCode
from loractl.common.job.status import Status
from loractl.common.queue.valkey import broker_url
from loractl.common.settings import load_settings
from loractl.common.store.schema import HEAD

from .quick_lab import LEASE_S, Lab, nodes_of, until


def test_all_of_redis_can_be_wiped_at_any_moment(lab: Lab, home: Path) -> None:
    """Before a worker reads the message, while a job runs, and with jobs behind it."""
    broker_url(load_settings({"LORACTL_HOME": str(home)}))  # as a worker that was killed leaves it
    jobs = [lab.submit() for _ in range(3)]
    queue = Redis(unix_socket_path=str(home / "run" / "valkey.sock"))
    assert queue.dbsize() > 0, "there were messages"
    queue.flushall()
    lab.start()
    lab.until(jobs[0], lambda job: job.step)
    queue.flushall()
    for job_id in jobs:
        lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1" for job_id in jobs]
    assert sorted(row["job_id"] for row in json.loads(lab.cli("status", "-a", "--json").stdout)) == jobs


@pytest.mark.parametrize("lab", ["upgraded_postgres"], indirect=True)
def test_a_database_that_is_away_or_only_reads_for_longer_than_a_lease_costs_nothing(
    lab: Lab, home: Path, postgres_server: str
) -> None:
    """First nothing answers; then a failover has left a server that refuses every write. At last nothing answers any
    more, and the worker is killed: its node must not stay for ever."""
    long, behind = lab.submit(steps=220), lab.submit()
    worker = lab.start()
    lab.until(long, lambda job: job.step)
    name = lab.engine.url.database
    admin = create_engine(postgres_server.replace("postgresql://", "postgresql+psycopg://", 1)).execution_options(
        isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as server:
        for change, back in (
            ("ALLOW_CONNECTIONS false", "ALLOW_CONNECTIONS true"),
            ("SET default_transaction_read_only = on", "RESET default_transaction_read_only"),
        ):
            _reconnect(server, f"ALTER DATABASE {name} {change}", str(name))
            told = lab.cli("submit", lab.folder / "job.yaml", code=4).stderr
            assert told.startswith("Error: the database")
            time.sleep(1.4 * LEASE_S)
            _reconnect(server, f"ALTER DATABASE {name} {back}", str(name))
            beaten = lab.store.jobs.get(long).lease_expires_at
            lab.until(long, lambda job, before=beaten: job.lease_expires_at != before)
    lab.until(long, lambda job: job.status is Status.SUCCEEDED)
    lab.until(behind, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{long}.1", f"{behind}.1"], "the training went on, and nobody took its job"
    steps = [point.step for point in lab.store.jobs.metrics(long, "loss")]
    history = [event.text for event in lab.store.jobs.events(long)]
    assert steps == list(range(1, 221)), f"what was told meanwhile is written afterwards: {history}"

    nodes = nodes_of(home)
    assert len(nodes) == 1
    with admin.connect() as server:
        _reconnect(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", str(name))
    admin.dispose()
    worker.kill()
    until(lambda: not any(node.is_running() for node in nodes))  # it runs nothing that it would have to wait for


@pytest.mark.parametrize("lab", ["upgraded_postgres"], indirect=True)
def test_a_worker_whose_database_stays_away_ends_at_its_first_sigterm_and_saves_its_job(
    lab: Lab, home: Path, postgres_server: str
) -> None:
    job_id = lab.submit("--set=training.save_steps=10", steps=150)
    worker = lab.start()
    lab.until(job_id, lambda job: job.has_checkpoint)
    name = str(lab.engine.url.database)
    admin = create_engine(postgres_server.replace("postgresql://", "postgresql+psycopg://", 1)).execution_options(
        isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as server:
        _reconnect(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", name)
        worker.send_signal(signal.SIGTERM)
        told, _ = worker.communicate(timeout=60)
        assert worker.returncode == ExitCode.UNREACHABLE, told
        assert f"job {job_id}: the database is away" in told and "Traceback" not in told and not nodes_of(home), told
        _reconnect(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true", name)
    admin.dispose()
    lab.start()
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1", f"{job_id}.2"]
    assert (lab.store.attempts.of_job(job_id)[1].resumed_from_step or 0) >= 10


@pytest.mark.parametrize(
    "lab", [None, pytest.param("upgraded_postgres", marks=pytest.mark.long)], indirect=True, ids=["sqlite", "postgres"]
)
def test_a_worker_whose_tables_go_on_says_so_saves_its_job_and_ends(lab: Lab, home: Path) -> None:
    job_id = lab.submit("--set=training.save_steps=10", steps=150)
    worker = lab.start()
    lab.until(job_id, lambda job: job.has_checkpoint)
    _change(lab.engine, NEWER)
    told, _ = worker.communicate(timeout=60)
    assert worker.returncode == ExitCode.FAILED and not nodes_of(home), told
    sentence = f"the database is at revision 9999, this loractl needs revision {HEAD}"
    assert f"{sentence}: heron:0 claims nothing more, and ends once its jobs have saved a checkpoint" in told
    assert "Hint: upgrade loractl on this machine, then start it again" in told and "Traceback" not in told, told

    _change(lab.engine, SAME)
    lab.start()
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1", f"{job_id}.2"]
    assert (lab.store.attempts.of_job(job_id)[1].resumed_from_step or 0) >= 10


NEWER = ("ALTER TABLE jobs RENAME COLUMN loss TO last_loss", "UPDATE alembic_version SET version_num = '9999'")
SAME = ("ALTER TABLE jobs RENAME COLUMN last_loss TO loss", f"UPDATE alembic_version SET version_num = '{HEAD}'")


def _change(engine: Engine, tables: tuple[str, ...]) -> None:
    with engine.begin() as connection:
        for step in tables:
            connection.exec_driver_sql(step)


def _reconnect(server: Connection, change: str, name: str) -> None:
    """Change a database, and end what is connected to it."""
    server.execute(text(change))
    server.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"), {"n": name})
