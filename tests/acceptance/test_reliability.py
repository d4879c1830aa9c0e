"""What docs/reliability.md promises, on real workers: frozen, killed, drained of their services, older and newer.

Where weights do not matter a quick trainer stands in for the real one: loractl's own pipes and protocol, without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from sqlalchemy import Connection, Engine, create_engine, text, update
from sqlalchemy.orm import Session

from loractl import __version__
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.worker.attempt.drain import Drain
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.devices import find_devices
from loractl.worker.device.occupancy import Watch
from loractl.worker.node.health import leftovers
from loractl.worker.storage.client import StoreClient

from ..conftest import Cli
from ..models import write_job
from ..unit.factories import node_state

ROOT = Path(__file__).parents[2]

LEASE_S = 3  # the shortest there is

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400,
}  # fmt: skip
"""A base model without weights: enough to plan by."""

QUICK = """
import os, queue, signal, time
from pathlib import Path

from loractl.common.job.status import Reason, Stage
from loractl.worker.protocol.marker import close_checkpoint
from loractl.worker.training.checkpoint import newest_checkpoint
from loractl.worker.protocol.messages import Ended, Note, Saved, StageChanged, Stepped
from loractl.worker.training.trainer import main


def run(order, orders, tell):
    job, steps = order.job_id, order.spec.training.max_steps
    with Path(os.environ["QUICK_STARTS"]).open("a") as starts:
        starts.write(f"{job}.{order.attempt}\\n")
    tell(StageChanged(job_id=job, stage=Stage.TRAINING))
    if "kills-its-worker" in order.spec.labels:
        os.kill(os.getppid(), signal.SIGKILL)

    def save(step):
        folder = Path(order.checkpoint_dir) / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer_state.json").write_text("{}")
        close_checkpoint(folder, step=step, finished=step == steps, belongs_to={"job": str(job)})
        tell(Saved(job_id=job, step=step, path=str(folder)))

    folders = [Path(order.checkpoint_dir), *map(Path, order.earlier_checkpoints)]
    found = newest_checkpoint(folders, {"job": str(job)})
    if found is not None:
        tell(Note(job_id=job, kind="resumed", text="resumed", resumed_from_step=found.step))
    for step in range(found.step + 1 if found else 1, steps + 1):
        time.sleep(0.05)
        tell(Stepped(job_id=job, step=step, total_steps=steps, metrics={"loss": 1 / step}))
        if step % order.spec.training.save_steps == 0:
            save(step)
        try:
            stop = orders.get_nowait()
        except queue.Empty:
            continue
        if stop.save:
            save(step)
        return Ended(job_id=job, reason=Reason.DRAINED, message="stopped")
    adapter = Path(order.output_dir) / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text(f"weights of attempt {order.attempt}")
    (adapter / "adapter_config.json").write_text("{}")
    (adapter.parent / "report.json").write_text("{}")
    return Ended(job_id=job, reason=Reason.OK, message="trained")


if __name__ == "__main__":
    main(run)
