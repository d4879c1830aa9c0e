"""A lab of real workers, with a quick trainer where weights do not matter: loractl's own protocol, without torch."""

from __future__ import annotations

import contextlib
import json
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
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason, Status
from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from ..conftest import Cli
from ..models import write_job

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

    def start(self, *options: str, cold: bool = False, **environment: str) -> subprocess.Popen[str]:
        """A worker. `cold` where its processes are the subject: then they are children of the one that is returned."""
        cli = self.cli.with_environment(**environment)
        self.workers.append(cli.start("worker", *options, warm_start=not cold))
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


@contextlib.contextmanager
def quick_lab(make_cli: Callable[..., Cli], home: Path, folder: Path, url: str | None) -> Iterator[Lab]:
    """On SQLite, or on the database at `url`."""
    engine = make_engine(url or f"sqlite:///{home / 'loractl.db'}")
    upgrade(engine)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "quick").mkdir()
    (folder / "quick" / "quick_trainer.py").write_text(QUICK)
    cli = make_cli(
        LORACTL_HOST="heron", LORACTL_TRAINER="quick_trainer", PYTHONPATH=str(folder / "quick"),
        QUICK_STARTS=str(folder / "starts"), LORACTL_LEASE=f"{LEASE_S}s",
        **({"LORACTL_DATABASE_URL": url} if url else {}),
    )  # fmt: skip
    found = Lab(cli, home, engine, folder)
    yield found
    for worker in found.workers:
        ending = [*family(worker.pid), psutil.Process(worker.pid)] if worker.poll() is None else []
        for process in ending:
            if process.is_running():
                process.kill()
        worker.wait()
    engine.dispose()


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def freeze(processes: Callable[[], list[psutil.Process]], database: Path) -> list[psutil.Process]:
    """Stop processes, but not in mid-transaction: SQLite has nobody who would take its lock away."""
    while True:
        stopped = processes()
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=0.5, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
            return stopped
        except sqlite3.OperationalError:
            for process in stopped:
                process.send_signal(signal.SIGCONT)
            time.sleep(0.1)


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
