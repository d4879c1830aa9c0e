"""`loractl worker` between its Ctrl-Cs: what it orders its nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from loractl.common.errors import ExitCode
from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Status
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.device.devices import SimulatedDevice
from loractl.worker.node import box, terminal
from loractl.worker.node.box import Box
from loractl.worker.node.lock import read_identity

from ..factories import node_state, submission

Idle = tuple[Store, Callable[[], str]]
"""The store, and what runs the worker to its end and gives its last line."""

NODE = 'trap "" TERM; echo > "$1.begun"; read order; echo "$order" > "$1"'
"""A node that goes on after SIGTERM, as one that writes a checkpoint, until it has an order."""


def run(worker: Box, *, drain_when_idle: bool) -> int:
    """And leave the signals of this process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        return worker.run(drain_when_idle=drain_when_idle)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_stops_at_once_however_soon_it_comes(
    tmp_path: Path, upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the worker waits for its nodes, too: they would go on without it for as long as a checkpoint takes."""
    told, began, popen = tmp_path / "told", threading.Event(), subprocess.Popen

    def node(_: Any, **how: Any) -> subprocess.Popen[str]:
        process = popen(["sh", "-c", NODE, "sh", str(told)], **how)
        while not told.with_suffix(".begun").exists():
            assert process.poll() is None
        began.set()
        return process

    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "box"})
    (settings.home / "run").mkdir(parents=True)
    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
    store = Store(connect(settings))
    store.cards.see(node_state("box:0", **vars(read_identity(settings))))
    worker = Box(settings, store, [device], {})
    monkeypatch.setattr(box.subprocess, "Popen", node)
    monkeypatch.setattr(box.Terminal, "say", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    threading.Thread(target=lambda: began.wait(60) and os.kill(os.getpid(), signal.SIGINT), daemon=True).start()
    try:
        code = run(worker, drain_when_idle=False)
    except KeyboardInterrupt:
        pytest.fail("the worker has left its nodes to themselves")
    assert (code, told.read_text()) == (ExitCode.INTERRUPTED, "now\n")
    assert store.cards.nodes() == [], "status said for a minute that the worker is being stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_meets_a_query_whose_server_goes_is_not_lost(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """psycopg cancels the query that is interrupted, and raises what the connection says to that in its place."""
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
    (settings.home / "run").mkdir(parents=True)
    store, looks, popen = Store(connect(settings)), iter(range(1, 4)), subprocess.Popen

    def ask() -> bool:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        raise OperationalError("SELECT", None, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(box.subprocess, "Popen", lambda _, **how: popen(["sh", "-c", "read order"], **how))
    monkeypatch.setattr(box.time, "sleep", lambda _: next(looks))
    monkeypatch.setattr(box, "WATCH_S", 0.0)
    monkeypatch.setattr(store, "takes_writes", ask)
    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
    assert run(Box(settings, store, [device], {}), drain_when_idle=False) == ExitCode.OK
    assert next(looks) == 2, "it asked once"


def test_a_worker_that_ends_when_idle_waits_for_what_its_nodes_say_of_their_cards(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended before the first job: without their rows no box has the two cards that the job asks for."""
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
    (settings.home / "run").mkdir(parents=True)
    devices = [SimulatedDevice(index=index, uuid=f"SIM-{index}", name="sim", total=8 * GIB) for index in (0, 1)]
    store, looks, popen = Store(connect(settings)), iter(range(1, 30)), subprocess.Popen
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=4 * GIB, qlora=None))
    job_id = store.jobs.submit(replace(submission(method="lora"), ways=Ways(alone=False, gangs=(way,))))

    def look(_: float) -> None:
        number = next(looks)
        if number == 4:
            for device in devices:
                seen = node_state(f"heron:{device.index}", total=8 * GIB, gangs=True, **vars(read_identity(settings)))
                store.cards.see(seen)
        if number == 8:
            store.jobs.cancel(job_id, "ada")

    monkeypatch.setattr(box.subprocess, "Popen", lambda _, **how: popen(["sh", "-c", "read order"], **how))
    monkeypatch.setattr(box.time, "sleep", look)
    assert run(Box(settings, store, devices, {}), drain_when_idle=True) == ExitCode.OK
    assert next(looks) > 8


