"""The hosts of a node: trainers that stay after their job, with the base that they have loaded, for the next job.

A host without a job has a mark of its own, so that neither the end of an attempt nor the search for strays ends it. A
claim names the host that its job joins, and the hosts that must go first. Nothing else starts on the card until these
have ended and the device shows their memory as free.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loractl.common.placement.cards import Card
from loractl.common.placement.hosts import beyond
from loractl.common.placement.pack_rule import MeasuredPass
from loractl.common.store.database import REFUSALS, told_by
from loractl.common.store.records import Claim, NewHost
from loractl.common.units import gib
from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.trainer_process import TrainerProcess, kill
from loractl.worker.attempt.workplace import StayingTrainer, Workplace
from loractl.worker.device.occupancy import JOB_VARIABLE, RUN_VARIABLE, Watch, end_leftovers
from loractl.worker.protocol.idle_trainer import host_name

from .spare import HAND_OVER_S, SpareTrainer

log = logging.getLogger("loractl.worker")

SHARED_KEEP_S = 60.0
"""How long a host waits on a card that other people's programs also use: a guess about the next job is no reason to
keep memory from them."""

LOOK_S = 0.1
"""Seconds between two looks at the hosts."""

RECONCILE_S = 5.0
"""Seconds between two looks at their rows, and at other people's programs, while there are hosts."""

ROOM_LOOK_S = 0.05
"""Seconds between two looks at whether an ending host's memory is free: the next job waits for that."""

LEFT_S = 20.0
"""Seconds that a host's memory may stay on the card after its end: the driver takes a moment."""


@dataclass(kw_only=True)
class _Waiting:
    """A host without a job."""

    trainer: SpareTrainer
    until: float  # when it goes, by the process's clock
    why: str = ""  # why it is going; empty: it waits
    stuck: str = ""  # what remains of it on the card, in words; empty: nothing known


