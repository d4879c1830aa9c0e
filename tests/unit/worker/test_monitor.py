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

from loractl.common.queue.hints import HintQueues
from loractl.common.settings import load_settings
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.clock import SYSTEM, NodeClock
from loractl.worker.device.devices import CpuDevice
from loractl.worker.node.monitor import Monitor

from ...databases import SQLITE_ALONE
from ..factories import node_state, submission

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


@pytest.mark.parametrize("clock", [SYSTEM, NoThreadForTheQueue()], ids=["it hangs", "no thread can start"])
def test_the_rounds_go_on_whatever_becomes_of_the_queue(
    store: Store, tmp_path: Path, clock: NodeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, asked, woken = threading.Event(), list[str](), list[str]()
    monkeypatch.setattr(HintQueues, "trim", lambda *_: asked.append("asked") or not hangs.wait(60))
    store.jobs.submit(submission(lora=8, method="lora"))
    monitor = Monitor(place_in(tmp_path, store, clock), row_in(store))
    monitor.start(SimpleNamespace(wake=lambda: woken.append("woken"), attempts={}))  # type: ignore[arg-type]
    deadline = time.monotonic() + 60
    while len(woken) < 7:
        assert time.monotonic() < deadline, woken
        time.sleep(0.05)
    monitor.stop()
    hangs.set()
    assert len(asked) == (clock is SYSTEM), "one at a time"


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
    assert left == [signal.SIGTERM] and place.drain.mismatch is not None


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