def test_a_worker_that_ends_when_idle_waits_for_no_job_of_a_card_that_was_given_up(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
    (settings.home / "run").mkdir(parents=True)
    sizes = {"0": 80 * GIB, "1": 24 * GIB}
    devices = [SimulatedDevice(index=int(n), uuid=f"SIM-{n}", name="sim", total=size) for n, size in sizes.items()]
    store, looks, popen = Store(connect(settings)), iter(range(1, 30)), subprocess.Popen
    store.jobs.submit(submission(lora=40, qlora=None, method="lora"))

    def node(command: list[str], **how: Any) -> subprocess.Popen[str]:
        fails = command[command.index("--index") + 1] == "0"
        process = popen(["sh", "-c", "exit 1" if fails else "read order"], **how)
        if fails:
            process.wait()
        return process

    def look(_: float) -> None:
        next(looks)
        store.cards.see(node_state("heron:1", total=24 * GIB, **vars(read_identity(settings))))

    monkeypatch.setattr(box.subprocess, "Popen", node)
    monkeypatch.setattr(box.time, "sleep", look)
    assert run(Box(settings, store, devices, {}), drain_when_idle=True) == ExitCode.OK
    assert store.jobs.matching()[0].status is Status.QUEUED


def test_a_login_that_may_not_serve_is_told_so_once(upgraded_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "box"})
    (settings.home / "run").mkdir(parents=True)
    starts, popen = [], subprocess.Popen

    def node(_: Any, **how: Any) -> subprocess.Popen[str]:
        starts.append(process := popen(["sh", "-c", f"exit {os.EX_NOPERM}"], **how))
        process.wait()
        return process

    monkeypatch.setattr(box.subprocess, "Popen", node)
    monkeypatch.setattr(box.time, "sleep", lambda _: None)
    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=GIB)
    assert run(Box(settings, Store(connect(settings)), [device], {}), drain_when_idle=False) == ExitCode.FAILED
    assert len(starts) == 1, "the next one would be refused, too"


@pytest.fixture
def idle(upgraded_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Idle:
    """A worker of the cards heron:0 and heron:1 that ends when no job is left for it."""
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
    (settings.home / "run").mkdir(parents=True)
    sizes = (8 * GIB, 24 * GIB)
    devices = [SimulatedDevice(index=n, uuid=f"SIM-{n}", name="sim", total=size) for n, size in enumerate(sizes)]
    store, popen = Store(connect(settings)), subprocess.Popen

    def look(_: float) -> None:
        for device in devices:
            seen = node_state(f"heron:{device.index}", total=device.total, **vars(read_identity(settings)))
            store.cards.see(seen)

    def last_line() -> str:
        assert run(Box(settings, store, list(devices), {}), drain_when_idle=True) == ExitCode.OK
        return capfd.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(box.subprocess, "Popen", lambda _, **how: popen(["sh", "-c", "read order"], **how))
    monkeypatch.setattr(box.time, "sleep", look)
    return store, last_line


def test_a_job_for_other_boxes_and_a_held_one_keep_no_worker_and_are_named(idle: Idle) -> None:
    store, last_line = idle
    for _ in range(2):
        store.jobs.submit(submission(resources={"node_labels": {"nvlink": "yes"}}))
    store.jobs.hold(store.jobs.submit(submission()), "ada")
    assert last_line() == "No job that fits this box is left: jobs 1, 2 wait for another box, job 3 is held."


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("heron:1", "heron:1, which is drained"),
        ("heron", "heron:0, which is drained, or for heron:1, which is drained"),
    ],
)
def test_a_job_that_only_a_drained_card_could_take_keeps_no_worker(idle: Idle, target: str, named: str) -> None:
    store, last_line = idle
    store.jobs.submit(submission(lora=12, qlora=12))
    store.cards.drain(target, "ada", "new driver")
    assert last_line() == f"No job that fits this box is left: job 1 waits for another box, or for {named}."


