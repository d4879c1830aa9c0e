"""Who holds a device's memory: our trainers by job, processes of this box that reserved some (`generate`, `chat`,
`serve`), and others by process, including their high-water mark.

Who reserves has a file under LORACTL_HOME, which it keeps locked. The lock ends with its process, however that ends. A
node reads the files whenever it looks at its card, so a claim can't give away what is reserved but not yet allocated.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import psutil

from loractl.common.settings import Settings, make_private
from loractl.worker.clock import SYSTEM, NodeClock

from .devices import Device
from .snapshot import Process, Snapshot


@dataclass(frozen=True, kw_only=True)
class CardShare:
    """A process's share of a card. It lasts while the file is open."""

    bytes: int
    file: IO[str]
    path: Path

    def close(self) -> None:
        """Release it before the process ends."""
        self.path.unlink(missing_ok=True)
        self.file.close()


def reserve(home: Path, uuid: str, size: int) -> CardShare:
    """Reserve `size` bytes of a card for this process. Raises OSError."""
    folder = _folder(home, uuid)
    make_private(folder)
    path = folder / f"{os.getpid()}.json"
    aside = path.with_suffix(".part")
    file = aside.open("w", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump({"pid": os.getpid(), "bytes": size}, file)
    file.flush()
    aside.replace(path)  # it appears locked and complete; the lock belongs to the file, whatever its name
    return CardShare(bytes=size, file=file, path=path)


def unused_reservations(home: Path, uuid: str, processes: Iterable[Process] | None, outside: int) -> int:
    """Bytes that are reserved but not yet held by their processes.

    `processes`: what the driver reports on the card; None if it does not say whose memory is whose. Then `outside`,
    which is not held by our jobs, counts as theirs.
    """
    reserved = reserved_by_process(home, uuid)
    if processes is None:
        return max(0, sum(reserved.values()) - outside)
    held = {process.pid: process.bytes or 0 for process in processes}
    return sum(max(0, size - held.get(pid, 0)) for pid, size in reserved.items())


def reserved_by_process(home: Path, uuid: str) -> dict[int, int]:
    """pid -> bytes of the live processes."""
    reserved: dict[int, int] = {}
    for path in _folder(home, uuid).glob("*.json"):
        try:
            with path.open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    kept = json.load(file)
                    reserved[int(kept["pid"])] = int(kept["bytes"])
                else:
                    path.unlink(missing_ok=True)  # its process has ended
        except FileNotFoundError:
            continue  # it ended in between
    return reserved


def _folder(home: Path, uuid: str) -> Path:
    return home / "cards" / uuid


JOB_VARIABLE = "LORACTL_JOB"
"""The variable with the job's number, for a trainer and all processes that it starts."""

RUN_VARIABLE = "LORACTL_RUN"
"""The variable with a number unique to the attempt, among all loractl installations on the box."""

CARD_VARIABLE = "LORACTL_CARD"
"""The variable with its card, by its node's name and home."""

RANK_VARIABLE = "LORACTL_RANK_CARD"
"""The variable with the card of a process that another card's node started: a rank of a job on several cards."""

HIGH_WATER_S = 600.0
"""The most that other people's processes held stays reserved for them for this long, unless the box's owner says
otherwise: a notebook that frees memory takes it again."""


_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class OwnTrainer:
    """What this node knows about the trainers of one attempt."""

    job: str
    pids: frozenset[int]  # of all that it started for the attempt, including ended ones
    held: int | None = None  # bytes of the device that the running trainer reports; None: no report yet


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """A device's memory at one moment. Bytes."""

    outside: int | None  # held by programs that are not ours, now or a short while ago; None: unknown
    others: list[dict[str, Any]]  # other people's processes: pid, user, name, bytes
    used: dict[str, int]  # by our jobs
    load: int | None = None  # percent
    temperature: int | None = None  # °C
    fault: str | None = None  # why nothing can run on the device, with the next step
    self_test: dict[str, Any] | None = None  # what the device could do before it served; None: no test


@dataclass(kw_only=True)
class Watch:
    """Watches one device."""

    device: Device
    node_pid: int  # its descendants are ours
    high_water_s: float = HIGH_WATER_S
    home: Path | None = None  # LORACTL_HOME, where other processes than jobs reserve; its nodes' jobs are ours
    own: Callable[[], Collection[OwnTrainer]] = tuple  # the trainers of the node's attempts
    sees_us: bool | None = None  # whether the driver lists this box's processes under our PIDs; None: unknown
    fault: str | None = None  # why the device may not serve, by its self-test
    self_test: dict[str, Any] | None = None  # what the self-test showed
    clock: NodeClock = SYSTEM
    _looking: threading.Lock = field(default_factory=threading.Lock)
    _ours: dict[int, str] = field(default_factory=dict)  # pid -> job, kept while the driver lists it, which lags
    _idle: int | None = None  # bytes held when none of our trainers ran
    _others: list[tuple[float, int]] = field(default_factory=list)  # time, bytes of other people's processes

    def look(self) -> Occupancy:
        """The device's state now; any thread may call this."""
        with self._looking:
            seen = self._look()
            return replace(seen, fault=seen.fault or self.fault, self_test=self.self_test)

    def fault_of_device(self) -> str | None:
        """The device's own fault now, whatever its self-test said."""
        with self._looking:
            return self.device.look().fault

    def _look(self) -> Occupancy:
        trainers, own = _trainers(self.node_pid), self.own()  # before looking: a process that ends in between was ours
        seen = self.device.look()
        if seen.fault is not None:
            return Occupancy(outside=0, others=[], used={}, fault=seen.fault)
        if self.device.kind == "sim" and seen.processes is None:
            return Occupancy(outside=self._reserved(None, 0), others=[], used={})
        # the supervisors report them too: a trainer that came and went between two looks may have left memory behind
        told = {pid: attempt.job for attempt in own for pid in attempt.pids}
        told |= {pid: job for pid, (job, _) in trainers.items()}
        neighbours = self._neighbours(seen, told)
        # our processes are known while they run or the driver lists them: after that, a PID may be reused
        listed = seen.processes or ()
        pids = {process.pid for process in listed}
        self._ours = {pid: job for pid, job in self._ours.items() if pid in pids} | told | neighbours
        if self.device.kind == "cpu":
            return self._account(seen, _sums(trainers.values()), [])
        if self._is_told_by_process(seen, trainers):
            mine = [(self._ours[p.pid], p.bytes or 0) for p in listed if p.pid in self._ours]
            running = bool(trainers or neighbours)
            return self._account(seen, _sums(mine), [p for p in listed if p.pid not in self._ours], running)
        return self._by_word(seen, {job for job, _ in trainers.values()}, own)

    def _neighbours(self, seen: Snapshot, known: Collection[int]) -> dict[int, str]:
        """Processes of jobs on several cards that run on this card, but were started by another card's node on this
        box."""
        if self.home is None:
            return {}
        listed = {process.pid for process in seen.processes or ()} - set(known) - self._ours.keys()
        found, ours = {pid: _environment(pid) for pid in listed}, f"{self.home}:"  # how a card_mark of this home begins
        return {
            pid: own[JOB_VARIABLE]
            for pid, own in found.items()
            if own.get(CARD_VARIABLE, "").startswith(ours) and JOB_VARIABLE in own
        }

    def _is_told_by_process(self, seen: Snapshot, trainers: Mapping[int, Any]) -> bool:
        """Whether the driver says how many bytes our processes hold.

        WSL and some containers list no processes, or no bytes; other containers list the host's PIDs. Without a trainer
        nothing of ours could be missed.
        """
        if not trainers or seen.processes is None:
            return not trainers
        mine = [process for process in seen.processes if process.pid in self._ours]
        if mine:
            return any(process.bytes is not None for process in mine)
        if self.sees_us is not None:
            return self.sees_us  # whether the self-test's own process was found
        return any(psutil.pid_exists(process.pid) for process in seen.processes)

    def _account(self, seen: Snapshot, used: dict[str, int], others: list[Process], running: bool = False) -> Occupancy:
        """Memory that is held but not ours belongs to others."""
        held = self.device.total - seen.free
        if not running:
            self._idle = held
        # with PIDs of another namespace, a trainer of ours that just ended looks like a stranger
        named = [] if self.sees_us is False else others
        outside = max(0, held - sum(used.values()))
        # what `serve` and the like held is free when they end: it was reserved, so it is not taken again without asking
        reserving = {} if self.home is None else reserved_by_process(self.home, self.device.uuid)
        kept = self._rest_of_high_water(sum(p.bytes or 0 for p in named if p.pid not in reserving))
        told = None if self.sees_us is False else seen.processes
        return Occupancy(
            outside=outside + kept + self._reserved(told, outside),
            others=[_named(p) for p in named],
            used=used,
            load=seen.load,
            temperature=seen.temperature,
        )

    def _by_word(self, seen: Snapshot, jobs: set[str], own: Collection[OwnTrainer]) -> Occupancy:
        """If the driver does not say: our trainers hold what they report.

        Until each has reported, memory beyond what was held before our jobs came counts as theirs.
        """
        held = self.device.total - seen.free
        used = {trainer.job: trainer.held for trainer in own if trainer.held is not None and trainer.job in jobs}
        silent = sorted(jobs - set(used))
        if silent and self._idle is None:
            return Occupancy(outside=None, others=[], used=used, load=seen.load, temperature=seen.temperature)
        rest = max(0, held - (self._idle or 0) - sum(used.values()))
        used |= {job: rest // len(silent) for job in silent}
        outside = max(0, held - sum(used.values()))
        return Occupancy(
            outside=outside + self._reserved(None, outside),
            others=[],
            used=used,
            load=seen.load,
            temperature=seen.temperature,
        )

    def _reserved(self, processes: Iterable[Process] | None, outside: int) -> int:
        """Bytes that `serve` and the like have reserved but do not hold yet."""
        return 0 if self.home is None else unused_reservations(self.home, self.device.uuid, processes, outside)

    def _rest_of_high_water(self, now_held: int) -> int:
        """Bytes that others held recently, beyond what they hold now."""
        now = self.clock.now()
        self._others = [(at, held) for at, held in self._others if now - at < self.high_water_s]
        self._others.append((now, now_held))
        return max(held for _, held in self._others) - now_held


def run_mark(token: str) -> str:
    """An attempt's number in its processes' environment: derived from its token, which must stay secret."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def card_mark(settings: Settings, node: str) -> str:
    """A card in its processes' environment. A home serves a card with only one node at a time (its lock)."""
    return f"{settings.home}:{node}"


def runs_of(card: str, *variables: str) -> set[str]:
    """The marks of all attempts with a process on this card: with CARD_VARIABLE those that the card's own node started,
    with RANK_VARIABLE another node's."""
    environments = map(_environment, psutil.pids())
    here = (own for own in environments if any(own.get(variable) == card for variable in variables))
    return {own[RUN_VARIABLE] for own in here if RUN_VARIABLE in own}


def end_leftovers(run: str) -> list[int]:
    """Kill all that an attempt started and left behind, even outside its session; returns what is still there."""
    left = [process for process in psutil.process_iter() if _environment(process.pid).get(RUN_VARIABLE) == run]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(left, timeout=5)
    return [process.pid for process in alive]


def _environment(pid: int) -> dict[str, str]:
    """Empty for a zombie, and for a process that has ended or may not be read."""
    try:
        return psutil.Process(pid).environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return {}


def _trainers(node_pid: int) -> dict[int, tuple[str, int]]:
    """pid -> (job, resident bytes) of the node's trainers and all that they started."""
    trainers: dict[int, tuple[str, int]] = {}
    for pid in _descendants(node_pid):
        try:
            child = psutil.Process(pid)
            job = child.environ().get(JOB_VARIABLE)
            if job is not None:
                trainers[pid] = job, int(child.memory_info().rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has just ended
    return trainers


def _descendants(pid: int) -> list[int]:
    """All that the process has started and that still descends from it.

    A claim waits for this, and psutil would read every process of the box.
    """
    if (_PROC / f"{pid}/task/{pid}/children").exists():  # not on every kernel
        try:
            return list(_listed_below(pid))
        except OSError:
            pass  # a thread or a child has just ended
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _listed_below(pid: int) -> Iterator[int]:
    for children in (_PROC / f"{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from _listed_below(child)


def _sums(held: Collection[tuple[str, int]]) -> dict[str, int]:
    """Bytes by job."""
    used: dict[str, int] = {}
    for job, size in held:
        used[job] = used.get(job, 0) + size
    return used


def _named(process: Process) -> dict[str, Any]:
    """A process for people: its user and its program's name, never its arguments."""
    try:
        info = psutil.Process(process.pid)
        user, name = info.username(), info.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
        user, name = None, None  # in another container, or gone
    return {"pid": process.pid, "user": user, "name": name, "bytes": process.bytes}
