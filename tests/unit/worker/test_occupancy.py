"""Who holds a device's memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from loractl.worker.device import occupancy
from loractl.worker.device.devices import CpuDevice
from loractl.worker.device.occupancy import (
    CARD_VARIABLE,
    HIGH_WATER_S,
    JOB_VARIABLE,
    RUN_VARIABLE,
    OwnTrainer,
    Watch,
    end_leftovers,
    run_mark,
)
from loractl.worker.device.snapshot import Process, Snapshot

from ...waiting import until_shown

GIB = 2**30

NOBODY = 2**22 + 1
"""Beyond any process number of this machine."""


@dataclass(kw_only=True)
class Shown:
    """A card that shows what a test says."""

    processes: tuple[Process, ...] | None = ()
    held: int = 0  # beside the processes
    index: int = 0
    uuid: str = "GPU-1"
    name: str = "card"
    kind: str = "nvml"
    trains_on: str = "cpu"
    total: int = 80 * GIB

    def look(self) -> Snapshot:
        used = sum(p.bytes or 0 for p in self.processes or ())
        return Snapshot(free=self.total - self.held - used, load=3, temperature=40, processes=self.processes)

    def environment(self) -> dict[str, str]:
        return {}


@contextmanager
def program(**variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, with these variables in its environment."""
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, **variables})
    until_shown(process.pid)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(occupancy.SYSTEM, "now", lambda: seconds)


def test_a_rank_that_another_card_s_node_has_started_is_its_job_s(tmp_path: Path) -> None:
    marks = {JOB_VARIABLE: "12", CARD_VARIABLE: f"{tmp_path}:box:0"}
    with program(**marks) as rank, program(**marks | {CARD_VARIABLE: "/other/home:box:0"}) as stranger:
        listed = (Process(pid=rank.pid, bytes=10 * GIB), Process(pid=stranger.pid, bytes=3 * GIB))
        seen = Watch(device=Shown(processes=listed), node_pid=NOBODY, home=tmp_path).look()
    assert seen.used == {"12": 10 * GIB} and [other["pid"] for other in seen.others] == [stranger.pid]
    assert seen.outside == 3 * GIB


def test_trainers_are_distinguished_from_other_people_s_programs() -> None:
    with program(**{JOB_VARIABLE: "12"}) as trainer, program() as notebook:
        mine, others = Process(pid=trainer.pid, bytes=10 * GIB), Process(pid=notebook.pid, bytes=20 * GIB)
        seen = Watch(device=Shown(processes=(mine, others), held=GIB), node_pid=os.getpid()).look()
    assert seen.used == {"12": 10 * GIB}
    assert seen.outside == 21 * GIB, "the driver's own part is not for jobs either"
    user = psutil.Process().username()
    assert seen.others == [{"pid": notebook.pid, "user": user, "name": "sleep", "bytes": 20 * GIB}]
    assert (seen.load, seen.temperature) == (3, 40)