def test_a_card_that_could_not_be_read_is_served_by_another_node_once_it_can(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was lost and is reset: its node knows neither its number nor its size."""
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
    (settings.home / "run").mkdir(parents=True)
    unread = SimulatedDevice(index=0, uuid="unread-0", name="card 0", total=0)
    well = SimulatedDevice(index=1, uuid="SIM-1", name="sim", total=8 * GIB)
    shown, nodes, popen, now = [unread], list[subprocess.Popen[str]](), subprocess.Popen, [0.0]

    def node(_: Any, **how: Any) -> subprocess.Popen[str]:
        nodes.append(popen(["sh", "-c", "read order"], **how))
        return nodes[-1]

    def look(seconds: float) -> None:
        now[0] += seconds
        if now[0] == 30:
            assert len(nodes) == 2, "it is still not to be read"
            shown[0] = replace(unread, uuid="SIM-0", total=24 * GIB)
        if now[0] > 30 and len(nodes) == 3:
            raise KeyboardInterrupt
        assert now[0] < 90
        for process in nodes[:1] if now[0] > 45 else []:
            process.wait(timeout=20)  # which was asked to stop

    monkeypatch.setattr(box, "find_device", lambda settings, number: shown[0])
    monkeypatch.setattr(box.subprocess, "Popen", node)
    monkeypatch.setattr(box, "time", SimpleNamespace(sleep=look, monotonic=lambda: now[0]))
    worker = Box(settings, Store(connect(settings)), [unread, well], {})
    assert run(worker, drain_when_idle=False) == ExitCode.OK
    assert [process.returncode for process in nodes] == [-signal.SIGTERM] * 3
    assert now[0] <= 30 + 2 * box.FIND_AGAIN_S
    assert [device.total for device in worker._devices] == [24 * GIB, 8 * GIB]


class HangingNode:
    """A node's process that serves nothing, and obeys a request to stop unless it is deaf."""

    pid, stdin = 1, SimpleNamespace(write=lambda _: None, flush=lambda: None)

    def __init__(self, *, deaf: bool) -> None:
        self.sent = list[str]()
        self.returncode: int | None = None
        self._deaf = deaf

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.sent.append("SIGTERM")
        self.returncode = None if self._deaf else 0

    def kill(self) -> None:
        self.sent.append("SIGKILL")
        self.returncode = -signal.SIGKILL


@pytest.fixture
def hang(upgraded_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """Runs a worker whose nodes never write their row, the second one deaf; gives what was sent to the first three."""
    settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_HOST": "heron"})
    (settings.home / "run").mkdir(parents=True)
    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
    nodes, now = list[HangingNode](), [0.0]

    def start(*_: Any, **__: Any) -> HangingNode:
        nodes.append(HangingNode(deaf=len(nodes) == 1))
        return nodes[-1]

    def look(seconds: float) -> None:
        now[0] += seconds
        assert now[0] < 20 * box.STUCK_S
        if len(nodes) == 4:
            raise KeyboardInterrupt

    def serve() -> list[list[str]]:
        worker = Box(settings, Store(connect(settings)), [device], {})
        assert run(worker, drain_when_idle=False) == ExitCode.OK
        return [node.sent for node in nodes[:3]]

    monkeypatch.setattr(box.subprocess, "Popen", start)
    monkeypatch.setattr(box, "served_by", lambda *_: HangingNode.pid)  # so that it did not fail at its start
    monkeypatch.setattr(box, "time", SimpleNamespace(sleep=look, monotonic=lambda: now[0]))
    return serve


IN_TURN = [["SIGTERM"], ["SIGTERM", "SIGKILL"], ["SIGTERM"]]


def test_each_node_that_hangs_is_asked_to_stop_before_it_is_killed(hang: Callable[[], list[list[str]]]) -> None:
    """Also if the one before it was asked: a kill costs its jobs what they did since their last checkpoint."""
    assert hang() == IN_TURN


def test_a_worker_whose_terminal_nobody_reads_watches_its_nodes(
    hang: Callable[[], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-S."""
    monkeypatch.setattr(terminal, "FLUSH_S", 0.05)
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"unread ")
    os.set_blocking(write, True)
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        try:
            assert hang() == IN_TURN
        finally:
            os.close(read)
