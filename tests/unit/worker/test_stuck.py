"""Supervisors that no longer turn, and nodes that end alone: neither monitor nor card waits for others."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.log import LogBook
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.trainer_process import TrainerProcess, launch, send
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.clock import NodeClock
from loractl.worker.device.devices import CpuDevice, SimulatedDevice
from loractl.worker.node.health import leftovers as module
from loractl.worker.node.health.leftovers import StuckSupervisors
from loractl.worker.node.monitor import TRIES, NodeOptions
from loractl.worker.node.node import DeviceNode, place_of
from loractl.worker.protocol.messages import Note, Stop

from ..factories import node_state, submission


@pytest.fixture
def place(tmp_path: Path, upgraded_home: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A processor of a worker whose supervisors may be silent for half a second."""
    (tmp_path / "still.py").write_text("import time; time.sleep(60)  # reads no order")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "STUCK_LEAST_S", 0.5)
    monkeypatch.setattr(module, "LOOK_MOST_S", 0.6)  # two looks are no reason to end this process
    settings = replace(load_settings({"LORACTL_HOME": str(upgraded_home)}), lease_s=0.5)
    store = Store(connect(settings))
    store.cards.see(node_state("box:0", kind="cpu", total=24 * GIB, max_jobs=2))
    return Workplace(
        settings=settings, store=store, device=CpuDevice(total=24 * GIB), node="box:0", drain=Drain(),
        artifacts=StoreClient(settings.artifacts_url),
    )  # fmt: skip


@pytest.fixture
def trainer(tmp_path: Path, place: Workplace) -> Iterator[TrainerProcess]:
    """One that reads no order."""
    with (tmp_path / "log.txt").open("w") as file:
        still = TrainerProcess(launch("still", dict(os.environ)), 1, "run", file, LogBook())
        yield still
        still.end()


@pytest.fixture
def sigterms() -> Iterator[list[int]]:
    """The signals by which a node asks itself to end."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def attempt(place: Workplace, trainer: TrainerProcess | None = None) -> SupervisedAttempt:
    place.store.jobs.submit(submission(lora=1, method="lora"))
    claim = place.store.attempts.claim("box:0")
    assert isinstance(claim, Claim)
    state = begin(claim, place.settings.work_dir)
    state.own.trainer = trainer
    return state


def test_the_trainer_of_a_supervisor_that_is_stuck_in_a_write_to_it_is_killed(
    place: Workplace, trainer: TrainerProcess
) -> None:
    stop = Stop(job_id=1, save=False)
    writer = threading.Thread(target=lambda: [trainer.send(stop) for _ in range(3000)], daemon=True)
    writer.start()  # more than a pipe holds
    looks, state = StuckSupervisors(place), attempt(place, trainer)
    looks.end({0: state})
    time.sleep(0.7)
    assert writer.is_alive()
    monitor = threading.Thread(target=looks.end, args=({0: state},), daemon=True)
    monitor.start()
    monitor.join(timeout=5)
    assert not monitor.is_alive(), "it does not wait for the pipe"
    writer.join(timeout=20)
    assert not writer.is_alive() and trainer.poll() == -signal.SIGKILL
    assert state.own.forced is not None and "the supervisor was stuck for" in state.own.forced[1]


class Leaps(NodeClock):
    """A clock that a freeze of the node moves on."""

    at = 0.0

    def now(self) -> float:
        return self.at


def test_a_node_that_was_frozen_lets_its_supervisors_catch_up(
    place: Workplace, trainer: TrainerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_MOST_S", 0.2)
    clock = Leaps()
    looks, state = StuckSupervisors(replace(place, clock=clock)), attempt(place, trainer)
    for at in (0.1, 0.9):  # longer than a supervisor may be silent
        clock.at = at
        looks.end({0: state})
    assert state.own.forced is None and trainer.poll() is None


def test_the_end_of_a_trainer_does_not_wait_for_an_order_that_it_does_not_read(trainer: TrainerProcess) -> None:
    stop = Stop(job_id=1, save=False)
    writer = threading.Thread(target=lambda: [trainer.send(stop) for _ in range(3000)], daemon=True)
    writer.start()
    time.sleep(0.2)
    assert writer.is_alive()
    began = time.monotonic()
    trainer.end()
    assert time.monotonic() - began < 20


def test_an_order_to_a_trainer_whose_pipe_is_closed_fails_nobody(trainer: TrainerProcess) -> None:
    """As while another thread waits for its end, which state D puts off."""
    assert trainer._process.stdin is not None
    trainer._process.stdin.close()
    trainer.send(Stop(job_id=1, save=False))


def test_an_order_that_can_t_be_written_ends_the_attempt_since_its_trainer_would_wait_for_it() -> None:
    order: Any = Note(job_id=1, kind="start", text="/data/実験")  # as a job's paths may be
    with pytest.raises(UnicodeEncodeError):
        send(io.TextIOWrapper(io.BytesIO(), encoding="ascii"), order)


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
