"""What a large fleet asks of its database, PostgreSQL, while nothing starts: looks, rounds and heartbeats.

    .venv/bin/python -m benchmarks.fleet [--nodes 200] [--jobs 100] [--seconds 60]

Every node does at its real pace what its monitor does: it writes its card's row and looks at drains, every 5 s; it goes
round, every 5 s: its turn for the fleet, waiting rows. A box of four cards looks at its nodes every 10 s. Each running
job beats every 5 s with a step, a metric and a log line. The running jobs are preemptible, and 20 jobs of
higher priority wait for more than any card has: the rule is asked in every round, and nobody gives way. One job a
second loses its worker.

The nodes are threads of four processes beside the server, so that this machine's cores serve both. Prints ms, the
deadlocks that PostgreSQL counted, and how long after its lease a lost job was ended.
"""

from __future__ import annotations

import argparse
import datetime as dt
import multiprocessing
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sqlalchemy import text

from loractl.common.job.method import Method, Need
from loractl.common.job.spec import JobSpec
from loractl.common.memory.fit import MemoryPlan
from loractl.common.placement.lines import served_classes
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, NodeState, Progress, Submission
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.workplace import BEAT_S
from loractl.worker.node.box import WATCH_S
from loractl.worker.node.monitor import FLEET_ROUND_S, ROUND_S, SEE_S

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import services

PROCESSES = 4
CONNECTIONS = 20  # of each process: what its nodes would have between them
CARD = 48 * GIB
WAITING = 20
CARDS_A_BOX = 4


