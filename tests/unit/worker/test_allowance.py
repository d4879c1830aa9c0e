"""What of a machine a worker may use: by affinity, control groups of both versions, Slurm and the owner's word."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loractl.common.errors import UsageError
from loractl.common.settings import load_settings
from loractl.worker.allowance import (
    allowed_cores,
    allowed_memory,
    kernel_kills,
    machine_cores,
    memory_room,
    threads_of_trainer,
)  # fmt: skip
from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.workplace import Drain
from loractl.worker.device.devices import find_devices
from loractl.worker.node.monitor import NodeOptions
from loractl.worker.node.node import place_of

MIB, GIB = 2**20, 2**30
OWN = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU")
Machine = Callable[[dict[str, str]], Path]

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = [
    "31 23 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
    "35 23 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
]


@pytest.fixture(autouse=True)
def _no_bounds_of_the_test_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return make


@pytest.fixture
def two_cores() -> Iterator[list[int]]:
    """Two cores that this thread may run on, and gets back."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("this machine gives the tests one core")
    two = sorted(mine)[:2]
    os.sched_setaffinity(0, two)
    yield two
    os.sched_setaffinity(0, mine)


def test_a_trainer_gets_the_cores_that_it_may_run_on_and_the_next_one_follows_a_change(
    two_cores: list[int], tmp_path: Path
) -> None:
    settings = load_settings({"LORACTL_HOME": str(tmp_path), "LORACTL_DEVICES": "cpu"})
    (device,) = find_devices(settings)
    place = place_of(settings, device, NodeOptions(), Drain())
    total = machine_cores()
    of = f"{total} cores" if total == 2 else f"2 of {total} cores"
    assert (device.name, common_environment(place)["OMP_NUM_THREADS"]) == (f"CPU, {of}", "2")
    os.sched_setaffinity(0, two_cores[:1])
    assert (device.name, common_environment(place)["OMP_NUM_THREADS"]) == (f"CPU, 1 of {total} cores", "1")


def test_what_the_owner_or_slurm_says_bounds_a_trainer_s_threads(
    two_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (threads_of_trainer(1), threads_of_trainer(2), threads_of_trainer(8)) == (2, 1, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (threads_of_trainer(1), allowed_cores()) == (1, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "64,2")
    assert threads_of_trainer(1) == 2, "more than there are only wait for each other"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert (threads_of_trainer(1), allowed_cores()) == (1, 1)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "many")
    with pytest.raises(UsageError, match="SLURM_CPUS_PER_TASK=many"):
        allowed_cores()


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "100000 100000"},
        {
            "proc/self/cgroup": "0::/lab.slice/worker.service", "proc/self/mountinfo": V2,
            "sys/fs/cgroup/lab.slice/cpu.max": "150000 100000",
            "sys/fs/cgroup/lab.slice/worker.service/cpu.max": "max 100000",
        },
        {  # a container that sees its own group alone, without a namespace for it
            "proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "50000 100000",
            "proc/self/mountinfo": V2.replace(" / ", " /docker/1f "),
        },
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/job/step\n4:memory:/job\n0::/", "proc/self/mountinfo": "\n".join(V1),
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["v2", "v2 parent", "v2 container", "v1 parent"],
)  # fmt: skip
def test_a_quota_bounds_the_cores(files: dict[str, str], machine: Machine, two_cores: list[int]) -> None:
    assert allowed_cores(machine(files)) == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "max 100000",
         "sys/fs/cgroup/memory.max": "max"},
        {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2},
    ],
    ids=["no groups", "no limit", "no file"],
)  # fmt: skip
def test_without_a_limit_the_affinity_is_all(files: dict[str, str], machine: Machine, two_cores: list[int]) -> None:
    root = machine(files)
    assert (allowed_cores(root), allowed_memory(root), memory_room(root)) == (2, None, None)


GROUPS = {
    "v2": {
        "proc/self/cgroup": "0::/lab/worker", "proc/self/mountinfo": V2,
        "sys/fs/cgroup/lab/memory.max": str(8 * GIB), "sys/fs/cgroup/lab/memory.current": str(7 * GIB),
        "sys/fs/cgroup/lab/memory.stat": f"anon 1\ninactive_file {GIB}",
        "sys/fs/cgroup/lab/worker/memory.max": str(6 * GIB), "sys/fs/cgroup/lab/worker/memory.current": str(GIB),
    },
    "v1": {
        "proc/self/cgroup": "4:memory:/lab/worker", "proc/self/mountinfo": "\n".join(V1),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(20 * GIB),
        "sys/fs/cgroup/memory/lab/memory.limit_in_bytes": str(8 * GIB),
        "sys/fs/cgroup/memory/lab/memory.usage_in_bytes": str(7 * GIB),
        "sys/fs/cgroup/memory/lab/memory.stat": f"cache 1\ninactive_file 0\ntotal_inactive_file {GIB}",
        "sys/fs/cgroup/memory/lab/worker/memory.limit_in_bytes": str(6 * GIB),
        "sys/fs/cgroup/memory/lab/worker/memory.usage_in_bytes": str(GIB),
    },
}  # fmt: skip


@pytest.mark.parametrize("version", GROUPS)
def test_the_tightest_group_bounds_the_memory_and_the_fullest_what_is_free(version: str, machine: Machine) -> None:
    root = machine(GROUPS[version])
    assert (allowed_memory(root), memory_room(root)) == (6 * GIB, 2 * GIB)


def test_slurm_bounds_the_memory(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    root = machine(GROUPS["v2"])
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node's
    assert allowed_memory(root) == 6 * GIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert allowed_memory(root) == 2 * GIB
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert allowed_memory(root) == 3 * 512 * MIB
    (device,) = find_devices(load_settings({"LORACTL_HOME": str(root), "LORACTL_DEVICES": "cpu"}))
    assert device.total <= 3 * 512 * MIB
    assert device.look().free <= device.total


KILLS = {
    "v2": (
        {**GROUPS["v2"], "sys/fs/cgroup/lab/worker/memory.events": "oom 9\noom_kill 2", "proc/vmstat": "oom_kill 7"},
        2,
    ),
    "v1": ({**GROUPS["v1"], "sys/fs/cgroup/memory/lab/worker/memory.oom_control": "under_oom 0\noom_kill 3"}, 3),
    "machine": ({**GROUPS["v2"], "proc/vmstat": "pgfault 1\noom_kill 7"}, 7),
    "not counted": (GROUPS["v2"], None),
}


@pytest.mark.parametrize("case", KILLS)
def test_the_kernel_s_own_count_of_its_kills_is_read_where_it_is(case: str, machine: Machine) -> None:
    files, count = KILLS[case]
    assert kernel_kills(machine(files)) == count
