"""What a worker may use of this machine: cores, memory and instructions, by affinity, control groups, Slurm and the
owner's settings.

Nothing is cached: each call sees the current limits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loractl.common.errors import UsageError

ROOT = Path("/")
"""Where proc and sys are."""

_MIB = 2**20


def allowed_cores(root: Path = ROOT) -> int:
    """The cores that the calling thread, and anything it starts, may keep busy. Raises UsageError."""
    bounds = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine_cores()]  # macOS has none
    bounds += [max(1, int(quota)) for group in _groups("cpu", root) if (quota := _quota(group)) is not None]
    bounds += [number for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE") if (number := _number(name))]
    return min(bounds)


def machine_cores() -> int:
    """All that the machine has."""
    return os.cpu_count() or 1


def threads_of_trainer(trainers: int) -> int:
    """The threads of one trainer when this many share the cores: no more than OMP_NUM_THREADS. Raises UsageError."""
    share = max(1, allowed_cores() // trainers)
    return min(share, _number("OMP_NUM_THREADS") or share)


def allowed_memory(root: Path = ROOT) -> int | None:
    """Bytes of RAM; None if only the machine's own RAM is the limit. Raises UsageError."""
    bounds = [limit for group in _groups("memory", root) if (limit := _limit(group)) is not None]
    bounds += [size * _MIB for size in (_number("SLURM_MEM_PER_NODE"), _slurm_by_core()) if size]
    return min(bounds, default=None)


def memory_room(root: Path = ROOT) -> int | None:
    """Bytes until the fullest control group reaches its limit; None if none has one."""
    rooms = [room for group in _groups("memory", root) if (room := _room(group)) is not None]
    return min(rooms, default=None)


def kernel_kills(root: Path = ROOT) -> int | None:
    """Processes that the kernel has ever killed for memory: in our group, else on the machine; None: unknown."""
    for group in _groups("memory", root):
        for file in ("memory.events", "memory.oom_control"):
            if (count := _count(group / file, "oom_kill")) is not None:
                return count
    return _count(root / "proc/vmstat", "oom_kill")


def kernel_kills_since(before: int | None) -> int | None:
    """Those since an earlier count; None if either is unknown."""
    now = kernel_kills()
    return None if before is None or now is None else now - before


def _number(name: str) -> int | None:
    """The variable's number, the first of a list; None if it is unset, or 0. Raises UsageError."""
    text = os.environ.get(name, "").partition(",")[0].strip()
    if text and not text.isdecimal():
        raise UsageError(f"{name}={os.environ[name]} is not a number", f"set it to one, like {name}=4, or unset it")
    return int(text or 0) or None


def _slurm_by_core() -> int | None:
    cores = _number("SLURM_CPUS_ON_NODE") or _number("SLURM_CPUS_PER_TASK")
    size = _number("SLURM_MEM_PER_CPU")
    return None if size is None or cores is None else size * cores


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control groups and of their parents, in the hierarchies that have the controller.

    In a container the mount shows a part of the hierarchy, and the group may be outside of it.
    """
    # each line: the hierarchy, its controllers (none in version 2), the group
    paths = {names: path for _, names, path in (line.split(":", 2) for line in _lines(root / "proc/self/cgroup"))}
    for line in _lines(root / "proc/self/mountinfo"):
        about, _, kind = line.partition(" - ")
        top, point = about.split()[3:5]
        system, _, options = kind.split(maxsplit=2)
        if system == "cgroup2":
            path = paths.get("")
        elif system == "cgroup" and controller in options.split(","):
            path = next((path for names, path in paths.items() if controller in names.split(",")), None)
        else:
            continue
        if path is None:
            continue
        mounted = root / point.lstrip("/")
        inside = Path(path).is_relative_to(top) and ".." not in path
        below = Path(path).relative_to(top) if inside else Path()
        yield from (mounted / part for part in (below, *below.parents))


def _quota(group: Path) -> float | None:
    """Cores that the group may keep busy, may be a fraction; None: any."""
    v2 = _text(group / "cpu.max").split()
    quota, period = v2 if v2 else (_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _limit(group: Path) -> int | None:
    """Bytes; None: as many as the machine has. Version 1 says so with a number beyond all memory."""
    text = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
    return int(text) if text.isdecimal() and int(text) < 2**62 else None


def _room(group: Path) -> int | None:
    """Bytes. Cached files count as used, but the kernel gives them back when asked."""
    limit, used = _limit(group), _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
    if limit is None or not used.isdecimal():
        return None
    files = [_count(group / "memory.stat", name) for name in ("total_inactive_file", "inactive_file")]
    return limit - int(used) + (files[0] or files[1] or 0)


def _count(path: Path, name: str) -> int | None:
    """A number by its name, in a file with one name and number per line."""
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name} ")), None)


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    """Empty if this machine has no such file, or we may not read it."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


MOST_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""oneDNN's own variables for the instructions that it may use at most."""

_NO_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of these variables that exclude bf16 instructions."""


def shows_bf16() -> bool:
    """Whether bf16 products have their own instructions here, as Linux shows it: what `has_bf16` asks torch, which a
    node does not load."""
    return bf16_allowed() and not {"avx512_bf16", "amx_tile"}.isdisjoint(cpuinfo("flags").split())


def bf16_allowed() -> bool:
    """Whether oneDNN may use bf16 instructions."""
    return instructions_allowed() not in _NO_BF16


def instructions_allowed() -> str:
    """The most that oneDNN may use, by its variables; empty: all."""
    return next((os.environ[name].upper() for name in MOST_ONEDNN if name in os.environ), "")


def cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty if there is none."""
    lines = _lines(Path("/proc/cpuinfo"))
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
