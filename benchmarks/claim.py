"""How long a claim takes with many jobs waiting, on SQLite (a file) and on PostgreSQL.

    .venv/bin/python -m benchmarks.claim [rows ...] [--mix lab "nothing fits"] [--on sqlite] [--at-once 50]

Each mix fills a database, claims again and again, and gives every claimed job back, so that as many wait each time.
Prints p50 and p95 in ms, this machine's, the p50 of this process's CPU time, which has SQLite's part in it, and for
comparison the p50 of a transaction that only asks for 1 ("trip"): on a busy machine a claim's dozen round trips to a
server are most of its time.

20 users, 3 priorities. lab: each user has jobs of 10 needs. different: no two needs alike. nothing fits: the same, and
the free card is too small for all that wait, young jobs; stuck: the same after an hour's waiting, a card kept for the
first. --at-once: besides, this many idle cards claim at the same moment, each in a thread of this process.
"""

from __future__ import annotations

import argparse
import datetime as dt
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, insert, text

from loractl.common.job.method import Method, Need, Ways, least_need
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Status
from loractl.common.placement.lines import queue_key, vram_class
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Left, NodeState
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import services

ROWS = (100, 10_000, 100_000)
CLAIMS = 60
WARM_UP = 5
CARDS = (12, 12, 24, 24, 48, 80)
METHODS = (Method.LORA, Method.QLORA)
SPEC = JobSpec.model_validate({"name": "bench", "base_model": "org/model", "dataset": {"path": "org/data"}})
Draw = Callable[[random.Random, int], tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What waits: user, priority and bytes of each job, for how long, and whether the card that asks is nearly full."""

    draw: Draw
    waited_s: float = 60.0
    small: bool = False


def lab(rng: random.Random, number: int) -> tuple[str, int, int]:
    user = rng.randrange(20)
    return f"user{user}", rng.choice((0, 0, 0, 0, 1, -1)), (4 + (user * 7 + rng.randrange(10) * 3) % 40 * 2) * GIB


def different(rng: random.Random, number: int) -> tuple[str, int, int]:
    return f"user{rng.randrange(20)}", rng.choice((-1, 0, 1)), 4 * GIB + number * 700_000 + rng.randrange(1000)


def too_large(rng: random.Random, number: int) -> tuple[str, int, int]:
    return f"user{rng.randrange(20)}", rng.choice((-1, 0, 1)), 13 * GIB + number * 700_000


MIXES = {
    "lab": Mix(draw=lab),
    "different": Mix(draw=different),
    "nothing fits": Mix(draw=too_large, small=True),
    "stuck": Mix(draw=too_large, waited_s=3600.0, small=True),
}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Milliseconds of each claim."""

    wall: list[float]
    own: list[float]  # CPU time of this process
    trip: list[float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--on", nargs="+", choices=DATABASES, default=list(DATABASES))
    parser.add_argument("--at-once", type=int, default=0)
    asked = parser.parse_args()
    print(f"{'':<12}{'mix':<14}{'rows':>8}{'p50 ms':>9}{'p95 ms':>9}{'CPU ms':>9}{'trip ms':>9}")
    for database in asked.on:
        for mix in asked.mix:
            for rows in asked.rows:
                with DATABASES[database]() as engine:
                    upgrade(engine)
                    fill(engine, MIXES[mix], rows, Store(engine).now())
                    taken = measure(engine, MIXES[mix])
                    p50, own, trip = map(statistics.median, (taken.wall, taken.own, taken.trip))
                    p95 = statistics.quantiles(taken.wall, n=20)[18]
                    print(f"{database:<12}{mix:<14}{rows:>8}{p50:>9.1f}{p95:>9.1f}{own:>9.1f}{trip:>9.2f}", flush=True)
                    if asked.at_once and not MIXES[mix].small:
                        waits = claim_at_once(engine, asked.at_once)
                        spread = f"p50 {statistics.median(waits):.0f}, most {max(waits):.0f}"
                        print(
                            f"{'':<12}{asked.at_once} claims at once, ms until each had its job: {spread}", flush=True
                        )


def measure(engine: Engine, mix: Mix) -> Taken:
    store = Store(engine)
    for number, gib in enumerate(CARDS):
        # all cards but the one that asks are full, as on a busy day
        asks = number == (0 if mix.small else len(CARDS) - 1)
        outside = 0 if asks else gib * GIB
        store.cards.see(card(number, gib, outside=outside if mix.waited_s < 1800 else 0))
    mine = "box:0" if mix.small else f"box:{len(CARDS) - 1}"
    taken = Taken(wall=[], own=[], trip=[])
    for n in range(CLAIMS + WARM_UP):
        began, worked = time.perf_counter(), time.thread_time()
        claim = store.attempts.claim(mine)
        if n >= WARM_UP:
            taken.wall.append((time.perf_counter() - began) * 1000)
            taken.own.append((time.thread_time() - worked) * 1000)
        assert (getattr(claim, "job_id", None) is None) == mix.small, claim
        if not mix.small:
            give_back(engine, claim.job_id)  # type: ignore[union-attr]
        began = time.perf_counter()
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.commit()  # at a rollback psycopg forgets what it has prepared
        taken.trip.append((time.perf_counter() - began) * 1000)
    return taken


def card(number: int, gib: int, outside: int = 0) -> NodeState:
    return NodeState(
        node=f"box:{number}", host="box", gpu=f"GPU-{number}", device_name="a card", kind="nvml", total=gib * GIB,
        outside_bytes=outside, max_jobs=4 if gib >= 48 else 1,
    )  # fmt: skip


def claim_at_once(engine: Engine, count: int) -> list[float]:
    """Milliseconds from the common start until each card had a job of its own."""
    store, start, waits = Store(engine), threading.Barrier(count), list[float]()
    for number in range(count):
        store.cards.see(card(number, 96))
    given = list[int]()

    def claim(number: int) -> None:
        start.wait()
        began = time.perf_counter()
        while not isinstance(found := store.attempts.claim(f"box:{number}"), Claim):
            assert isinstance(found, Left), "there is work for all"
        waits.append((time.perf_counter() - began) * 1000)
        given.append(found.job_id)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == len(set(given)) == count, "each has one, and no two have the same"
    for job_id in given:
        give_back(engine, job_id)
    return waits


def fill(engine: Engine, mix: Mix, count: int, now: dt.datetime) -> None:
    rng, spec = random.Random(7), SPEC.model_dump(mode="json")
    rows = []
    for number in range(count):
        user, priority, lora = mix.draw(rng, number)
        need = Need(lora=lora, qlora=max(lora // 2, 13 * GIB) if mix.small else lora // 2)
        least = least_need(METHODS, need)
        rows.append(
            {
                "name": "bench", "user": user, "labels": {}, "spec": spec,
                "base_model": "org/model", "data": {}, "priority": priority, "vram_lora": need.lora,
                "vram_qlora": need.qlora, "vram_needed": least, "vram_class": vram_class(least), "planned": vars(need),
                "queue_key": queue_key(priority, METHODS, need, Ways(), {}, user),
                "methods": [m.value for m in METHODS], "status": Status.QUEUED, "held": False,
                "attempt": 0, "retries_used": 0, "submitted_at": now - dt.timedelta(seconds=mix.waited_s),
            }
        )  # fmt: skip
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # its triggers read each row's JSON, which takes most of the time
            connection.execute(text("SET LOCAL session_replication_role = replica"))
        for start in range(0, count, 5000):
            connection.execute(insert(Job), rows[start : start + 5000])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE jobs"))  # as autovacuum does a minute after so many inserts


def give_back(engine: Engine, job_id: int) -> None:
    with engine.begin() as connection:
        again = """UPDATE jobs SET status = 'queued', token = NULL, node = NULL, vram_reserved = NULL, attempt = 0,
            queue_key = replace(queue_key, '~' || job_id || '|', '|') WHERE job_id = :id"""
        connection.execute(text(again), {"id": job_id})
        connection.execute(text("DELETE FROM events"))
        connection.execute(text("DELETE FROM attempts"))


@contextmanager
def sqlite() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="lb-") as folder:
        engine = make_engine(f"sqlite:///{folder}/loractl.db")
        yield engine
        engine.dispose()


@contextmanager
def postgresql() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="lb-") as folder, services.postgres(Path(folder) / "data") as url:
        engine = make_engine(url.replace("postgresql://", "postgresql+psycopg://", 1), connections=60)
        yield engine
        engine.dispose()


DATABASES = {"sqlite": sqlite, "postgresql": postgresql}


if __name__ == "__main__":
    main()
