"""From submit to start: how long a job waits on an idle node, on SQLite with the embedded Valkey, or on PostgreSQL.

    python -m benchmarks.queue [--jobs 12] [--postgresql]

Real processes: `loractl worker` with one simulated card, and a trainer that ends at once. Each job is submitted twice:
by `loractl submit`, and by the same functions in this process, where the moment of the commit can be noted. The claim's
time is the row's `started_at`, taken with the card's lock.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loractl.common.job.status import Status
from loractl.common.store.records import Choice, Page

if TYPE_CHECKING:
    from loractl.common.settings import Settings
    from loractl.common.store.records import Submission
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job

COMMIT, ROW, PROCESS = "commit to claim", "row begun to claim, with the commit", "loractl submit as a process"

JOB = """
name: queue-{n}
base_model: gpt2
dataset: {{path: {folder}/rows.jsonl}}
max_retries: 0
"""

TRAINER = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.recipe.trainer import main

main(lambda start, orders, tell: Ended(job_id=start.job_id, reason=Reason.BAD_DATA, message="nothing is trained"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--postgresql", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loractl-queue-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "a{n}", "completion": "b"}}\n' for n in range(20)))
        (folder / "quick_trainer.py").write_text(TRAINER)
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("LORACTL_")},
            "LORACTL_HOME": str(folder / "home"),
            "LORACTL_DEVICES": "sim:8GiB",
            "LORACTL_TRAINER": "quick_trainer",
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        }
        if asked.postgresql:
            environment["LORACTL_DATABASE_URL"] = stack.enter_context(_postgresql(folder))
            environment["LORACTL_ARTIFACTS_URL"] = (folder / "artifacts").as_uri()
        times = _measure(folder, environment, asked.jobs)
    where = "PostgreSQL" if asked.postgresql else "SQLite"
    print(f"{asked.jobs} jobs on {where}, one idle node; ms           p50    min    max")
    for what, values in times.items():
        print(f"{what:<52}{statistics.median(values):6.1f} {min(values):6.1f} {max(values):6.1f}")


def _measure(folder: Path, environment: dict[str, str], jobs: int) -> dict[str, list[float]]:
    """Milliseconds of each job, by what they were measured between."""
    from loractl.common.lab_store import adopt
    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect, make_engine
    from loractl.common.store.schema import upgrade
    from loractl.common.store.store import Store

    settings = load_settings(environment)
    if not settings.embedded_database:
        upgrade(make_engine(settings.database_url))
    store = Store(connect(settings))
    if not settings.embedded_database:
        adopt(settings, store, empty=True)  # else no worker serves
    worker = subprocess.Popen([_command(), "worker"], env=environment, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: bool(store.cards.nodes()))
        time.sleep(3)
        times: dict[str, list[float]] = {}
        for n in range(jobs + 1):
            whole = _by_command(folder, environment, n)
            job = _ended(store)
            started = store.attempts.of_job(job.job_id)[0].started_at
            committed = _in_this_process(settings, store, folder / f"job-{n}.yaml")
            claimed = store.attempts.of_job(_ended(store).job_id)[0].started_at.timestamp()
            if n == 0:
                continue  # the first one warms files and caches
            row = (started - job.submitted_at).total_seconds()
            for what, seconds in ((COMMIT, claimed - committed), (ROW, row), (PROCESS, whole)):
                times.setdefault(what, []).append(seconds * 1000)
        return times
    finally:
        worker.send_signal(signal.SIGINT)
        worker.wait(timeout=60)


def _by_command(folder: Path, environment: dict[str, str], n: int) -> float:
    """Submit a job as a person does; seconds."""
    file = folder / f"job-{n}.yaml"
    file.write_text(JOB.format(n=n, folder=folder))
    began = time.perf_counter()
    subprocess.run([_command(), "submit", str(file)], env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def _in_this_process(settings: Settings, store: Store, file: Path) -> float:
    """Submit a job here, with all imports done; the time at which its row was committed."""
    from loractl.common.artifacts import open_store
    from loractl.common.job.file import load_spec
    from loractl.scheduler.submit.data import store_data
    from loractl.scheduler.submit.draft import JobDraft
    from loractl.scheduler.submit.intake import enqueue, plan_all

    committed = []
    submit_all = store.jobs.submit_all

    def noted(submissions: Sequence[Submission]) -> list[int]:
        job_ids = submit_all(submissions)
        committed.append(time.time())
        return job_ids

    store.jobs.submit_all = noted
    try:
        spec = load_spec(file)
        draft = JobDraft(spec=spec, stored=store_data(spec, open_store(settings)))
        enqueue(plan_all([draft], settings, store)[0], settings, store)
    finally:
        store.jobs.submit_all = submit_all
    return committed[0]


def _ended(store: Store) -> Job:
    """The newest job, once the node has ended it and is idle again."""
    newest = store.jobs.newest(Choice(), Page(limit=1))[0].job_id
    _until(lambda: store.jobs.get(newest).status is Status.FAILED)
    time.sleep(0.5)
    return store.jobs.get(newest)


@contextlib.contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    from tests.services import postgres

    with postgres(folder / "postgresql") as url:
        yield url.replace("postgresql://", "postgresql+psycopg://", 1)


def _command() -> str:
    return str(Path(sys.executable).with_name("loractl"))


def _until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("the worker does not get on")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
