"""From submit to start: how long a job waits on an idle node, on SQLite with the embedded Valkey, or on PostgreSQL.

    python -m benchmarks.queue [--jobs 12] [--postgresql]

Real processes: `loractl worker` with one simulated card, `loractl submit` for each job, a trainer that ends at once.
The row's own times are compared: `submitted_at` is written in submit's transaction, `started_at` in the claim's, after
it has the card's lock.
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
from collections.abc import Iterator
from pathlib import Path

JOB = """
name: queue-{n}
base_model: gpt2
dataset: {{path: {folder}/rows.jsonl}}
max_retries: 0
"""

TRAINER = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.training.trainer import main

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
        waits, whole = _measure(folder, environment, asked.jobs)
    where = "PostgreSQL" if asked.postgresql else "SQLite"
    print(f"{asked.jobs} jobs on {where}, one idle node; ms           p50    min    max")
    for what, values in (("commit to claim", waits), ("loractl submit as a process", whole)):
        print(f"{what:<52}{statistics.median(values):6.1f} {min(values):6.1f} {max(values):6.1f}")


def _measure(folder: Path, environment: dict[str, str], jobs: int) -> tuple[list[float], list[float]]:
    """Wait from submit's time to the claim's, and whole `loractl submit` processes; milliseconds."""
    from loractl.common.job.status import Status
    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect
    from loractl.common.store.store import Store

    store = Store(connect(load_settings(environment)))
    worker = subprocess.Popen([_command(), "worker"], env=environment, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: bool(store.nodes()))
        time.sleep(3)
        waits, whole = [], []
        for n in range(jobs + 1):
            file = folder / f"job-{n}.yaml"
            file.write_text(JOB.format(n=n, folder=folder))
            began = time.perf_counter()
            subprocess.run([_command(), "submit", str(file)], env=environment, check=True, capture_output=True)
            took = time.perf_counter() - began
            _until(lambda number=n + 1: store.job(number).status is Status.FAILED)
            time.sleep(0.5)  # the node is idle again
            if n == 0:
                continue  # the first one warms files and caches
            job, attempt = store.job(n + 1), store.attempts(n + 1)[0]
            waits.append((attempt.started_at - job.submitted_at).total_seconds() * 1000)
            whole.append(took * 1000)
        return waits, whole
    finally:
        worker.send_signal(signal.SIGINT)
        worker.wait(timeout=60)


@contextlib.contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    from tests.services import postgres

    with postgres(folder / "postgresql") as url:
        yield url.replace("postgresql://", "postgresql+psycopg://", 1)


def _command() -> str:
    return str(Path(sys.executable).with_name("loractl"))


def _until(holds: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError("the worker does not get on")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
