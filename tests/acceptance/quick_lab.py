"""A lab of real workers, with a quick trainer where weights do not matter (tests/quick_trainer.py)."""

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

from loractl.common.job.status import Reason
from loractl.common.lab_store import adopt
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Job

from ..conftest import ROOT, Cli
from ..models import CONFIG, write_job

LEASE_S = 3  # the shortest there is


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

    def submit(self, *options: str, name: str = "job", steps: int = 10, user: str = "tester") -> int:
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
        while not holds(job := self.store.jobs.get(job_id)):
            assert time.monotonic() < deadline, f"after {seconds} s: {job.status} {job.stage} {job.step} {job.message}"
            time.sleep(0.1)
        return job

    def change(self, job_id: int, **values: Any) -> None:
        with Session(self.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == job_id).values(**values))

    def reasons(self, job_id: int) -> list[Reason | None]:
        return [attempt.reason for attempt in self.store.attempts.of_job(job_id)]

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
    (home / "artifacts").mkdir()
    cli = make_cli(
        LORACTL_HOST="heron", LORACTL_TRAINER="tests.quick_trainer", PYTHONPATH=str(ROOT),
        QUICK_STARTS=str(folder / "starts"), LORACTL_LEASE=f"{LEASE_S}s",
        **({"LORACTL_DATABASE_URL": url} if url else {}),
    )  # fmt: skip
    if url:
        adopt(load_settings(cli.environment), Store(engine))
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


def nodes_of(home: Path) -> list[psutil.Process]:
    """The nodes of a home, wherever they were started from."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "loractl.worker.node" in process.cmdline() and process.environ().get("LORACTL_HOME") == str(home):
                found.append(process)
    return found


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