@dataclass(kw_only=True)
class Hosts:
    """Keeps hosts while the node serves. `keep_s`: how long one waits for a job."""

    place: Workplace
    watch: Watch
    keep_s: float
    closed: bool = False  # the card is drained
    opened: Callable[[], None] = lambda: None  # is called when other jobs may join one that trains
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _changes: int = 0
    _waiting: dict[str, _Waiting] = field(default_factory=dict)
    _marks: set[str] = field(default_factory=set)  # of hosts, and of trainers that may become one
    _open: dict[str, TrainerProcess] = field(default_factory=dict)  # trainers that other jobs may join
    _written: set[str] = field(default_factory=set)  # marks with a row
    _spoilt: set[str] = field(default_factory=set)  # the marks of these whose row says that they take no more jobs
    _over: set[str] = field(default_factory=set)  # marks of ended processes whose rows still exist
    _strangers_at: float | None = None  # when other people's programs were last seen on the card
    _next: float = 0.0  # when to look at the rows again
    _stopped: threading.Event = field(default_factory=threading.Event)
    _going: threading.Event = field(default_factory=threading.Event)  # a host is sent off; the next start waits for it
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = self.place.clock.start(self._run, "hosts")

    def stop(self) -> None:
        """End all hosts, and keep none from now on."""
        self._stopped.set()
        self._going.set()
        if self._thread is not None:
            self.place.clock.join(self._thread)
        self._let_go(self._waiting, "the worker stops")
        self._end_going()
        self._forget()

    @property
    def marks(self) -> frozenset[str]:
        """Marks of processes that are not strays: of hosts, and of trainers that are becoming hosts."""
        with self._changed:
            return frozenset(self._marks)

    @property
    def in_the_way(self) -> bool:
        """Whether a host is ending: nothing starts on the card until it has ended."""
        with self._changed:
            return any(host.why for host in self._waiting.values())

    def make_room(self) -> str | None:
        """Wait until no host is ending. If one does not go, returns what it still holds of the card."""
        with self._changed:
            hosts = self._waiting.values()
            self.place.clock.wait_for(self._changed, lambda: not self.in_the_way or any(host.stuck for host in hosts))
            return next((host.stuck for host in hosts if host.stuck), None)

    def look_soon(self) -> None:
        """Look at the rows at once: a claim on another card may have sent hosts off, for a job on several cards that
        waits until they have gone."""
        self._next = 0.0

    def let_go(self, marks: Iterable[str]) -> None:
        """Send off the hosts that a claim names; their rows already say that they leave."""
        self._let_go(marks, "another job needs the room")

    def trim(self, card: Card) -> None:
        """Send off hosts for which the card has no room any more, because others now hold more of it."""
        for base in beyond(card):
            self._send_off(base.host, "others need its room")

    def take(self, claim: Claim, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
        """The host that the claim names, as the attempt's trainer. None: there is none, or it is ending.

        A supervisor calls this, so it takes no longer than a heartbeat may be late.
        """
        if claim.host is None:
            return None
        own = {name: value for name, value in environment.items() if name not in (JOB_VARIABLE, RUN_VARIABLE)}
        with self._changed:
            host = self._waiting.pop(claim.host, None)
        if host is None:
            return None
        patience_s, done = min(HAND_OVER_S, self.place.settings.lease_s / 4), False
        try:
            fits = not host.why and host.trainer.environment == own and host.trainer.process.poll() is None
            done = fits and host.trainer.become(claim.job_id, environment[RUN_VARIABLE], patience_s)
        finally:
            if not done:
                with self._changed:
                    self._waiting[claim.host] = host
                    host.why = host.why or "it could not be handed over"
        if not done:
            log.warning("job %s: the trainer with its base could not be handed over, a new one starts", claim.job_id)
            return None
        log.info("job %s: continues in process %s, which has its base", claim.job_id, host.trainer.process.pid)
        return host.trainer.process

    def await_change(self, seconds: float) -> None:
        """Wait until a trainer becomes a host or ends, but no longer than this."""
        with self._changed:
            seen = self._changes
            self.place.clock.wait_for(self._changed, lambda: self._changes != seen, seconds)

    def draw_mark(self) -> str:
        """A new mark, for a trainer that may become a host."""
        mark = secrets.token_hex(8)  # as long as an attempt's
        with self._changed:
            self._marks.add(mark)
        return mark

    def drop_mark(self, mark: str) -> None:
        """The trainer with this mark has ended."""
        with self._changed:
            self._marks.discard(mark)
            self._open.pop(mark, None)
            if mark in self._written:
                self._over.add(mark)
            self._tell()

    def knows(self, mark: str) -> bool:
        """Whether a trainer with this mark exists."""
        with self._changed:
            return mark in self._marks

    def open(self, trainer: TrainerProcess, claim: Claim, key: str, size: int) -> None:
        """Let other jobs join the trainer of the claim's job."""
        new = NewHost(host=trainer.mark, node=self.place.node, key=key, bytes=size)
        self.let_in(trainer)
        try:
            written = self._may_wait() and self.place.store.hosts.open(claim, new)
        except REFUSALS as error:
            self._may_be_written(trainer.mark)
            log.warning("no job can join job %s: %s", claim.job_id, told_by(error))
            return
        if written:
            with self._changed:
                self._written.add(trainer.mark)
            self.opened()

    def let_in(self, trainer: TrainerProcess) -> None:
        """Let jobs that join a trainer find it here."""
        with self._changed:
            self._open[trainer.mark] = trainer

    def with_jobs(self, mark: str) -> TrainerProcess | None:
        """The trainer with this mark, while jobs are in it."""
        with self._changed:
            return self._open.get(mark)

    def spoil(self, mark: str, why: str) -> None:
        """Let no claim name a trainer that takes no more jobs. If the database is away, the jobs in it call this
        again."""
        with self._changed:
            if mark not in self._written or mark in self._spoilt:
                return
        try:
            self.place.store.hosts.spoil(mark, self.place.node, why)
        except REFUSALS as error:
            log.warning("jobs may still be sent to process %s, which takes none: %s", mark, told_by(error))
            return
        with self._changed:
            self._spoilt.add(mark)

    def note_passes(self, mark: str, passes: Sequence[MeasuredPass]) -> None:
        """Store measured passes of a trainer that has a row, for the pack rule."""
        with self._changed:
            if mark not in self._written:
                return
        try:
            self.place.store.hosts.note_passes(mark, passes)
        except REFUSALS as error:
            log.warning("the pack rule learns nothing of process %s: %s", mark, told_by(error))

    def keep(self, host: StayingTrainer, claim: Claim) -> bool:
        """Keep a trainer whose last job has left. False: it was ended, because its base has no room or the node
        stops."""
        new = NewHost(host=host.mark, node=self.place.node, key=host.key, bytes=host.bytes)
        environment, clock = dict(host.environment), self.place.clock
        trainer = SpareTrainer(process=host.process, mark=host.mark, environment=environment, clock=clock)
        try:
            kept = self._may_wait() and trainer.shows(host_name(host.mark), host.mark)
            kept = kept and self.place.store.hosts.keep(claim, new)
        except REFUSALS as error:
            kept = False
            self._may_be_written(host.mark)
            log.warning("the trainer of job %s does not stay: %s", claim.job_id, told_by(error))
        if not kept:
            kill(host.process)
            end_leftovers(host.mark)
            return False
        trainer.read()
        with self._changed:
            self._open.pop(host.mark, None)
            self._written.add(host.mark)
            self._waiting[host.mark] = _Waiting(trainer=trainer, until=clock.now() + self._patience_s)
            self._tell()
        log.info("process %s keeps its base, %s GiB, for the next job", host.process.pid, gib(host.bytes))
        return True

    def _tell(self) -> None:
        """Wake the threads that wait for a change. The caller holds the lock."""
        self._changes += 1
        self._changed.notify_all()

    def _may_be_written(self, mark: str) -> None:
        """Note that a row may exist, since the database's answer was lost: it must be deleted with the process."""
        with self._changed:
            self._written.add(mark)

    def _may_wait(self) -> bool:
        away = self.place.drain.wish is not None or self.closed or self._stopped.is_set()
        return self.keep_s > 0 and not away and self.watch.fault is None

    @property
    def _patience_s(self) -> float:
        """How long a base waits for a job on this card now."""
        seen = self._strangers_at
        lately = seen is not None and self.place.clock.now() - seen < self.watch.high_water_s
        return min(self.keep_s, SHARED_KEEP_S) if lately else self.keep_s

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.place.clock.wait(self._going, LOOK_S)
            self._going.clear()
            if self._stopped.is_set():
                break
            try:
                self._tend()
            except REFUSALS as error:
                log.warning("the hosts' rows could not be written: %s", told_by(error))
                self.place.clock.wait(self._stopped, 1.0)
            except Exception:
                # if this thread ended silently, no base would ever go, and a job that needs its room would wait forever
                log.exception("the check of the hosts failed and is repeated")
                self.place.clock.wait(self._stopped, 1.0)

    def _tend(self) -> None:
        """Send off hosts that died, waited long enough or are leaving by their rows, and end them."""
        with self._changed:
            waiting = {mark: host for mark, host in self._waiting.items() if not host.why}
        if waiting and not self._may_wait():
            self._let_go(waiting, "the card is closed")
        now = self.place.clock.now()
        for mark, host in waiting.items():
            if (code := host.trainer.process.poll()) is not None:
                self._let_go([mark], f"it ended by itself (exit status {code})")
            elif host.trainer.environment != common_environment(self.place):
                self._send_off(mark, "the environment of the node has changed")
            elif now >= host.until:
                self._send_off(mark, "no job came")
        self._end_going()
        self._forget()
        if (waiting or self._written) and now >= self._next:
            self._next = now + RECONCILE_S
            self._look_around(waiting)

    def _look_around(self, waiting: Mapping[str, _Waiting]) -> None:
        """Follow the rows, and see whether others use the card. `waiting`: the hosts that waited before this look."""
        rows = {row.host: row for row in self.place.store.hosts.of_card(self.place.node)}
        self._let_go([m for m in waiting if m not in rows or rows[m].leaving], "its row says so")
        with self._changed:
            self._over |= rows.keys() - self._marks
        if self.place.device.kind == "nvml" and self.watch.look().others:
            self._strangers_at = self.place.clock.now()
            soon = self.place.clock.now() + self._patience_s
            for host in waiting.values():
                host.until = min(host.until, soon)

    def _send_off(self, mark: str, why: str) -> None:
        """Send off a host unless a job has joined it."""
        with self._changed:
            host = self._waiting.get(mark)
        if host is None:
            return
        if self.place.store.hosts.send_off(mark, self.place.node):
            self._let_go([mark], why)
        else:
            host.until = self.place.clock.now() + RECONCILE_S

    def _let_go(self, marks: Iterable[str], why: str) -> None:
        with self._changed:
            for mark in list(marks):
                host = self._waiting.get(mark)
                if host is not None and not host.why:
                    host.why = why
                    self._going.set()

    def _end_going(self) -> None:
        with self._changed:
            going = {mark: host for mark, host in self._waiting.items() if host.why}
        for mark, host in going.items():
            gone = self._end(mark, host)
            with self._changed:
                if gone:
                    self._waiting.pop(mark, None)
                    self._marks.discard(mark)
                    self._over.add(mark)
                self._tell()

    def _end(self, mark: str, host: _Waiting) -> bool:
        """End a host's process, and check that its memory is free. If it is not, closes the card with the reason and
        returns False."""
        if host.stuck:
            return not end_leftovers(mark) and not self._held(mark)
        log.info("process %s drops its base: %s", host.trainer.process.pid, host.why)
        kill(host.trainer.process)
        deadline = self.place.clock.now() + LEFT_S
        while (alive := end_leftovers(mark)) or self._held(mark):
            if self.place.clock.now() > deadline:
                what = f"process {alive[0]}" if alive else f"{gib(self._held(mark))} GiB of memory"
                why = f"a base left {what} behind; check the card, then loractl undrain {self.place.node}"
                host.stuck = why if self._close(why) else ""  # once the card is closed, nothing waits for this memory
                return False
            self.place.clock.sleep(ROOM_LOOK_S)
        return True

    def _close(self, why: str) -> bool:
        """Close the card. False: the database is away, and the caller tries again."""
        try:
            self.place.store.cards.drain(self.place.node, "loractl", why)
        except REFUSALS as error:
            log.warning("%s can't be closed (%s): %s", self.place.node, told_by(error), why)
            return False
        log.error("%s is closed: %s", self.place.node, why)
        return True

    def _held(self, mark: str) -> int:
        return self.watch.look().used.get(host_name(mark), 0)

    def _forget(self) -> None:
        """Delete the rows of hosts that have ended, which gives their bytes back to the card."""
        with self._changed:
            over = set(self._over)
        if not over:
            return
        try:
            self.place.store.hosts.forget(over)
        except REFUSALS as error:
            log.warning("rows of hosts that have ended stay until the database is back: %s", told_by(error))
            return
        with self._changed:
            self._over -= over
            self._written -= over
            self._spoilt -= over
