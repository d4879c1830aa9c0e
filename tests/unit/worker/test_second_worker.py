"""Two workers of one home on one box, by mistake: the second waits for the first, and its end takes nothing away."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import CardTaken, ExitCode
from loractl.common.job.status import Status
from loractl.common.queue.valkey import broker_url, embedded_runs, stop_embedded
from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.device.devices import CpuDevice, SimulatedDevice
from loractl.worker.node import box
from loractl.worker.node.box import Box
from loractl.worker.node.lock import DeviceLock, read_identity

from ...held_lab import HeldLab, ShownCard
from ..factories import node_state

DEVICE = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)


@pytest.fixture
def settings(upgraded_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Of a box whose nodes do nothing until they are told to end; SIGTERM comes as soon as they are there."""
    popen, terminate = subprocess.Popen, signal.getsignal(signal.SIGTERM)

    def node(_: Any, **how: Any) -> subprocess.Popen[str]:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return popen(["sleep", "60"], **how)

    monkeypatch.setattr(box.subprocess, "Popen", node)
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "box"})
    settings.runtime_dir.mkdir(parents=True, exist_ok=True)
    yield settings
    signal.signal(signal.SIGTERM, terminate)


def _served(settings: Settings) -> Store:
    """The row of a node that serves the device."""
    store = Store(connect(settings))
    store.cards.see(replace(node_state("box:0", total=8 * GIB), **vars(read_identity(settings))))
    return store


def test_a_second_worker_that_stops_leaves_the_first_one_s_node_in_its_row(settings: Settings) -> None:
    store = _served(settings)
    lock = DeviceLock(settings, DEVICE)
    try:
        assert Box(settings, store, [DEVICE], {}).run(drain_when_idle=False) == ExitCode.OK
    finally:
        lock.close()
    assert [row.node for row in store.cards.nodes("box")] == ["box:0"]


def test_a_worker_that_stops_takes_its_own_row_away(settings: Settings) -> None:
    store = _served(settings)
    assert Box(settings, store, [DEVICE], {}).run(drain_when_idle=False) == ExitCode.OK
    assert store.cards.nodes("box") == []


@pytest.fixture
def queue_runs(real_services: None, upgraded_home: Path) -> Iterator[None]:
    """Before `settings`, in which no process can be started."""
    here = load_settings({"LORACTL_HOME": str(upgraded_home)})
    broker_url(here)
    yield
    stop_embedded(here)


def test_the_embedded_queue_ends_with_the_last_worker_of_its_home(queue_runs: None, settings: Settings) -> None:
    store = _served(settings)
    lock = DeviceLock(settings, DEVICE)
    try:
        Box(settings, store, [DEVICE], {}).run(drain_when_idle=False)
        assert embedded_runs(settings), "the first worker hears by it"
    finally:
        lock.close()
    Box(settings, store, [DEVICE], {}).run(drain_when_idle=False)
    assert not embedded_runs(settings)


def test_a_worker_of_another_home_is_told_that_it_shares_the_processor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor, locks = CpuDevice(total=8 * GIB), []
    for name in ("ada", "bob"):
        settings = load_settings({"LORACTL_HOME": str(tmp_path / name)})
        settings.runtime_dir.mkdir(parents=True)
        caplog.clear()
        locks.append(DeviceLock(settings, processor))
    assert "a worker of another LORACTL_HOME serves this processor, too" in caplog.text
    for lock in locks:
        lock.close()


def test_a_worker_is_refused_a_card_that_another_serves_under_another_name(held: HeldLab) -> None:
    heron, owl = ({"LORACTL_HOST": name, "LORACTL_HOME": str(held.folder / name)} for name in ("heron", "owl"))
    held.start(devices=[ShownCard()], **heron)
    with pytest.raises(CardTaken, match="heron:0 serves the card of owl:0"):
        held.start(devices=[ShownCard()], **owl)
    held.stop()
    held.start(devices=[ShownCard()], **owl)


def test_a_worker_that_was_frozen_while_another_took_its_card_saves_its_job_and_ends(
    held: HeldLab, caplog: pytest.LogCaptureFixture
) -> None:
    terminate = signal.signal(signal.SIGTERM, lambda *_: None)  # a node sends it to itself, which ends Celery
    job_id = held.submit(steps=1000)
    (place,) = held.start(devices=[ShownCard()])
    held.until(job_id, lambda job: job.has_checkpoint)
    for gpu in ("GPU-bbbb", ShownCard.uuid):  # a first look at the card would ask who serves it
        held.store.cards.see(node_state("owl:0", gpu=gpu, instance="owl"))
    with held.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE nodes SET seen_at = '2000-01-01 00:00:00' WHERE node = 'heron:0'")
    job = held.until(job_id, lambda job: job.status is Status.QUEUED, seconds=60)
    held.stop()
    signal.signal(signal.SIGTERM, terminate)
    assert isinstance(place.drain.why, CardTaken) and job.has_checkpoint
    assert "owl:0 serves the card of heron:0: heron:0 claims nothing more, and ends once" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_node_waits_first_for_another_on_its_card_and_then_for_its_own_of_before(held: HeldLab) -> None:
    """After a restart of the machine that numbers its cards otherwise: no other box has its name."""
    (place,) = held.places(devices=[ShownCard()])
    before = {**vars(read_identity(place.settings)), "boot": "before"}
    held.store.cards.see(node_state("heron:1", gpu=ShownCard.uuid, **before))
    held.clock.sleep(5)
    held.store.cards.see(node_state("heron:0", gpu="GPU-bbbb", **before))
    held.start(devices=[ShownCard()])
    rows = {row.node: (row.gpu, row.boot == "before") for row in held.store.cards.nodes()}
    assert rows == {"heron:0": (ShownCard.uuid, False), "heron:1": (ShownCard.uuid, True)}
