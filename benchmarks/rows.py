"""How long the commands that people read take with many rows, and how much memory, on SQLite (a file) and PostgreSQL.

    .venv/bin/python -m benchmarks.rows [rows] [runs]

Each command is the installed one, started `runs` times on a fleet of six cards. "one job" is the database with a single
waiting job: what a command takes anyway. waiting: so many wait, of 12 users. ended: so many ended today, each with an
adapter. Prints p50 and p95 in seconds, the p95 beyond that of "one job", the command's own processor time, which
depends less on what else runs, and the most memory that a run had (MB).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, insert, select, text, update

from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Choice, NodeState, Page
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Adapter, Attempt, Event, Job
from loractl.common.units import GIB

from .claim import CARDS, MIXES, fill, postgresql, sqlite

ROWS, RUNS = 100_000, 20
COMMANDS = (
    "status", "status --json", "status --user user3", "status --label team=vision", "status -a",
    "status -a --user user3", "status 1", "why {last}", "gpus", "adapters",
)  # fmt: skip


WATCH = """
import os, sys, time
began = time.perf_counter()
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, used = os.wait4(pid, 0)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process between: what this one holds would count as the command's, which begins as a copy of it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One command's runs."""

    seconds: list[float]
    processor: float  # seconds of the command's own process, at the median
    megabytes: float

    @property
    def p95(self) -> float:
        return statistics.quantiles(self.seconds * 2, n=20, method="inclusive")[18]


def main() -> None:
    rows, runs = (int(word) for word in (*sys.argv[1:3], *map(str, (ROWS, RUNS)[len(sys.argv[1:3]) :])))
    print(f"{'':<12}{'rows':<10}{'command':<28}{'p50 s':>8}{'p95 s':>8}{'beyond':>8}{'CPU s':>8}{'MB':>6}")
    for name, opened in (("SQLite", sqlite), ("PostgreSQL", postgresql)):
        alone: dict[str, Figure] = {}
        for kind, filled in (("one job", _one), ("waiting", _waiting), ("ended", _ended)):
            with opened() as engine:
                last = _prepare(engine, filled, rows)
                for command in COMMANDS:
                    figure = measure(engine, command.format(last=last), runs)
                    beyond = figure.p95 - alone.setdefault(command, figure).p95
                    p50 = statistics.median(figure.seconds)
                    told = (
                        f"{p50:>8.2f}{figure.p95:>8.2f}{beyond:>8.2f}{figure.processor:>8.2f}{figure.megabytes:>6.0f}"
                    )
                    print(f"{name:<12}{kind:<10}{command:<28}{told}", flush=True)


def measure(engine: Engine, command: str, runs: int) -> Figure:
    """Run the command again and again. Raises CalledProcessError."""
    seconds, processor, kilobytes = [], [], []
    with tempfile.TemporaryDirectory(prefix="lb-") as home:
        url = engine.url.render_as_string(hide_password=False)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("LORACTL_")}
        environment = {**kept, "LORACTL_HOME": home, "LORACTL_DATABASE_URL": url}
        loractl = str(Path(sys.executable).with_name("loractl"))
        watched = [sys.executable, "-S", "-E", "-c", WATCH, loractl, *command.split()]
        for _ in range(runs):
            done = subprocess.run(watched, env=environment, capture_output=True, text=True, check=True)
            took, busy, most = done.stdout.split()
            seconds.append(float(took))
            processor.append(float(busy))
            kilobytes.append(int(most))
    return Figure(seconds=seconds, processor=statistics.median(processor), megabytes=max(kilobytes) / 1024)


def _prepare(engine: Engine, filled: Callable[[Engine, Store, int], None], rows: int) -> int:
    """A fleet, and the rows; returns the number of the newest job, which waits."""
    upgrade(engine)
    store = Store(engine)
    for number, gib in enumerate(CARDS):
        card = NodeState(
            node=f"box:{number}", host="box", gpu=f"GPU-{number}", device_name="a card", kind="nvml", total=gib * GIB,
            max_jobs=4 if gib >= 48 else 1,
        )  # fmt: skip
        store.cards.see(card)
    filled(engine, store, rows)
    _one(engine, store, 1)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    return store.jobs.newest(Choice(), Page(limit=1))[0].job_id


def _one(engine: Engine, store: Store, _: int) -> None:
    fill(engine, MIXES["lab"], 1, store.now())


def _waiting(engine: Engine, store: Store, rows: int) -> None:
    fill(engine, MIXES["lab"], rows, store.now())
    with engine.begin() as connection:
        connection.execute(update(Job).where(Job.job_id % 100 == 0).values(labels={"team": "vision"}))


def _ended(engine: Engine, store: Store, rows: int) -> None:
    """Jobs that ended well today, each with an attempt, an adapter and a few lines of history."""
    _waiting(engine, store, rows)
    now, token = store.now(), "0" * 32
    ended = {"status": Status.SUCCEEDED, "reason": Reason.OK, "message": "done", "attempt": 1, "ended_at": now}
    with engine.begin() as connection:
        connection.execute(update(Job).values(**ended, method="lora", adapter_uri="file:///a", report_uri="file:///r"))
        numbers = connection.scalars(select(Job.job_id)).all()
        for start in range(0, len(numbers), 5000):
            some = numbers[start : start + 5000]
            ran = {"attempt": 1, "token": token, "node": "box:0", "gpu": "GPU-0", "method": "lora", "started_at": now}
            connection.execute(
                insert(Attempt), [{**ran, "job_id": n, "ended_at": now, "reason": Reason.OK} for n in some]
            )
            stored = {"attempt": 1, "base_model": "org/model", "method": "lora", "uri": "file:///a", "size": 1}
            stored |= {"sha256": "0" * 64, "created_at": now}
            connection.execute(insert(Adapter), [{**stored, "job_id": n, "name": f"bench{n % 40}"} for n in some])
            line = {"attempt": 1, "at": now, "kind": "note", "text": "a line of the history"}
            connection.execute(insert(Event), [{**line, "job_id": n} for n in some for _ in range(3)])


if __name__ == "__main__":
    main()
