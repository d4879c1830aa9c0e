"""Supervisors that no longer turn, and nodes that end alone: neither monitor nor card waits for others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt import trainer_process as trainer_module
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.trainer_process import TrainerLink, TrainerProcess, launch
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.device.devices import CpuDevice, SimulatedDevice
from loractl.worker.node.device_row import NodeOptions
from loractl.worker.node.health import stuck as module
from loractl.worker.node.health.stuck import StuckSupervisors
from loractl.worker.node.monitor import TRIES
from loractl.worker.node.node import DeviceNode, place_of
from loractl.worker.protocol.idle_trainer import shared
from loractl.worker.protocol.messages import Stop

from ..factories import node_state, submission

STILL = f"""
import sys, time
print({shared("mark")!r}, end="", flush=True)
time.sleep(60)  # reads no order
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A processor of a worker whose supervisors may be silent for half a second."""
    (tmp_path / "still.py").write_text(STILL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "STUCK_LEAST_S", 0.5)
    monkeypatch.setattr(trainer_module, "ANSWER_S", 60.0)  # on a busy machine a process may take long to start
    monkeypatch.setattr(module, "LOOK_MOST_S", 0.6)  # two looks are no reason to end this process
    settings = replace(load_settings({"LORACTL_HOME": str(tmp_path / "home")}), lease_s=0.5)
    store = Store(connect(settings))
    store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB, max_jobs=2))
    return Workplace(
        settings=settings, store=store, device=CpuDevice(total=24 * GIB), node="box:0", drain=Drain(),
        artifacts=StoreClient(settings.artifacts_url),
    )  # fmt: skip


@pytest.fixture
def link(tmp_path: Path, place: Workplace) -> Iterator[TrainerLink]:
    """The first of two jobs in a trainer that reads no order."""
    process = launch("still", dict(os.environ))
    trainer = TrainerProcess(process, "run", "mark")
    with (tmp_path / "log.txt").open("w") as file:
        first = trainer.begin(1, file, LogBook())
        try:
            assert trainer.join(2, file, LogBook()) is not None
            yield first
        finally:
            trainer.leave(first, stay=False, end=True)


@pytest.fixture
def sigterms() -> Iterator[list[int]]:
    """The signals by which a node asks itself to end."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def attempt(place: Workplace, link: TrainerLink | None = None) -> SupervisedAttempt:
    place.store.jobs.submit(submission(lora=1, method="lora"))
    claim = place.store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    state = begin(claim, place.settings.work_dir)
    state.run.trainer = link
    return state


def test_the_monitor_does_not_wait_for_a_trainer_to_which_the_stuck_supervisor_writes(
    place: Workplace, link: TrainerLink
) -> None:
    stop = Stop(job_id=1, save=False)
    writer = threading.Thread(target=lambda: [link.send(stop) for _ in range(3000)], daemon=True)
    writer.start()  # more than a pipe holds
    looks, state = StuckSupervisors(place), attempt(place, link)
    looks.end({0: state})
    time.sleep(0.7)
    monitor = threading.Thread(target=looks.end, args=({0: state},), daemon=True)
    monitor.start()
    monitor.join(timeout=5)
    assert writer.is_alive() and not monitor.is_alive()
    began = time.monotonic()
    link.trainer.leave(link, stay=False, end=True)
    assert time.monotonic() - began < 20, "nor does who ends it"


def test_an_order_to_a_trainer_whose_pipe_is_closed_fails_nobody(link: TrainerLink) -> None:
    """As while another thread waits for its end, which state D puts off."""
    assert link.trainer.process.stdin is not None
    link.trainer.process.stdin.close()
    link.send(Stop(job_id=1, save=False))


def test_a_node_whose_stuck_supervisor_turns_again_still_ends(place: Workplace, sigterms: list[int]) -> None:
    """It was told to take no more jobs, and nothing takes that back."""
    looks, stuck, other = StuckSupervisors(place), attempt(place), attempt(place)
    deadline = time.monotonic() + 30
    while not sigterms and time.monotonic() < deadline:
        other.turn()
        looks.end({0: stuck, 1: other})
        time.sleep(0.1)
    assert sigterms == [signal.SIGTERM] and (place.drain.asked, place.drain.alone) == ("checkpoint", True)


def test_a_node_that_ends_alone_does_not_wait_for_the_job_of_another_card(tmp_path: Path, sigterms: list[int]) -> None:
    """Nobody stops that job, so its card would be out of service until it ends."""
    settings = load_settings({"LORACTL_HOME": str(tmp_path / "own"), "LORACTL_HOST": "box"})
    settings.runtime_dir.mkdir(parents=True)
    store = Store(connect(settings))
    for name in ("box:0", "box:1"):
        store.cards.see(node_state(name, kind="sim", total=8 * GIB, gangs=True))
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=6 * GIB, qlora=None))
    job = submission(lora=12, qlora=None, method="lora")
    store.jobs.submit(replace(job, ways=Ways(alone=False, gangs=(way,))))
    assert isinstance(store.attempts.claim("box:1", gangs=True), Claim) and store.cards.serves_beside("box:0")
    device, drain = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB), Drain()
    node = DeviceNode(place_of(settings, device, NodeOptions(), drain), NodeOptions())
    drain.ask("checkpoint")
    waiting = threading.Thread(target=node._await_gangs, daemon=True)
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive(), "its worker may have stopped the others, too"
    for _ in range(TRIES):
        node._monitor._try("the look", lambda: 1 / 0)
    waiting.join(timeout=20)
    assert sigterms == [signal.SIGTERM] and not waiting.is_alive()
