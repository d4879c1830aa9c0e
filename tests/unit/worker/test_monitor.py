"""What a node's monitor wakes its slots for, and what does not keep it from that."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loractl.common.errors import ServiceUnreachable
from loractl.common.job.status import Status
from loractl.common.queue.hints import HintQueues
from loractl.common.settings import LEASE_S, load_settings
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.clock import SYSTEM, NodeClock
from loractl.worker.device.devices import CpuDevice
from loractl.worker.node.monitor import SETTLE_S, Monitor

from ...databases import SQLITE_ALONE
from ..factories import Clock, node_state, submission, take

pytestmark = SQLITE_ALONE


def place_in(home: Path, store: Store, clock: NodeClock = SYSTEM) -> Workplace:
    return Workplace(
        settings=load_settings({"LORACTL_HOME": str(home), "LORACTL_LEASE": "3s"}),
        store=store, artifacts=StoreClient(f"file://{home}"), node="box:0", drain=Drain(),
        device=CpuDevice(total=24 * GIB), clock=clock,
    )  # fmt: skip


def row_in(store: Store) -> Any:
    def write(*, draining: bool) -> Any:
        return store.cards.see(node_state("box:0", total=24 * GIB, max_jobs=1))

    return SimpleNamespace(write=write)


class NoThreadForTheQueue(NodeClock):
    """A box that has no process numbers left."""

    def start(self, work: Callable[[], object], name: str, *, daemon: bool = True) -> threading.Thread:
        if name == "queue":
            raise RuntimeError("can't start new thread")
        return super().start(work, name, daemon=daemon)


@pytest.mark.parametrize(
    ("node_clock", "is_away"),
    [(SYSTEM, False), (SYSTEM, True), (NoThreadForTheQueue(), False)],
    ids=["it hangs", "it is away", "no thread can start"],
)
def test_the_rounds_go_on_whatever_becomes_of_the_queue(
    store: Store, tmp_path: Path, node_clock: NodeClock, is_away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, asked, woken = threading.Event(), list[str](), list[str]()

    def trim(*_: object) -> int:
        asked.append("asked")
        if is_away:
            raise ServiceUnreachable("the queue", "redis://away", "LORACTL_REDIS_URL", "it is away")
        hangs.wait(60)
        return 0

    monkeypatch.setattr(HintQueues, "trim", trim)
    store.jobs.submit(submission(lora=8, method="lora"))
    monitor = Monitor(place_in(tmp_path, store, node_clock), row_in(store))
    monitor.start(SimpleNamespace(wake=lambda: woken.append("woken"), attempts={}))  # type: ignore[arg-type]
    deadline = time.monotonic() + 60
    while len(woken) < 7:
        assert time.monotonic() < deadline, woken
        time.sleep(0.05)
    monitor.stop()
    hangs.set()
    assert is_away or len(asked) == (node_clock is SYSTEM), "one at a time"


def test_what_looks_lost_after_an_outage_is_left_until_living_workers_could_beat(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    timed = Store(store.engine, clock)
    timed.jobs.submit(submission())
    assert isinstance(take(timed), Claim)
    monitor = Monitor(place_in(tmp_path, timed), row_in(timed))
    clock.forward(LEASE_S + 1)
    monitor._tend_fleet()
    assert timed.jobs.get(1).status is Status.RUNNING
    clock.forward(SETTLE_S)
    monitor._tend_fleet()
    assert timed.jobs.get(1).status is Status.QUEUED


def test_a_node_looks_by_itself_whether_its_tables_went_on(store: Store, tmp_path: Path) -> None:
    """Tables that it can still read and write may mean something else."""
    left = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, _: left.append(number))
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    place = place_in(tmp_path, store)
    monitor, deadline = Monitor(place, row_in(store)), time.monotonic() + 30
    monitor.start(SimpleNamespace(wake=lambda: None, attempts={}))  # type: ignore[arg-type]
    while not left and time.monotonic() < deadline:
        time.sleep(0.05)
    monitor.stop()
    signal.signal(signal.SIGTERM, before)
    assert left == [signal.SIGTERM] and place.drain.why is not None


def test_a_full_card_does_not_look_for_jobs(store: Store, tmp_path: Path) -> None:
    monitor, woken = Monitor(place_in(tmp_path, store), row_in(store)), list[str]()
    slots: Any = SimpleNamespace(wake=lambda: woken.append("woken"), attempts={})
    for _ in range(2):
        store.jobs.submit(submission(lora=8, method="lora"))
    monitor.report()
    monitor._go_round(slots)
    assert woken == ["woken"]
    assert isinstance(store.attempts.claim("box:0"), Claim)
    monitor.report()
    monitor._go_round(slots)
    assert woken == ["woken"], "though a job waits that would fit next to the one there"