@pytest.mark.parametrize("lists_children", [True, False])
def test_what_a_trainer_has_started_is_its_job_s_on_every_kernel(
    lists_children: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lists_children:
        monkeypatch.setattr(occupancy, "_PROC", tmp_path)
    started = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(started, stdout=subprocess.PIPE, env={**os.environ, JOB_VARIABLE: "12"}) as trainer:
        assert trainer.stdout is not None
        child = psutil.Process(int(trainer.stdout.readline()))
        while child.name() != "sleep":  # it is a copy of the shell first
            time.sleep(0.001)
        until_shown(child.pid)
        seen = Watch(device=Shown(processes=(Process(pid=child.pid, bytes=GIB),)), node_pid=os.getpid()).look()
        child.kill()
        trainer.wait()
    assert seen.used == {"12": GIB}


def test_a_trainer_that_the_driver_lists_after_its_end_is_still_ours() -> None:
    shown = Shown()
    watch = Watch(device=shown, node_pid=os.getpid())
    with program(**{JOB_VARIABLE: "12"}) as trainer:
        shown.processes = (Process(pid=trainer.pid, bytes=10 * GIB),)
        watch.look()
    seen = watch.look()
    assert (seen.used, seen.outside, seen.others) == ({"12": 10 * GIB}, 0, [])


def test_a_pid_that_is_reused_after_a_trainer_s_end_is_not_ours() -> None:
    shown = Shown()
    watch = Watch(device=shown, node_pid=os.getpid())
    with program(**{JOB_VARIABLE: "12"}) as trainer:
        mine = (Process(pid=trainer.pid, bytes=10 * GIB),)
        shown.processes = mine
        watch.look()
    shown.processes = ()
    watch.look()
    shown.processes = mine
    assert watch.look().outside == 10 * GIB


def test_memory_of_a_trainer_that_came_and_went_between_two_looks_is_seen() -> None:
    shown = Shown(processes=(Process(pid=NOBODY, bytes=10 * GIB),))
    watch = Watch(device=shown, node_pid=os.getpid())
    assert watch.look().used == {}, "without being told, it is some stranger's"
    watch.own = lambda: [OwnTrainer(job="12", pids=frozenset({NOBODY}))]
    assert watch.look().used == {"12": 10 * GIB}


@pytest.mark.parametrize(
    "listed", [None, (), "without bytes", "of the host"], ids=["WSL", "nothing", "no bytes", "foreign numbers"]
)
def test_if_the_driver_does_not_say_our_trainers_hold_what_they_report(listed: object) -> None:
    """Others' memory that came meanwhile is seen, which the memory before our job alone could not tell."""
    shown = Shown(processes=None, held=4 * GIB)
    watch = Watch(device=shown, node_pid=os.getpid())
    assert watch.look().outside == 4 * GIB
    with program(**{JOB_VARIABLE: "12"}) as trainer, program() as somebody:
        mine = [OwnTrainer(job="12", pids=frozenset({trainer.pid}))]
        watch.own = lambda: mine
        if listed == "without bytes":
            listed = (Process(pid=trainer.pid, bytes=None), Process(pid=somebody.pid, bytes=None))
        elif listed == "of the host":  # one of them is by chance a number of ours
            listed, watch.sees_us = (Process(pid=somebody.pid, bytes=9 * GIB), Process(pid=NOBODY, bytes=GIB)), False
        shown.processes, known = listed, sum(p.bytes or 0 for p in listed or ())
        shown.held = 20 * GIB - known
        seen = watch.look()
        assert (seen.outside, seen.used) == (4 * GIB, {"12": 16 * GIB}), "before its first word all that is new"
        mine = [OwnTrainer(job="12", pids=frozenset({trainer.pid}), held=6 * GIB)]
        seen = watch.look()
        assert (seen.outside, seen.used) == (14 * GIB, {"12": 6 * GIB})
    if watch.sees_us is False:
        seen = watch.look()
        assert (seen.outside, seen.others) == (20 * GIB, []), (
            "what the driver still lists of ours is held by nobody else"
        )
        shown.processes, shown.held = (), 4 * GIB
        assert watch.look().outside == 4 * GIB


def test_a_process_of_another_container_has_no_name_but_still_counts() -> None:
    pid = next(pid for pid in range(2**22 - 1, 1, -1) if not psutil.pid_exists(pid))
    seen = Watch(device=Shown(processes=(Process(pid=pid, bytes=GIB),)), node_pid=os.getpid()).look()
    assert (seen.outside, seen.others) == (GIB, [{"pid": pid, "user": None, "name": None, "bytes": GIB}])


def test_what_others_held_at_most_stays_theirs_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown()
    watch = Watch(device=shown, node_pid=os.getpid())
    held = []
    for moment, size in ((0.0, 5), (10, 20), (20, 2), (609, 2), (611, 2), (700, 0), (1310, 0), (1312, 0)):
        at(monkeypatch, moment)
        shown.processes = (Process(pid=2**22 - 2, bytes=size * GIB),) if size else ()
        held.append(watch.look().outside // GIB)
    assert HIGH_WATER_S == 600
    assert held == [5, 20, 20, 20, 2, 2, 0, 0]


def test_a_box_s_owner_may_choose_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(processes=(Process(pid=2**22 - 2, bytes=20 * GIB),))
    watch = Watch(device=shown, node_pid=os.getpid(), high_water_s=8)
    at(monkeypatch, 0)
    watch.look()
    shown.processes = ()
    at(monkeypatch, 7)
    assert watch.look().outside == 20 * GIB
    at(monkeypatch, 8)
    assert watch.look().outside == 0


def test_a_driver_that_does_not_list_processes_still_tells_what_is_free() -> None:
    seen = Watch(device=Shown(processes=None, held=30 * GIB), node_pid=os.getpid()).look()
    assert (seen.outside, seen.others, seen.used) == (30 * GIB, [], {})


def test_a_card_with_a_fault_has_nothing_to_give_and_says_why() -> None:
    device = SimpleNamespace(kind="nvml", total=GIB, look=lambda: Snapshot(free=0, fault="it is lost"))
    seen = Watch(device=device, node_pid=os.getpid()).look()
    assert (seen.fault, seen.used, seen.others) == ("it is lost", {}, [])


def test_a_card_that_exists_for_placement_alone_has_nothing_of_others() -> None:
    seen = Watch(device=Shown(processes=None, held=30 * GIB, kind="sim"), node_pid=os.getpid()).look()
    assert (seen.outside, seen.used) == (0, {})


def test_on_a_processor_a_trainer_s_resident_memory_is_its_own() -> None:
    with program(**{JOB_VARIABLE: "12"}):
        seen = Watch(device=CpuDevice(total=psutil.virtual_memory().total), node_pid=os.getpid()).look()
    assert set(seen.used) == {"12"} and 0 < seen.used["12"] < GIB
    assert 0 <= seen.outside <= psutil.virtual_memory().total


def test_in_a_container_the_drivers_numbers_are_not_ours_and_our_memory_is_still_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVML counts by the host's process numbers there, or lists nothing: the look before our job tells what is ours."""
    shown = {"free": 20 * GIB, "processes": ()}
    device = SimpleNamespace(kind="nvml", total=24 * GIB, look=lambda: Snapshot(**shown))
    job = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, JOB_VARIABLE: "7"}
    )
    until_shown(job.pid)
    try:
        watch, late = Watch(device=device, node_pid=os.getpid()), Watch(device=device, node_pid=os.getpid())
        monkeypatch.setattr(occupancy, "_trainers", lambda pid: {})
        assert watch.look().outside == 4 * GIB
        monkeypatch.undo()
        for listed in ((), (Process(pid=NOBODY, bytes=9 * GIB),)):
            shown |= {"free": 11 * GIB, "processes": listed}
            seen = watch.look()
            assert (seen.outside, seen.used) == (4 * GIB, {"7": 9 * GIB})
            assert late.look().outside is None, "one that has never looked without our job can't tell"
    finally:
        job.kill()
        job.wait()
    shown |= {"free": 20 * GIB, "processes": ()}
    assert watch.look().outside == 4 * GIB, "and nothing of our job is held against anybody afterwards"


def test_what_an_attempt_leaves_behind_is_ended_also_outside_its_session_and_nothing_else() -> None:
    mine, other = run_mark("token of mine"), run_mark("token of another")
    assert mine != other and "token" not in mine
    command = [sys.executable, "-c", "import time; time.sleep(60)"]

    def start(mark: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, env={**os.environ, RUN_VARIABLE: mark}, start_new_session=True)
        until_shown(process.pid)
        return process

    left, foreign = start(mine), start(other)
    try:
        assert end_leftovers(mine) == []
        assert not psutil.pid_exists(left.pid)
        assert foreign.poll() is None
    finally:
        for process in (left, foreign):
            process.kill()
            process.wait()
