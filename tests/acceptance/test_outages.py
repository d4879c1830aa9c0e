"""What docs/reliability.md promises of services that are away, that refuse, or that speak another version.

Real workers with a quick trainer.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from redis import Redis
from sqlalchemy import Connection, create_engine, text

from loractl import __version__
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.memory.engine import ENGINE

from .quick_lab import LEASE_S, Lab, until


def test_all_of_redis_can_be_wiped_at_any_moment(lab: Lab, home: Path) -> None:
    """Before a worker reads the message, while a job runs, and with jobs behind it."""
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


def test_a_result_waits_for_the_store_in_storing_also_over_a_restart_of_the_worker(lab: Lab, home: Path) -> None:
    job_id = lab.submit()
    away = home / "artifacts" / "jobs"
    away.write_text("in the place of the folder: nothing can be stored")
    first = lab.start()
    lab.until(job_id, lambda job: job.stage is Stage.STORING)
    time.sleep(LEASE_S + 1)
    waiting = lab.store.job(job_id)
    assert (waiting.status, waiting.stage, waiting.attempt) == (Status.RUNNING, Stage.STORING, 1)
    assert "it is tried again" in lab.cli("show", job_id).stdout

    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 0
    assert lab.store.job(job_id).status is Status.QUEUED
    assert lab.reasons(job_id) == [Reason.DRAINED]
    lab.start()
    lab.until(job_id, lambda job: job.attempt == 2 and job.stage is Stage.STORING)
    away.unlink()
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1"], "it was trained once"
    assert "its result is taken over" in lab.cli("show", job_id).stdout
    told = re.findall(r"storing +(stores \d+ files, .*, and reads them back)", lab.cli("logs", job_id).stdout)
    assert len(told) == 2, "both attempts say what they store, and neither spoils the finished result"
    lab.cli("adapters", "pull", job_id, lab.folder / "pulled")


def test_a_finished_training_outlives_an_outage_that_is_longer_than_all_patience(lab: Lab, home: Path) -> None:
    job_id = lab.submit("--set=max_retries=0", "--set=training.save_steps=4")
    away = home / "artifacts" / "jobs"
    away.write_text("in the place of the folder: nothing can be stored")
    lab.start(LORACTL_STORE_PATIENCE="1s")
    for _ in range(2):
        lab.until(job_id, lambda job: job.not_before)
        lab.change(job_id, not_before=None)  # rather than wait
    failed = lab.until(job_id, lambda job: job.held)
    assert (failed.reason, failed.result_host) == (Reason.STORE_FAILED, "heron")
    assert "the artifact store failed it 3 times in a row" in (failed.message or "")
    history = " ".join(lab.cli("show", job_id).stdout.split())
    assert "loractl retry releases it; its finished result stays on heron" in history

    work = home / "work" / str(job_id)
    away.unlink()
    gc = json.loads(lab.cli("gc", "--json").stdout)
    assert gc["removed"] == [] and work.is_dir(), "it has not failed 30 days ago"
    kept = ["checkpoints", "log.txt", "ready.json", "result"]  # of one attempt, once the last one has cleaned up
    until(lambda: sorted(path.name for path in work.glob("attempt-*/*")) == kept)
    assert len(list(work.glob("attempt-*/checkpoints/*"))) <= 2, "what stays is bounded"

    other = {"LORACTL_HOST": "owl", "LORACTL_HOME": str(lab.folder / "owl")}
    lab.start(
        **other, LORACTL_DATABASE_URL=str(lab.engine.url), LORACTL_ARTIFACTS_URL=(home / "artifacts").as_uri(),
        LORACTL_REDIS_URL=f"redis+socket://{home / 'run' / 'valkey.sock'}",
    )  # fmt: skip
    until(lambda: any(node.host == "owl" for node in lab.store.nodes()))
    lab.cli("retry", job_id)
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1"], "it was trained once"
    assert [attempt.node for attempt in lab.store.attempts(job_id)] == ["heron:0"] * 4
    assert lab.store.job(job_id).result_host is None
    until(lambda: not work.exists())
    lab.cli("adapters", "pull", job_id, lab.folder / "pulled")


@pytest.mark.parametrize("lab", ["postgres_url"], indirect=True)
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
            beaten = lab.store.job(long).lease_expires_at
            lab.until(long, lambda job, before=beaten: job.lease_expires_at != before)
    lab.until(long, lambda job: job.status is Status.SUCCEEDED)
    lab.until(behind, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{long}.1", f"{behind}.1"], "the training went on, and nobody took its job"
    steps = [point.step for point in lab.store.metrics(long, "loss")]
    history = [event.text for event in lab.store.events(long)]
    assert steps == list(range(1, 221)), f"what was told meanwhile is written afterwards: {history}"

    nodes = _nodes_of(home)
    assert len(nodes) == 1
    with admin.connect() as server:
        _reconnect(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", str(name))
    admin.dispose()
    worker.kill()
    until(lambda: not any(node.is_running() for node in nodes))  # it runs nothing that it would have to wait for


def _nodes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "loractl.worker.node" in process.cmdline() and process.environ().get("LORACTL_HOME") == str(home):
                found.append(process)
    return found


def test_what_the_database_refuses_is_left_out_and_ends_no_training(lab: Lab) -> None:
    with lab.engine.begin() as connection:
        for table, when in (("metrics", "NEW.step = 4"), ("adapters", "1")):
            connection.exec_driver_sql(
                f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} WHEN {when} "
                f"BEGIN SELECT RAISE(ABORT, '{table} are full'); END"
            )
    job_id = lab.submit("--set=max_retries=0", steps=20)
    lab.start()
    failed = lab.until(job_id, lambda job: job.status.is_terminal)
    assert (failed.status, failed.reason) == (Status.FAILED, Reason.TRAINER_ERROR)
    kept = "its result is kept on this box, where the next attempt takes it over"
    assert failed.message == f"the database refused its end: adapters are full; {kept}"
    told = [event.text for event in lab.store.events(job_id) if event.kind == "database"]
    assert len(told) == 1 and told[0].endswith("which is left out: metrics are full")
    steps = [point.step for point in lab.store.metrics(job_id, "loss")]
    assert 4 not in steps and steps[-1] == 20, "the beats went on"

    with lab.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER no_adapters")
    lab.cli("retry", job_id)
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1"], "it was trained once"


def test_client_and_worker_of_different_versions_understand_each_other_or_say_why_not(lab: Lab) -> None:
    poison, newer, older, outdated = (lab.submit() for _ in range(4))
    lab.change(poison, methods=["x"])
    lab.change(outdated, engine=ENGINE - 1, vram_lora=1, planned={"lora": 1, "qlora": 1})
    spec = dict(lab.store.job(newer).spec)
    lab.change(newer, version="99.0.0", spec={**spec, "something_new": 1})
    added = {"preemptible", "lora_patience", "revision", "labels"}
    lab.change(older, version=None, spec={key: value for key, value in spec.items() if key not in added})

    lab.start()
    lab.until(older, lambda job: job.status is Status.SUCCEEDED)
    planned = lab.until(outdated, lambda job: job.status is Status.SUCCEEDED)
    assert (planned.engine, planned.vram_lora) == (ENGINE, lab.store.job(older).vram_lora), "planned for today's steps"
    left = lab.until(newer, lambda job: job.message)
    assert (left.status, left.attempt) == (Status.QUEUED, 0), "it is left to a newer worker"
    assert left.message == f"written by loractl 99.0.0, a worker with {__version__} can't read it"
    assert lab.until(poison, lambda job: job.status.is_terminal).reason is Reason.BAD_SPEC, "nobody's submit wrote it"
    for command in ("status", "why"):
        assert "99.0.0" in lab.cli(command, newer).stdout

    lab.change(newer, spec=spec, not_before=None)
    lab.until(newer, lambda job: job.status is Status.SUCCEEDED)
    with lab.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    refused = lab.cli("status", code=1).stderr
    assert "9999" in refused and "Hint: " in refused and "Traceback" not in refused


def _reconnect(server: Connection, change: str, name: str) -> None:
    """Change a database, and end what is connected to it."""
    server.execute(text(change))
    server.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"), {"n": name})
