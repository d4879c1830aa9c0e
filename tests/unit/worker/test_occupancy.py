"""Who holds a device's memory, and which cards a box has: through the real nvidia-ml-py on a stand-in library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pytest

from loractl.worker.device import occupancy
from loractl.worker.device.devices import CpuDevice, Process, Snapshot
from loractl.worker.device.occupancy import HIGH_WATER_S, JOB_VARIABLE, RUN_VARIABLE, Watch, end_leftovers, run_mark

from ...nvml import MIB, FakeCard, StandIn, build, compiler

GIB = 2**30

LOOK = """
import json, sys
from loractl.common.settings import load_settings
from loractl.worker.device.devices import find_devices
for device in find_devices(load_settings(), sys.argv[1] if len(sys.argv) > 1 else None):
    seen = device.look()
    print(json.dumps({
        "index": device.index, "uuid": device.uuid, "name": device.name, "total": device.total, "free": seen.free,
        "kind": device.kind, "load": seen.load, "temperature": seen.temperature, "sees": device.environment(),
        "processes": None if seen.processes is None else [[p.pid, p.bytes] for p in seen.processes],
    }))
"""

CARDS = (
    FakeCard(
        uuid="GPU-aaaa", total=24576, held=300, load=55, temperature=61, name="NVIDIA A10", processes=((7, 1000),)
    ),
    FakeCard(uuid="GPU-bbbb", total=81920, name="NVIDIA A100 80GB", processes=((8, None), (9, 4096), (10, 1))),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    if compiler() is None:
        pytest.skip("no C compiler for the NVML stand-in")
    return build(tmp_path_factory.mktemp("nvml"))


def look(library: StandIn, *only: str, code: int = 0, **environment: str) -> list[dict]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "CUDA_"))}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *only],
        env={**kept, **library.environment(), "LORACTL_HOME": str(library.folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()] if code == 0 else [{"error": done.stderr}]


def test_cards_are_seen_through_nvml_with_their_processes(library: StandIn) -> None:
    library.show(*CARDS)
    small, large = look(library)
    assert small == {
        "index": 0, "uuid": "GPU-aaaa", "name": "NVIDIA A10", "total": 24 * GIB, "free": (24576 - 1300) * MIB,
        "kind": "nvml", "load": 55, "temperature": 61, "sees": {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"},
        "processes": [[7, 1000 * MIB]],
    }  # fmt: skip
    assert large["processes"] == [[8, None], [9, 4096 * MIB], [10, MIB]], "the driver does not tell of 8"
    assert large["free"] == (81920 - 4097) * MIB
    library.show(CARDS[0])
    assert [card["uuid"] for card in look(library)] == ["GPU-aaaa"], "the file is read at every call"


def test_a_box_serves_the_cards_that_its_owner_or_its_scheduler_names(library: StandIn) -> None:
    library.show(*CARDS)
    for only in ("1", "GPU-b"):
        assert [card["uuid"] for card in look(library, only)] == ["GPU-bbbb"]
    assert [card["index"] for card in look(library, "1,0")] == [1, 0]
    assert [card["uuid"] for card in look(library, CUDA_VISIBLE_DEVICES="1")] == ["GPU-bbbb"]
    assert [card["index"] for card in look(library, CUDA_VISIBLE_DEVICES="GPU-bbbb")] == [1], "its index stays"
    assert "no card of this box" in look(library, "2", code=1)[0]["error"]
    assert "not one card" in look(library, "GPU", code=1)[0]["error"]
    hidden = look(library, "0", code=1, CUDA_VISIBLE_DEVICES="1")[0]["error"]
    assert "no card of this box" in hidden, "what a scheduler hides can't be asked for"


def test_the_stand_in_of_a_card_for_trials_trains_on_the_processor(library: StandIn) -> None:
    library.show(*CARDS)
    card = look(library, "0", LORACTL_DEVICES="nvml:cpu")[0]
    assert (card["kind"], card["sees"]) == ("sim", {"CUDA_VISIBLE_DEVICES": ""})


def test_without_a_driver_there_is_no_card(library: StandIn) -> None:
    library.file.unlink(missing_ok=True)
    assert [card["kind"] for card in look(library)] == ["cpu"]
    assert "NVML finds no NVIDIA card" in look(library, code=1, LORACTL_DEVICES="nvml")[0]["error"]


# --- whose memory it is ---


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
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(occupancy, "time", SimpleNamespace(monotonic=lambda: seconds))


def test_trainers_are_told_from_other_people_s_programs() -> None:
    with program(**{JOB_VARIABLE: "12"}) as trainer, program() as notebook:
        mine, others = Process(pid=trainer.pid, bytes=10 * GIB), Process(pid=notebook.pid, bytes=20 * GIB)
        seen = Watch(device=Shown(processes=(mine, others), held=GIB), node_pid=os.getpid()).look()
    assert seen.used == {"12": 10 * GIB}
    assert seen.outside == 21 * GIB, "the driver's own part is not for jobs either"
    user = psutil.Process().username()
    assert seen.others == [{"pid": notebook.pid, "user": user, "name": "sleep", "bytes": 20 * GIB}]
    assert (seen.load, seen.temperature) == (3, 40)


def test_a_trainer_that_the_driver_lists_after_its_end_is_still_ours() -> None:
    shown = Shown()
    watch = Watch(device=shown, node_pid=os.getpid())
    with program(**{JOB_VARIABLE: "12"}) as trainer:
        shown.processes = (Process(pid=trainer.pid, bytes=10 * GIB),)
        watch.look()
    seen = watch.look()
    assert (seen.used, seen.outside, seen.others) == ({"12": 10 * GIB}, 0, [])


def test_a_process_of_another_container_has_no_name_and_counts_all_the_same() -> None:
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
    nobody = 2**22 + 1  # beyond any process number of this machine
    shown = {"free": 20 * GIB, "processes": ()}
    device = SimpleNamespace(kind="nvml", total=24 * GIB, look=lambda: Snapshot(**shown))
    job = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, JOB_VARIABLE: "7"}
    )
    try:
        watch, late = Watch(device=device, node_pid=os.getpid()), Watch(device=device, node_pid=os.getpid())
        monkeypatch.setattr(occupancy, "_trainers", lambda pid: {})
        assert watch.look().outside == 4 * GIB
        monkeypatch.undo()
        for listed in ((), (Process(pid=nobody, bytes=9 * GIB),)):
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
        return subprocess.Popen(command, env={**os.environ, RUN_VARIABLE: mark}, start_new_session=True)

    left, foreign = start(mine), start(other)
    try:
        deadline = time.monotonic() + 10
        while psutil.Process(left.pid).environ().get(RUN_VARIABLE) != mine and time.monotonic() < deadline:
            time.sleep(0.05)  # until it has become the program that it was started as
        assert end_leftovers(mine) == []
        assert not psutil.pid_exists(left.pid)
        assert foreign.poll() is None
    finally:
        for process in (left, foreign):
            process.kill()
            process.wait()