"""


@dataclass
class Lab:
    """A command line, the database behind it, and the workers that a test starts; each ends with it."""

    cli: Cli
    home: Path
    engine: Engine
    folder: Path
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return Store(self.engine)

    def submit(self, *options: str, name: str = "job", steps: int = 10, user: str = "ada") -> int:
        file = write_job(self.folder, self.folder, name=name)
        said = self.cli.with_environment(LORACTL_USER=user)(
            "submit", file, f"--set=training.max_steps={steps}", *options
        ).stdout
        number = re.match(r"Job (\d+) ", said)
        assert number is not None, said
        return int(number[1])

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        self.workers.append(self.cli.with_environment(**environment).start("worker", *options))
        return self.workers[-1]

    def start_box(self, name: str, **environment: str) -> subprocess.Popen[str]:
        """A box of its own, with one card."""
        return self.start(
            LORACTL_HOST=name,
            LORACTL_HOME=str(self.folder / name),
            LORACTL_DATABASE_URL=f"sqlite:///{self.home / 'loractl.db'}",
            LORACTL_REDIS_URL=f"redis+socket://{self.home / 'run' / 'valkey.sock'}",
            LORACTL_ARTIFACTS_URL=(self.home / "artifacts").as_uri(),
            **{"LORACTL_DEVICES": "sim:8GiB", **environment},
        )

    def until(self, job_id: int, holds: Callable[[Job], object], seconds: float = 60) -> Job:
        deadline = time.monotonic() + seconds
        while not holds(job := self.store.job(job_id)):
            assert time.monotonic() < deadline, f"after {seconds} s: {job.status} {job.stage} {job.step} {job.message}"
            time.sleep(0.1)
        return job

    def submit_until_drained(self, target: str, seconds: float = 150) -> list[int]:
        """Jobs of four users at a time, until a card or box is closed; all of them succeed. Returns their numbers."""
        jobs, deadline = list[int](), time.monotonic() + seconds
        while target not in self.store.drains():
            assert time.monotonic() < deadline, f"{len(jobs)} jobs, and {target} is not closed"
            new = [self.submit("--set=max_retries=0", user=user) for user in ("ada", "bob", "cyd", "dan")]
            for job_id in new:
                self.until(job_id, lambda job: job.status is Status.SUCCEEDED, seconds)
            jobs += new
        return jobs

    def change(self, job_id: int, **values: Any) -> None:
        with Session(self.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == job_id).values(**values))

    def reasons(self, job_id: int) -> list[Reason | None]:
        return [attempt.reason for attempt in self.store.attempts(job_id)]

    def starts(self) -> list[str]:
        """JOB.ATTEMPT of each quick trainer."""
        path = self.folder / "starts"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def lab(make_cli: Callable[..., Cli], home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """On SQLite, or on the database that the test names."""
    url = getattr(request, "param", None) and str(request.getfixturevalue(request.param))
    engine = make_engine(url or f"sqlite:///{home / 'loractl.db'}")
    upgrade(engine)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "quick_trainer.py").write_text(QUICK)
    cli = make_cli(
        LORACTL_HOST="heron", LORACTL_TRAINER="quick_trainer", PYTHONPATH=str(tmp_path / "quick"),
        QUICK_STARTS=str(tmp_path / "starts"), LORACTL_LEASE=f"{LEASE_S}s",
        **({"LORACTL_DATABASE_URL": url} if url else {}),
    )  # fmt: skip
    found = Lab(cli, home, engine, tmp_path)
    yield found
    for worker in found.workers:
        family = [*_family(worker.pid), psutil.Process(worker.pid)] if worker.poll() is None else []
        for process in family:
            if process.is_running():
                process.kill()
        worker.wait()
    engine.dispose()


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


def test_a_frozen_worker_that_wakes_up_after_its_lease_is_refused_and_its_files_are_not_listed(
    lab: Lab, home: Path, tmp_path: Path
) -> None:
    job_id = lab.submit("--set=training.save_steps=10", steps=80)
    first = lab.start()
    frozen_at = lab.until(job_id, lambda job: (job.step or 0) >= 20).step or 0
    frozen = _freeze(first.pid, home / "loractl.db")
    began = time.monotonic()
    lab.start_box("owl", LORACTL_DEVICES="cpu")
    lab.until(job_id, lambda job: job.attempt == 2 and job.step)
    noticed = time.monotonic() - began
    assert noticed < LEASE_S + 20, f"noticed within the lease, and a worker's start: {noticed:.0f} s"
    resumed = lab.store.attempts(job_id)[1].resumed_from_step or 0
    assert resumed >= frozen_at - 10, "at most one checkpoint interval is lost"
    for process in frozen:
        process.send_signal(signal.SIGCONT)
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.reasons(job_id) == [Reason.WORKER_LOST, Reason.OK]
    (adapter,) = lab.store.adapters()
    assert adapter.uri.endswith(f"jobs/{job_id}/attempt-2/adapter")
    lab.cli("adapters", "pull", job_id, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_text() == "weights of attempt 2"
    _gone(lambda: [p for p in _family(first.pid) if "quick_trainer" in p.cmdline()])


def test_a_job_that_kills_its_worker_three_times_is_held_with_the_reason(lab: Lab) -> None:
    poison = lab.submit("--set=labels.kills-its-worker=always", "--set=max_retries=0", name="poison")
    lab.start()
    held = lab.until(poison, lambda job: job.held, seconds=90)
    assert held.status is Status.QUEUED
    assert lab.reasons(poison) == [Reason.WORKER_LOST] * 3
    assert "its worker was lost 3 times in a row; it may be what kills them" in lab.cli("status", poison).stdout
    good = lab.submit()
    lab.until(good, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts().count(f"{poison}.4") == 0, "it is not tried again until a person releases it"


BAD_CARD = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.training.trainer import main


def run(order, orders, tell):
    return Ended(job_id=order.job_id, reason=Reason.GPU_ERROR, message="CUDA error: the card has fallen off the bus")


if __name__ == "__main__":
    main(run)
"""


