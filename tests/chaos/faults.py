"""What each fault does to the lab, and how it is healed."""

from __future__ import annotations

import contextlib
import datetime as dt
import glob
import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from sqlalchemy import bindparam, text
from sqlalchemy.exc import DBAPIError

from loractl.common.errors import WrongState
from loractl.common.job.status import Status
from loractl.common.store.store import Store
from loractl.worker.device.occupancy import JOB_VARIABLE, RUN_VARIABLE, run_mark

from .deck import Fault
from .history import Hit, Span, Window
from .lab import Box, Lab
from .outages import hold_locks, hold_row, hold_write_lock, use_up_connections
from .trainer import BAD_CARDS
from .traps import in_a_checkpoint

MAX_RETRIES = 2
"""What the lab does to a job must not spend them. A trainer that is killed does."""

FRESH_S = 30.0

WAIT_S = 15.0
"""A fault that finds nothing to hit looks for it so long, then it is dropped and not counted."""


SLOW_LINK_S, SLOW_STORE_S = 0.1, 0.2
"""How late each piece of up to 64 KiB arrives."""

CLOCK_S = 3600
"""A box's clock jumps by this at most, forward or back."""

STOP_S = 120.0
"""A box that is stopped in order has ended by then: its last writes may wait for an outage or a full disk."""

BACK_S = 0.5
"""Between two looks whether what was killed is back."""