@dataclass(kw_only=True)
class Times:
    """Milliseconds by what was asked, and errors."""

    taken: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001  counted, whatever it is
            self.errors.append(f"{what}: {str(error).splitlines()[0]}")
        else:
            self.taken.setdefault(what, []).append((time.perf_counter() - began) * 1000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lb-") as folder, services.postgres(Path(folder) / "data") as server:
        url = server.replace("postgresql://", "postgresql+psycopg://", 1)
        claims = fill(url, asked.nodes, asked.jobs)
        lost = claims[: int(asked.seconds)]
        shares = [
            (url, list(range(asked.nodes))[n::PROCESSES], claims[len(lost) :][n::PROCESSES], asked.seconds)
            for n in range(PROCESSES)
        ]
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            running = pool.map_async(serve, shares)
            expired = lose(url, lost, asked.seconds)
            results = running.get()
        show(url, results, expired)


def fill(url: str, nodes: int, jobs: int) -> list[Claim]:
    """The cards, what runs on them, and what waits in vain."""
    engine = make_engine(url)
    upgrade(engine)
    store = Store(engine)
    for number in range(jobs):
        store.cards.see(state(number))
        store.jobs.submit(submission(40, user=f"user{number % 12}", preemptible=True))
    claims = [claim for number in range(jobs) if isinstance(claim := store.attempts.claim(name(number)), Claim)]
    assert len(claims) == jobs, "every job has a card"
    for number in range(jobs, nodes):
        store.cards.see(state(number))
    for number in range(WAITING):
        store.jobs.submit(submission(70, user=f"user{number % 12}", priority=5))
    engine.dispose()
    return claims


def submission(gib: int, user: str, **keys: object) -> Submission:
    spec = JobSpec.model_validate(
        {"name": "bench", "base_model": "org/model", "dataset": {"path": "org/data"}, "method": "lora", **keys}
    )
    need = Need(lora=gib * GIB, qlora=None)
    plan = MemoryPlan(need=need, planned=need)
    return Submission(spec=spec, user=user, data={}, plan=plan, methods=(Method.LORA,))


def name(number: int) -> str:
    return f"{host(number)}:{number % CARDS_A_BOX}"


def host(number: int) -> str:
    return f"box{number // CARDS_A_BOX}"


def state(number: int) -> NodeState:
    return NodeState(
        node=name(number), host=host(number), gpu=f"GPU-{number}", device_name="a card", kind="nvml",
        total=CARD, max_jobs=1,
    )  # fmt: skip


def serve(share: tuple[str, list[int], list[Claim], float]) -> Times:
    """Some nodes and jobs, in threads of this process."""
    url, nodes, claims, seconds = share
    engine, times = make_engine(url, connections=CONNECTIONS), Times()
    store, over = Store(engine), time.monotonic() + seconds

    def every(pause_s: float, work: Callable[[], None]) -> None:
        time.sleep(random.uniform(0, pause_s))
        while time.monotonic() < over:
            began = time.monotonic()
            work()
            time.sleep(max(0.0, began + pause_s * random.uniform(0.8, 1.2) - time.monotonic()))

    loops = list[tuple[float, Callable[[], None]]]()
    loops += [(SEE_S, partial(look, store, times, n)) for n in nodes]
    loops += [(ROUND_S, partial(go_round, store, times, n)) for n in nodes]
    loops += [(WATCH_S, partial(watch, store, times, n)) for n in nodes if n % CARDS_A_BOX == 0]
    loops += [(BEAT_S, Beats(store, times, claim)) for claim in claims]
    threads = [threading.Thread(target=every, args=loop) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    return times


def look(store: Store, times: Times, number: int) -> None:
    with times.of("a look"):
        store.cards.see(state(number))
        store.cards.drains()


def go_round(store: Store, times: Times, number: int) -> None:
    turn = None
    with times.of("asking for the turn"):
        turn = store.cards.take_turn(FLEET_ROUND_S, 0.0)
    if turn is not None:
        with times.of("the fleet's round"):
            store.attempts.reap()
            store.cards.preempt()
            store.jobs.end_patience()
    with times.of("waiting rows"):
        store.jobs.waiting_classes(served_classes(CARD))


def watch(store: Store, times: Times, number: int) -> None:
    with times.of("a box's watchdog"):
        rows = store.cards.nodes(host(number))
        store.now()
        store.jobs.waiting_classes({size for row in rows for size in served_classes(row.free)})


class Beats:
    """The heartbeats of one job."""

    def __init__(self, store: Store, times: Times, claim: Claim) -> None:
        self._store, self._times, self._claim, self._step = store, times, claim, 0

    def __call__(self) -> None:
        self._step += 1
        progress = Progress(step=self._step, total_steps=1000, metrics=((self._step, "loss", 1.0),), log="a line\n")
        with self._times.of("a heartbeat"):
            assert self._store.attempts.beat(self._claim, progress).accepted


def lose(url: str, claims: list[Claim], seconds: float) -> dict[int, dt.datetime]:
    """Let a lease a second run out; when each did, by job. Without beats they would all run out in a minute."""
    engine, over, expired = make_engine(url), time.monotonic() + seconds, dict[int, dt.datetime]()
    with engine.begin() as connection:
        later = "UPDATE jobs SET lease_expires_at = clock_timestamp() + interval '1 day' WHERE token = ANY(:tokens)"
        connection.execute(text(later), {"tokens": [claim.token for claim in claims]})
    for claim in claims:
        if time.monotonic() > over:
            break
        with engine.begin() as connection:
            now = "UPDATE jobs SET lease_expires_at = clock_timestamp() WHERE token = :token RETURNING lease_expires_at"
            expired[claim.job_id] = connection.execute(text(now), {"token": claim.token}).scalar_one()
        time.sleep(1)
    engine.dispose()
    return expired


def show(url: str, results: list[Times], expired: dict[int, dt.datetime]) -> None:
    taken: dict[str, list[float]] = {}
    for times in results:
        for what, values in times.taken.items():
            taken.setdefault(what, []).extend(values)
    print(f"{'':<22}{'times':>7}{'p50 ms':>9}{'p95 ms':>9}{'most ms':>9}")
    for what, values in sorted(taken.items()):
        p95 = statistics.quantiles(values, n=20)[18] if len(values) > 1 else values[0]
        print(f"{what:<22}{len(values):>7}{statistics.median(values):>9.1f}{p95:>9.1f}{max(values):>9.1f}")
    errors = [error for times in results for error in times.errors]
    engine = make_engine(url)
    with engine.connect() as connection:
        deadlocks = connection.scalar(text("SELECT sum(deadlocks) FROM pg_stat_database"))
        ended = text("SELECT job_id, ended_at FROM attempts WHERE reason = 'worker_lost'")
        found = {row.job_id: row.ended_at for row in connection.execute(ended)}
    late = [(found[job_id] - at).total_seconds() for job_id, at in expired.items() if job_id in found]
    print(f"deadlocks {deadlocks}, errors {len(errors)}")
    print(f"{len(expired)} leases were made to run out: {len(late)} attempts ended, s after: p50", end=" ")
    print(f"{statistics.median(late):.1f}, most {max(late):.1f}; others lost {len(found.keys() - expired.keys())}")
    engine.dispose()
    for error in sorted(set(errors))[:5]:
        print(error)


if __name__ == "__main__":
    main()