def test_a_card_that_fails_every_job_fails_no_job_for_good_and_is_closed(lab: Lab, tmp_path: Path) -> None:
    """It is always idle, so that the rule would choose it again and again."""
    (tmp_path / "quick" / "bad_card.py").write_text(BAD_CARD)
    lab.start_box("owl", LORACTL_TRAINER="bad_card")
    lab.start(LORACTL_DEVICES="sim:8GiB")
    _until(lambda: len(lab.store.nodes()) == 2)
    for job_id in lab.submit_until_drained("owl:0"):
        assert lab.store.attempts(job_id)[-1].node == "heron:0"
    (order,) = lab.store.drains().values()
    assert (order.target, order.user) == ("owl:0", "loractl")
    said = " ".join(lab.cli.with_environment(COLUMNS="300")("gpus").stdout.split())
    assert "drained by loractl: gpu_error in jobs" in said
    assert "the last: CUDA error: the card has fallen off the bus; look at it, then loractl undrain owl:0" in said


def test_a_box_with_a_full_disk_fails_no_job_for_good_and_is_closed(lab: Lab, tmp_path: Path) -> None:
    work = tmp_path / "owl" / "work"
    work.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(work)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        owl = lab.start_box("owl")
        healthy = lab.start(LORACTL_DEVICES="sim:8GiB")
        _until(lambda: len(lab.store.nodes()) == 2)
        for job_id in lab.submit_until_drained("owl"):
            assert lab.store.job(job_id).retries_used == 0
        healthy.send_signal(signal.SIGINT)
        healthy.wait(timeout=60)
        last = lab.submit()
        said = " ".join(lab.cli.with_environment(COLUMNS="300")("why", last).stdout.split())
        assert "Reason: drained, owl:0 by loractl: disk_full in jobs" in said
        assert said.count("then loractl undrain owl") > 0
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)
    lab.cli("undrain", "owl")
    lab.until(last, lambda job: job.status is Status.SUCCEEDED)
    assert owl.poll() is None


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
    _until(lambda: sorted(path.name for path in work.glob("attempt-*/*")) == kept)
    assert len(list(work.glob("attempt-*/checkpoints/*"))) <= 2, "what stays is bounded"

    other = {"LORACTL_HOST": "owl", "LORACTL_HOME": str(lab.folder / "owl")}
    lab.start(
        **other, LORACTL_DATABASE_URL=str(lab.engine.url), LORACTL_ARTIFACTS_URL=(home / "artifacts").as_uri(),
        LORACTL_REDIS_URL=f"redis+socket://{home / 'run' / 'valkey.sock'}",
    )  # fmt: skip
    _until(lambda: any(node.host == "owl" for node in lab.store.nodes()))
    lab.cli("retry", job_id)
    lab.until(job_id, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{job_id}.1"], "it was trained once"
    assert [attempt.node for attempt in lab.store.attempts(job_id)] == ["heron:0"] * 4
    assert lab.store.job(job_id).result_host is None
    _until(lambda: not work.exists())
    lab.cli("adapters", "pull", job_id, lab.folder / "pulled")


@pytest.mark.parametrize("lab", ["postgres_url"], indirect=True)
def test_a_database_that_is_away_or_only_reads_for_longer_than_a_lease_costs_nothing(
    lab: Lab, postgres_server: str
) -> None:
    """First nothing answers; then a failover has left a server that refuses every write."""
    long, behind = lab.submit(steps=220), lab.submit()
    lab.start()
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
    admin.dispose()
    lab.until(long, lambda job: job.status is Status.SUCCEEDED)
    lab.until(behind, lambda job: job.status is Status.SUCCEEDED)
    assert lab.starts() == [f"{long}.1", f"{behind}.1"], "the training went on, and nobody took its job"
    steps = [point.step for point in lab.store.metrics(long, "loss")]
    history = [event.text for event in lab.store.events(long)]
    assert steps == list(range(1, 221)), f"what was told meanwhile is written afterwards: {history}"


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
    poison, newer, older = lab.submit(), lab.submit(), lab.submit()
    lab.change(poison, methods=["x"])
    spec = dict(lab.store.job(newer).spec)
    lab.change(newer, version="99.0.0", spec={**spec, "something_new": 1})
    added = {"preemptible", "lora_patience", "revision", "labels"}
    lab.change(older, version=None, spec={key: value for key, value in spec.items() if key not in added})

    lab.start()
    lab.until(older, lambda job: job.status is Status.SUCCEEDED)
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


def test_a_preemptible_job_gives_way_with_a_checkpoint_and_finishes_later(lab: Lab) -> None:
    lab.start(LORACTL_DEVICES="sim:8GiB")
    unsaved = "--set=training.save_steps=100000"
    low = lab.submit("--set=preemptible=true", unsaved, name="low", steps=120)
    lab.until(low, lambda job: (job.step or 0) >= 5)
    high = lab.submit("--set=priority=5", name="high")
    lab.until(high, lambda job: job.status is Status.SUCCEEDED)

    given = lab.store.attempts(low)[0]
    assert (given.reason, given.message) == (
        Reason.PREEMPTED,
        f"gave way to job {high}, which has a higher priority",
    )
    done = lab.until(low, lambda job: job.status is Status.SUCCEEDED)
    assert (done.attempt, done.retries_used) == (2, 0)
    assert (lab.store.attempts(low)[1].resumed_from_step or 0) >= 5
    assert f"asked to give way to job {high} (priority 5)" in lab.cli("show", low).stdout


def test_a_card_on_which_something_of_an_attempt_remains_is_closed_with_the_reason(
    lab: Lab, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no signal ends, as a process that hangs in its driver; here nothing is really left."""
    settings = load_settings(lab.cli.environment)
    (device,) = find_devices(settings)
    monkeypatch.setattr(leftovers, "end_leftovers", lambda run: [4711])
    monkeypatch.setattr(leftovers, "LEFT_S", 0.0)
    job_id = lab.submit()
    lab.store.see_node(node_state("heron:0", kind="cpu"))
    claim = lab.store.claim("heron:0")
    assert isinstance(claim, Claim)
    place = Workplace(
        settings=settings, store=lab.store, artifacts=StoreClient(settings.artifacts_url), device=device,
        node="heron:0", drain=Drain(), threads=1,
    )  # fmt: skip
    leftovers.close_if_left(place, Watch(device=device, node_pid=os.getpid()), claim)
    reason = f"job {job_id} left process 4711 behind; look at the card, then loractl undrain heron:0"
    assert lab.store.drains()["heron:0"].reason == reason
    waiting = lab.submit()
    assert reason in " ".join(lab.cli("why", waiting).stdout.split())
    assert lab.store.claim("heron:0") is None, "it takes nothing more until a person has looked"


def _reconnect(server: Connection, change: str, name: str) -> None:
    """Change a database, and end what is connected to it."""
    server.execute(text(change))
    server.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"), {"n": name})


def _freeze(pid: int, database: Path) -> list[psutil.Process]:
    """Stop all below a worker, but not in mid-transaction: SQLite has nobody who would take its lock away."""
    while True:
        family = _family(pid)
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=0.5, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
            return family
        except sqlite3.OperationalError:
            for process in family:
                process.send_signal(signal.SIGCONT)
            time.sleep(0.1)


def _family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _gone(alive: Callable[[], list[psutil.Process]], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while left := alive():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