BACK_AT_LAST_S = 30.0
"""So long what was killed is waited for; a card without a job starts no trainer."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """A fault that is active until what it took is back, or for so long."""

    kind: str
    start: dt.datetime
    until: float  # by time.monotonic
    is_back: Callable[[], bool]


@dataclass
class Injector:
    """Deals the faults, and heals each in its time."""

    lab: Lab
    store: Store
    done: Counter[str] = field(default_factory=Counter)
    losses: list[Hit] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    cancelled: dict[int, dt.datetime] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)  # to be cancelled, also where nobody said that it was heard
    torn: set[str] = field(default_factory=set)
    stuck: list[str] = field(default_factory=list)  # what did not end when it was asked to
    trainers_killed: int = 0
    _killed: Counter[str] = field(default_factory=Counter)  # trainers of each job
    postgres_back: list[dt.datetime] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # by the hostile login, with success
    bad: set[str] = field(default_factory=set)  # boxes whose cards fail every job
    went_bad: set[str] = field(default_factory=set)  # also those that were mended since
    _heals: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _open: list[Open] = field(default_factory=list)
    _looked: float = 0.0  # whether anything is back
    _kind: str = ""  # of the fault that is dealt now
    _waiting: list[tuple[float, Fault]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _busy: set[str] = field(default_factory=set)  # what a fault holds at this moment
    _hanging: dict[str, list[psutil.Process]] = field(default_factory=dict)  # box -> its stopped calls of the store

    def offer(self, fault: Fault) -> None:
        self._waiting.append((time.monotonic() + WAIT_S, fault))

    def tick(self) -> None:
        """Heal what is due, try what waits, and keep the boxes running as a service manager would."""
        while self._heals and self._heals[0][0] <= time.monotonic():
            heapq.heappop(self._heals)[2]()
        for waiting in list(self._waiting):
            until, fault = waiting
            self._kind = fault.kind
            try:
                hit = self._inject(fault)
            except psutil.NoSuchProcess:  # it ended by itself just now: look for another one
                hit = False
            if hit:
                self.done[fault.kind] += 1
                self.log.append(f"{_now():%H:%M:%S.%f} {fault.kind}")
            if hit or time.monotonic() > until:
                self._waiting.remove(waiting)
        self._look()
        for box in self.lab.boxes:
            if box.name in self._hanging:
                self._hang(box)
            if box.wanted and not box.runs:
                box.start()

    def _look(self) -> None:
        """Close the faults whose victims are back."""
        now = time.monotonic()
        if now < self._looked + BACK_S:
            return
        self._looked = now
        for fault in list(self._open):
            try:
                over = now > fault.until or fault.is_back()
            except psutil.NoSuchProcess:
                over = False
            if over:
                self._open.remove(fault)
                self.spans.append(Span(kind=fault.kind, start=fault.start, end=_now()))

    @property
    def active(self) -> bool:
        """Whether a fault lasts, or waits for something to hit."""
        return bool(self._open or self._waiting)

    def spans_so_far(self) -> list[Span]:
        """What is active still ends now."""
        return self.spans + [Span(kind=fault.kind, start=fault.start, end=_now()) for fault in self._open]

    def end(self) -> None:
        """The run is over: close what is active still."""
        self.spans = self.spans_so_far()
        self._open.clear()

    def heal_all(self) -> None:
        """End every fault now."""
        self._waiting.clear()
        for name in list(self.bad):
            self.repair(name)
        while self._heals:
            heapq.heappop(self._heals)[2]()
            time.sleep(0.05)  # a box that stops in order is looked at again

    # --- each kind ---

    def _inject(self, fault: Fault) -> bool:
        kind, box = fault.kind, self.lab.boxes[int(fault.pick * len(self.lab.boxes))]
        if kind.endswith(("a node", "a trainer", "not lead", "second card")):
            return self._hit_process(fault, box)
        if kind == "power cut, a finished result torn":  # a short moment: whichever box comes to it
            return any(self._power_cut(fault, box) for box in self.lab.boxes)
        if kind.startswith("power cut"):
            return self._power_cut(fault, box)
        whole = {
            "kill a box": self._kill_box, "stop a box in order": self._stop_box, "freeze a box": self._freeze_box,
            "hang a box's calls of the store": self._hang_calls,
            "kill a fork server": self._hit_fork_server, "freeze a fork server": self._hit_fork_server,
            "start nodes in an outage of PostgreSQL": self._start_in_outage,
            "a box that is bad for good": self._go_bad,
            "kill a trainer in a checkpoint": self._kill_in_checkpoint,
            "kill a rank in a checkpoint": self._kill_in_checkpoint,
            "cut a box off the store": self._cut_store,
            "move a box's clock": self._move_clock,
        }  # fmt: skip
        if kind in whole:
            return whole[kind](fault, box)
        if any(word in kind for word in ("off", "silence", "link")):
            return self._disturb_link(fault, box)
        rest = {
            "kill Valkey": self._kill_valkey,
            "kill and wipe Valkey": self._kill_valkey,
            "crash PostgreSQL": self._crash_postgres,
            "make PostgreSQL read-only": self._forbid_writes,
            "fill the store's disk": self._fill,
            "cancel a job": self._cancel,
            "tear a stored checkpoint": self._tear_stored,
            "a hostile login that holds locks": self._hold_locks,
            "hold a running job's row": self._hold_row,
            "use up PostgreSQL's connections": self._use_up,
            "fill the database's disk": self._fill_database,
            "hold SQLite's write lock": self._hold_write_lock,
            "slow the store": self._slow_store,
            "kill the store's server": self._kill_s3,
        }
        return rest[kind](fault)

    def _hit_process(self, fault: Fault, box: Box) -> bool:
        """A trainer, a rank that follows one, or the node of either."""
        at_node, second = "node" in fault.kind, "second" in fault.kind or "rank" in fault.kind
        found = box.followers() if second else box.trainers()
        if at_node:  # an idle one is no loss
            nodes = box.nodes()
            found = {index: nodes[index] for index in found.keys() & nodes.keys()}
        free = {i: p for i, p in found.items() if f"{box.name}:{i}" not in self._busy and box.name not in self._busy}
        if not free:
            return False
        index = sorted(free)[int(fault.pick * 997) % len(free)]
        process, node = free[index], f"{box.name}:{index}"
        kills = fault.kind.startswith("kill")
        if kills and not at_node and not self._may_kill(process):
            return False
        if at_node:
            self._note_losses([node], final=kills)
        if kills:
            self.trainers_killed += not at_node
            if second and not at_node:
                self._note_rank(process)
            process.kill()
            if at_node:  # also of what it had just claimed
                self.windows.append(Window(start=_now(), end=_now(), box=node))
            self._until_back(lambda: self._is_new(fault.kind, box, index, process))
            return True
        process.suspend()  # a trainer's supervisors beat on: nothing may come of it
        self._heal_later(self._frozen_s(fault), lambda: _resume([process]), node, card=node if at_node else None)
        return True

    def _is_new(self, kind: str, box: Box, index: int, old: psutil.Process) -> bool:
        """Whether another process is in the place of one that was killed: a node, or a trainer on that card."""
        found = box.nodes if "node" in kind else box.followers if "rank" in kind else box.trainers
        there = found()
        return index in there and there[index] != old

    def _may_kill(self, process: psutil.Process) -> bool:
        """Whether its job has a retry left, which a killed trainer spends: else it fails, and rightly."""
        job = process.environ().get(JOB_VARIABLE, "")  # none in a trainer of several, whose end spends nothing
        if job and self._killed[job] >= MAX_RETRIES:
            return False
        self._killed[job] += 1
        return True

    def _note_rank(self, process: psutil.Process) -> None:
        """Remember whose rank is killed."""
        mark, job_id = (process.environ().get(name, "") for name in (RUN_VARIABLE, JOB_VARIABLE))
        with contextlib.suppress(DBAPIError), self.lab.engine.connect() as connection:
            tokens = connection.execute(
                text("SELECT attempt, token FROM attempts WHERE job_id = :job"), {"job": int(job_id)}
            )
            for attempt, token in tokens:
                if run_mark(token) == mark:
                    self.losses.append(Hit(at=_now(), job_id=int(job_id), attempt=attempt, final=True, rank=True))

    def _frozen_s(self, fault: Fault) -> float:
        """One in five wakes within its lease, and nothing may come of it; the others find another attempt at work."""
        return self.lab.lease_s * (0.6 if fault.share < 0.2 else 1.5 + fault.share)

    def _kill_box(self, fault: Fault, box: Box) -> bool:
        if not self._usable(box) or not box.trainers():
            return False
        self._note_losses(self._cards(box), final=True)
        box.kill()
        self._down(box, 0.5 + 1.5 * self.lab.lease_s * fault.share)
        return True

    def _stop_box(self, fault: Fault, box: Box) -> bool:
        if not self._usable(box):
            return False
        assert box.process
        box.process.terminate()
        self._busy.add(box.name)
        box.wanted = False
        self._await_end(box, time.monotonic() + STOP_S)
        self._until_back(lambda: self._serves(box))
        return True

    def _await_end(self, box: Box, until: float) -> None:
        def look() -> None:
            if box.runs and time.monotonic() > until:
                self.stuck.append(f"{box.name} was stopped in order and served on")
                box.kill()
            if box.runs:
                self._await_end(box, until)
            else:
                box.wanted = True
                self._busy.discard(box.name)

        heapq.heappush(self._heals, (time.monotonic() + 0.2, next(self._numbers), look))

    def _freeze_box(self, fault: Fault, box: Box) -> bool:
        if not self._usable(box):
            return False
        family = box.family()
        self._note_losses(self._cards(box), final=False)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        self._heal_later(self._frozen_s(fault), lambda: _resume(family), box.name, box)
        return True

    def _power_cut(self, fault: Fault, box: Box) -> bool:
        """Kill a box and damage what it wrote last: no file was flushed in time."""
        work = box.home / "work"
        if not self._usable(box):
            return False
        if "checkpoint" in fault.kind:
            markers = _found(work, "*/attempt-*/checkpoints/*/loractl-complete.json")
            victims = [newest.parent / "optimizer.bin"] if (newest := _newest(markers)) else []
        elif "result" in fault.kind:
            ready = _newest([path for path in _found(work, "*/attempt-*/ready.json") if _is_fresh(path)])
            victims = _found(ready.parent / "result", "**/*.safetensors") if ready else []
        else:
            victims = _found(box.home / "cache" / "datasets", "*.jsonl")[:1]
        if not victims:
            return False
        self._note_losses(self._cards(box), final=True)
        box.kill()
        torn = False
        for victim in victims:
            with contextlib.suppress(FileNotFoundError):  # it was just removed
                _tear(victim, fault.share)
                torn = True
        self._down(box, 0.5 + 0.5 * self.lab.lease_s * fault.share)
        if not torn:
            self.done["kill a box"] += 1
        return torn

    def _tear_stored(self, fault: Fault) -> bool:
        manifest = _newest(_found(self.lab.disk.artifacts, "jobs/*/checkpoints/*/manifest.json"))
        if manifest is None:
            return False
        folder = manifest.parent
        self.torn.add(folder.relative_to(self.lab.disk.artifacts).as_posix())
        with contextlib.suppress(FileNotFoundError):
            _tear(folder / "optimizer.bin", fault.share)
            return True
        return False

    def _kill_valkey(self, fault: Fault) -> bool:
        if "valkey" in self._busy:
            return False
        self.lab.valkey.kill(wipe="wipe" in fault.kind)
        self._heal_later(self.lab.lease_s * fault.share, self.lab.valkey.start, "valkey")
        return True

    def _crash_postgres(self, fault: Fault) -> bool:
        if "postgres" in self._busy:
            return False
        self._crash_postgres_for(self.lab.lease_s * 1.2 * fault.share)
        return True

    def _crash_postgres_for(self, seconds: float) -> None:
        def restart() -> None:
            self.lab.postgres.start()
            self.postgres_back.append(_now())

        self.lab.postgres.crash()
        self._heal_later(seconds, restart, "postgres", database=True)

    def _start_in_outage(self, fault: Fault, box: Box) -> bool:
        """The nodes of a box start while living jobs of the others can't beat for longer than a lease."""
        if "postgres" in self._busy or not self._usable(box):
            return False
        self._note_losses(self._cards(box), final=True)
        self._crash_postgres_for(self.lab.lease_s * 1.4)
        for node in box.nodes().values():
            node.kill()  # the worker starts it again, within the outage
        return True

    def _forbid_writes(self, fault: Fault) -> bool:
        """As after a failover: the server answers, and refuses every write."""
        if "postgres" in self._busy:
            return False
        self.lab.postgres.forbid_writes()
        seconds = self.lab.lease_s * (0.5 + fault.share)
        self._heal_later(seconds, self.lab.postgres.permit_writes, "postgres", database=True)
        return True

    def _disturb_link(self, fault: Fault, box: Box) -> bool:
        service = "valkey" if "Valkey" in fault.kind else "postgres"
        name, link = f"{box.name} {service}", box.queue if service == "valkey" else box.database
        if "submit" in fault.kind:
            name, link = "client", self.lab.client
        if name in self._busy:
            return False
        if "silence" in fault.kind:
            link.silence("up" if "box to server" in fault.kind else "down")
        elif "slow" in fault.kind:
            link.slow(SLOW_LINK_S)
        else:
            link.cut()
        seconds = self.lab.lease_s * 1.5 * fault.share
        self._heal_later(seconds, link.heal, name, box if name == f"{box.name} postgres" else None)
        return True

    def _hold_locks(self, fault: Fault) -> bool:
        seconds = self.lab.lease_s * (1.2 + fault.share)
        return self._go_on(seconds, "hostile", partial(hold_locks, self.lab, self.said))

    def _hold_row(self, fault: Fault) -> bool:
        query = text("SELECT job_id FROM jobs WHERE status = 'running' ORDER BY job_id")
        found: list[int] = []
        with contextlib.suppress(DBAPIError), self.lab.engine.connect() as connection:
            found += connection.scalars(query)
        if not found:
            return False
        job = found[int(fault.share * len(found))]
        seconds = self.lab.lease_s * (1.2 + fault.pick)
        return self._go_on(seconds, "a row", partial(hold_row, self.lab, job), job=job)

    def _use_up(self, fault: Fault) -> bool:
        seconds = self.lab.lease_s * (0.3 + fault.share)
        return self._go_on(seconds, "postgres", partial(use_up_connections, self.lab), database=True)

    def _go_on(
        self,
        seconds: float,
        busy: str,
        work: Callable[[threading.Event], None],
        *,
        job: int | None = None,
        database: bool = False,
    ) -> bool:
        """Something that is done in a thread of its own until the fault is healed."""
        if busy in self._busy:
            return False
        over = threading.Event()
        thread = threading.Thread(target=work, args=(over,))
        thread.start()

        def end() -> None:
            over.set()
            thread.join()

        self._heal_later(seconds, end, busy, job=job, database=database)
        return True

    def _hold_write_lock(self, fault: Fault) -> bool:
        seconds = self.lab.lease_s * (0.5 + fault.share)
        return self._go_on(seconds, "postgres", partial(hold_write_lock, self.lab), database=True)

    def _fill_database(self, fault: Fault) -> bool:
        if "postgres" in self._busy:
            return False

        def free() -> None:
            self.lab.database.disk.free()
            self.lab.database.start()  # PostgreSQL ends where its log has no room
            self.postgres_back.append(_now())

        self.lab.database.disk.fill()
        self._heal_later(self.lab.lease_s * (0.5 + fault.share), free, "postgres", database=True)
        return True

    def _slow_store(self, fault: Fault) -> bool:
        links = [box.store for box in self.lab.boxes if box.store is not None]
        if "S3" in self._busy:
            return False
        for link in links:
            link.slow(SLOW_STORE_S)

        def end() -> None:
            for link in links:
                link.heal()

        self._heal_later(self.lab.lease_s * (0.5 + 1.5 * fault.share), end, "S3")
        return True

    def _kill_s3(self, fault: Fault) -> bool:
        if "S3" in self._busy or self.lab.s3 is None:
            return False
        self.lab.s3.stop()
        self._heal_later(self.lab.lease_s * fault.share, self.lab.s3.start, "S3")
        return True

    def _cut_store(self, fault: Fault, box: Box) -> bool:
        if "S3" in self._busy or box.store is None:
            return False
        box.store.cut()
        self._heal_later(self.lab.lease_s * 1.5 * fault.share, box.store.heal, "S3")
        return True

    def _move_clock(self, fault: Fault, box: Box) -> bool:
        """Forward or back, and after a while back to the true time."""
        name = f"{box.name} clock"
        if name in self._busy:
            return False
        box.move_clock(int((2 * fault.share - 1) * CLOCK_S))
        self._heal_later(self.lab.lease_s * (1 + fault.share), lambda: box.move_clock(0), name)
        return True

    def _fill(self, fault: Fault) -> bool:
        if "store" in self._busy:
            return False
        self.lab.disk.fill()
        self._heal_later(self.lab.lease_s * fault.share, self.lab.disk.free, "store")
        return True

    def _go_bad(self, fault: Fault, box: Box) -> bool:
        """From now on each card of the box fails every job at once, so that it is always idle. A person mends it when
        loractl has drained it, or when the storm is over."""
        if self.bad or not box.runs:
            return False
        (box.home / BAD_CARDS).touch()
        self._until_back(lambda: box.name not in self.bad, 3600.0)
        self.bad.add(box.name)
        self.went_bad.add(box.name)
        return True

    def mend(self) -> int:
        """What a person does: look at what loractl has drained, mend that box, open it again. Returns how many."""
        with contextlib.suppress(DBAPIError):
            targets = [target for target, order in self.store.cards.drains().items() if order.user == "loractl"]
            for target in targets:
                self.repair(target.partition(":")[0])
                self.store.cards.end_drain(target)
            return len(targets)
        return 0

    def repair(self, name: str) -> None:
        for box in self.lab.boxes:
            if box.name == name:
                (box.home / BAD_CARDS).unlink(missing_ok=True)
        self.bad.discard(name)

    def _kill_in_checkpoint(self, fault: Fault, box: Box) -> bool:
        """A trainer in the middle of a checkpoint's file, or another rank of it."""
        others = "rank" in fault.kind
        if not self._usable(box) or (victim := in_a_checkpoint(box, others=others)) is None:
            return False
        if not self._may_kill(victim):
            return False
        self.trainers_killed += 1
        if others:
            self._note_rank(victim)
        victim.kill()
        return True

    def _hit_fork_server(self, fault: Fault, box: Box) -> bool:
        """No attempt may fail: its trainer is a new process then."""
        name, servers = f"{box.name} fork server", box.fork_servers()
        if name in self._busy or not self._usable(box) or not servers:
            return False
        process = servers[int(fault.pick * 997) % len(servers)]
        if fault.kind.startswith("kill"):
            process.kill()
            return True
        process.suspend()
        self._heal_later(self._frozen_s(fault), lambda: _resume([process]), name)
        return True

    def _hang_calls(self, fault: Fault, box: Box) -> bool:
        """Each process of the box that makes calls of the store stands still, also those that come: no call has an
        answer or an error, as on a hard NFS mount without its server."""
        name = f"{box.name} store"
        if name in self._busy or not self._usable(box) or not box.store_calls():
            return False
        self._hanging[box.name] = []

        def wake() -> None:
            _resume(self._hanging.pop(box.name))

        self._hang(box)
        self._heal_later(self.lab.lease_s * (0.5 + 1.5 * fault.share), wake, name)
        return True

    def _hang(self, box: Box) -> None:
        stands = self._hanging[box.name]
        for process in box.store_calls():
            if process not in stands:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
                    stands.append(process)

    def _cancel(self, fault: Fault) -> bool:
        """Of a waiting or running job; a job in its last moments may still end well."""
        try:
            jobs = self.store.jobs.matching(statuses=[Status.RUNNING, Status.QUEUED])
            jobs = [job for job in jobs if job.job_id not in self.cancelled]
            if not jobs:
                return False
            job = jobs[int(fault.share * len(jobs))]
            self.asked.add(job.job_id)
            self.store.jobs.cancel(job.job_id, "chaos")
        except (DBAPIError, WrongState):  # the database is away, or the job has just ended: nothing was promised
            return False
        self.cancelled[job.job_id] = _now()
        return True

    # --- shared ---

    def _usable(self, box: Box) -> bool:
        held = {box.name, *self._cards(box)} & self._busy
        return box.runs and box.wanted and not held

    def _cards(self, box: Box) -> list[str]:
        return [f"{box.name}:{index}" for index in range(box.cards)]

    def _down(self, box: Box, seconds: float) -> None:
        def up() -> None:
            box.wanted = True

        box.wanted = False
        self._heal_later(seconds, up, box.name, box, is_back=lambda: self._serves(box))

    def _serves(self, box: Box) -> bool:
        return box.wanted and len(box.nodes()) == box.cards

    def _heal_later(
        self,
        seconds: float,
        heal: Callable[[], None],
        busy: str,
        box: Box | None = None,
        *,
        card: str | None = None,
        job: int | None = None,
        database: bool = False,
        is_back: Callable[[], bool] | None = None,
    ) -> None:
        """`busy`: what no other fault may touch until then. `box`, `card`, `database`, `job`'s row: what is away then.
        `is_back`: whether what was taken is there again; the fault is active as long as it is not."""
        began, away, kind = _now(), card if box is None else box.name, self._kind

        def end() -> None:
            heal()
            self._busy.discard(busy)
            if is_back is None:
                self.spans.append(Span(kind=kind, start=began, end=_now()))
            else:
                until = time.monotonic() + BACK_AT_LAST_S
                self._open.append(Open(kind=kind, start=began, until=until, is_back=is_back))
            if database or away is not None or job is not None:
                self.windows.append(Window(start=began, end=_now(), box=None if database else away, job=job))

        self._busy.add(busy)
        heapq.heappush(self._heals, (time.monotonic() + seconds, next(self._numbers), end))

    def _until_back(self, is_back: Callable[[], bool], seconds: float = BACK_AT_LAST_S) -> None:
        """The fault that is dealt now is active until then, for so many seconds at most."""
        until = time.monotonic() + seconds
        self._open.append(Open(kind=self._kind, start=_now(), until=until, is_back=is_back))

    def _note_losses(self, cards: list[str], *, final: bool) -> None:
        """Remember what ran there, on any of its cards. With the database away that is not known, and then it is not
        timed. `final`: none of it can go on."""
        query = (
            "SELECT job_id, attempt FROM jobs WHERE status = 'running' AND (node IN :nodes OR (job_id, attempt) IN "
            "(SELECT job_id, attempt FROM shares WHERE node IN :nodes))"
        )
        found = text(query).bindparams(bindparam("nodes", expanding=True))
        with contextlib.suppress(DBAPIError), self.lab.engine.connect() as connection:
            for job_id, attempt in connection.execute(found, {"nodes": cards}):
                self.losses.append(Hit(at=_now(), job_id=job_id, attempt=attempt, final=final))


def _resume(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _found(folder: Path, pattern: str) -> list[Path]:
    """What matches, in order. Folders may vanish meanwhile: `Path.glob` raises then, `glob` doesn't."""
    return [folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]  # noqa: PTH207


def _newest(paths: list[Path]) -> Path | None:
    def changed(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    return max(paths, key=changed, default=None)


def _is_fresh(path: Path) -> bool:
    """False for what an earlier, lost attempt has left."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < FRESH_S
    return False


def _tear(path: Path, share: float) -> None:
    """Cut the file's end off."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
