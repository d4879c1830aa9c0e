"""Who holds a device's memory: our trainers by job, and others by process, their high-water mark included."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loractl.common.settings import Settings

from .devices import Device, Process, Snapshot
from .reservations import unused_reservations

JOB_VARIABLE = "LORACTL_JOB"
"""The variable with the job's number, for a trainer and all that it starts."""

RUN_VARIABLE = "LORACTL_RUN"
"""The variable with a number that no other attempt has, of this or another loractl on the box."""

CARD_VARIABLE = "LORACTL_CARD"
"""The variable with the card that it runs on, by its node's name and home."""

HIGH_WATER_S = 600.0
"""The most that other people's processes held stays theirs for so long, unless the box's owner says otherwise: a
notebook that frees memory comes back."""


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """A device's memory at one moment. Bytes."""

    outside: int | None  # held by programs that are not ours, now or a short while ago; None: this process can't tell
    others: list[dict[str, Any]]  # other people's processes: pid, user, name, bytes
    used: dict[str, int]  # by our jobs
    load: int | None = None  # percent
    temperature: int | None = None  # °C


@dataclass(kw_only=True)
class Watch:
    """Looks at one device again and again."""

    device: Device
    node_pid: int  # its descendants are ours
    high_water_s: float = HIGH_WATER_S
    home: Path | None = None  # LORACTL_HOME, where processes that are no jobs reserve; None: they do not
    _looking: threading.Lock = field(default_factory=threading.Lock)
    _ours: dict[int, str] = field(default_factory=dict)  # pid -> job, kept after its end: the driver is slower
    _idle: int | None = None  # bytes held when none of our trainers ran
    _others: list[tuple[float, int]] = field(default_factory=list)  # time, bytes of other people's processes

    def look(self) -> Occupancy:
        """The device's state now; any thread may look."""
        with self._looking:
            return self._look()

    def _look(self) -> Occupancy:
        trainers = _trainers(self.node_pid)  # before the look: one that ends in between was ours
        seen = self.device.look()
        if self.device.kind == "sim" and seen.processes is None:
            return Occupancy(outside=self._reserved(None, 0), others=[], used={})
        self._ours |= {pid: job for pid, (job, _) in trainers.items()}
        used: dict[str, int] = {}
        others: list[Process] = []
        if seen.processes is None:  # a CPU, or a driver that does not tell
            if self.device.kind == "cpu":
                for job, resident in trainers.values():
                    used[job] = used.get(job, 0) + resident
        elif trainers and not any(p.pid in self._ours or psutil.pid_exists(p.pid) for p in seen.processes):
            return self._look_from_container(seen, sorted({job for job, _ in trainers.values()}))
        else:
            for process in seen.processes:
                owner = self._ours.get(process.pid)
                if owner is None:
                    others.append(process)
                else:
                    used[owner] = used.get(owner, 0) + (process.bytes or 0)
        if not trainers:
            self._idle = self.device.total - seen.free
        outside = max(0, self.device.total - seen.free - sum(used.values()))
        return Occupancy(
            outside=outside
            + self._rest_of_high_water(sum(p.bytes or 0 for p in others))
            + self._reserved(seen.processes, outside),
            others=[_named(p) for p in others],
            used=used,
            load=seen.load,
            temperature=seen.temperature,
        )

    def _look_from_container(self, seen: Snapshot, jobs: list[str]) -> Occupancy:
        """The driver may list the host's process numbers, which differ from ours, or none at all.

        Memory beyond what was held before our jobs came counts as our jobs'. Others' new memory is taken for ours
        until our jobs end: it counts as used, but inside what our jobs reserve.
        """
        held = self.device.total - seen.free
        ours = 0 if self._idle is None else max(0, held - self._idle)
        return Occupancy(
            outside=None if self._idle is None else held - ours + self._reserved(None, held - ours),
            others=[],
            used={job: ours // len(jobs) for job in jobs} if self._idle is not None else {},
            load=seen.load,
            temperature=seen.temperature,
        )

    def _reserved(self, processes: Iterable[Process] | None, outside: int) -> int:
        """Bytes that `serve` and its like have reserved and do not hold yet."""
        return 0 if self.home is None else unused_reservations(self.home, self.device.uuid, processes, outside)

    def _rest_of_high_water(self, now_held: int) -> int:
        """Bytes that others held lately beyond what they hold now."""
        now = time.monotonic()
        self._others = [(at, held) for at, held in self._others if now - at < self.high_water_s]
        self._others.append((now, now_held))
        return max(held for _, held in self._others) - now_held


def run_mark(token: str) -> str:
    """An attempt's number in its processes' environment: made from its token, which must stay secret."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def card_mark(settings: Settings, node: str) -> str:
    """A card in its processes' environment. A home serves a card with one node at a time (its lock)."""
    return f"{settings.home}:{node}"


def runs_of(card: str) -> set[str]:
    """The marks of all attempts that have a process on this card."""
    return {mark for p in psutil.process_iter() if (mark := _mark_on(p, card)) is not None}


def end_leftovers(run: str) -> list[int]:
    """Kill all that an attempt started and left behind, also outside its session; returns what is still there."""
    left = [p for p in psutil.process_iter() if _runs_for(p, run)]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(left, timeout=5)
    return [process.pid for process in alive]


def _runs_for(process: psutil.Process, run: str) -> bool:
    try:
        mine = process.status() != psutil.STATUS_ZOMBIE and process.environ().get(RUN_VARIABLE) == run
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return False
    return mine


def _mark_on(process: psutil.Process, card: str) -> str | None:
    try:
        environment = process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return None
    return environment.get(RUN_VARIABLE) if environment.get(CARD_VARIABLE) == card else None


def _trainers(node_pid: int) -> dict[int, tuple[str, int]]:
    """pid -> (job, resident bytes) of the node's trainers and all that they started."""
    trainers: dict[int, tuple[str, int]] = {}
    if not _has_children(node_pid):
        return trainers
    try:
        children = psutil.Process(node_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return trainers
    for child in children:
        try:
            job = child.environ().get(JOB_VARIABLE)
            if job is not None:
                trainers[child.pid] = job, int(child.memory_info().rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended since
    return trainers


def _has_children(pid: int) -> bool:
    """Whether the process has children. For an idle node this is ten times as fast as a walk over all."""
    try:
        return any(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return True  # a kernel without that file, or a thread that ended meanwhile: walk


def _named(process: Process) -> dict[str, Any]:
    """A process for people: its user and its program's name, never its arguments."""
    try:
        info = psutil.Process(process.pid)
        user, name = info.username(), info.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
        user, name = None, None  # of another container, or gone
    return {"pid": process.pid, "user": user, "name": name, "bytes": process.bytes}
