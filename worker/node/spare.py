"""One trainer of a node that has its imports behind it and waits for a job: made, handed over, replaced."""

from __future__ import annotations

import logging
import queue
import secrets
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO

import psutil

from loractl.worker.attempt.order import common_environment
from loractl.worker.attempt.trainer_process import MESSAGE_LIMIT, kill, send
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.clock import SYSTEM, NodeClock
from loractl.worker.device.occupancy import JOB_VARIABLE, RUN_VARIABLE, end_leftovers
from loractl.worker.protocol.idle_trainer import PLACEHOLDER, PLACEHOLDER_VALUE, READY, SPARE, taken
from loractl.worker.protocol.messages import Take

log = logging.getLogger("loractl.worker")

LOOK_S = 0.2
"""Seconds between two looks at the spare, and the least that a node must be idle before one is made."""

IMPORT_S = 600.0
"""A spare that has not imported everything by then hangs: a slow disk takes a minute or two at low priority."""

HAND_OVER_S = 5.0
"""A spare answers in milliseconds. One that does not within this, or a quarter of a lease, is left."""

FIRST_AGAIN_S, MOST_AGAIN_S = 10.0, 600.0
"""Seconds until another spare is made after one that failed; each failure in a row doubles them."""


@dataclass(kw_only=True)
class SpareTrainer:
    """A process that is a spare, and who reads its pipes until it is a job's."""

    process: subprocess.Popen[str]
    mark: str  # LORACTL_RUN until it is a job's
    environment: dict[str, str]  # what it has in common with the trainers of jobs
    clock: NodeClock = SYSTEM
    born: float = field(init=False)
    ready: threading.Event = field(default_factory=threading.Event)
    lines: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)  # the last that its pipes' readers read
    readers: list[threading.Thread] = field(default_factory=list)
    last: str = ""  # that it printed on standard error
    until: str = ""  # the line that ends its time as a spare; no line is empty

    def __post_init__(self) -> None:
        self.born = self.clock.now()

    def read(self) -> None:
        """Begin to read both pipes, up to the line with which it becomes a job's."""
        assert self.process.stdout and self.process.stderr
        for pipe, heard in ((self.process.stdout, self._answered), (self.process.stderr, self._printed)):
            reader = threading.Thread(target=self._read, args=(pipe, heard), name="spare's pipe", daemon=True)
            reader.start()
            self.readers.append(reader)

    def become(self, job_id: int, mark: str, patience_s: float) -> bool:
        """Hand it over. True: its environment shows the attempt's marks, and nobody reads its pipes any more."""
        assert self.process.stdin
        self.until = taken(mark)
        deadline = self.clock.now() + patience_s
        send(self.process.stdin, Take(job_id=job_id, mark=mark))
        try:
            read = [self.clock.get(self.lines, max(0.0, deadline - self.clock.now())) for _ in self.readers]
        except queue.Empty:
            return False
        for reader in self.readers:
            reader.join()  # each has said its last
        return read == [self.until] * len(read) and self.shows(str(job_id), mark)

    def shows(self, name: str, mark: str) -> bool:
        """Whether those who look for processes of the attempt, or for a host's, find this one."""
        try:
            seen = psutil.Process(self.process.pid).environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            return False
        return (seen.get(RUN_VARIABLE), seen.get(JOB_VARIABLE)) == (mark, name)

    def _read(self, pipe: IO[str], heard: Callable[[str], None]) -> None:
        line = ""
        while line := pipe.readline(MESSAGE_LIMIT):
            if line == self.until:
                break
            heard(line)
        self.lines.put(line)

    def _answered(self, line: str) -> None:
        if line == READY and not self.ready.is_set():
            self.ready.set()  # first: who reads the line may take it at once
            log.info("a spare trainer is ready, process %s", self.process.pid)

    def _printed(self, line: str) -> None:
        """What it printed before is no job's."""
        self.last = line.strip() or self.last
        log.debug("the spare trainer: %s", line.rstrip())


class Spares:
    """Keeps one spare trainer while the node has nothing better to do.

    `busy`: whether none may be made now, since it would compete with a job that starts.
    """

    def __init__(self, place: Workplace, busy: Callable[[], bool]) -> None:
        self._place = place
        self._busy = busy
        self._lock = threading.Lock()
        self._waiting: SpareTrainer | None = None
        self._handing_over = False
        self._dropped: queue.SimpleQueue[tuple[SpareTrainer, str]] = queue.SimpleQueue()
        self._marks: set[str] = set()
        self._failures = 0  # in a row
        self._next = place.clock.now() + LOOK_S
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = self._place.clock.start(self._run, "spare")

    def stop(self) -> None:
        """End the spare; none is made any more."""
        self._stopped.set()
        if self._thread is not None:
            self._place.clock.join(self._thread)
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._end(waiting)
        while not self._dropped.empty():
            self._end(self._dropped.get()[0])

    @property
    def marks(self) -> frozenset[str]:
        """The marks of processes that are no strays: of the spare that waits, and of one that is handed over now."""
        with self._lock:
            return frozenset(self._marks)

    def take(self, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
        """The spare as the trainer with this environment; None where none fits or the hand-over fails.

        It is called by a supervisor, so it takes no longer than a beat may be late.
        """
        own = {name: value for name, value in environment.items() if name not in (JOB_VARIABLE, RUN_VARIABLE)}
        with self._lock:
            waiting = self._waiting
            if waiting is None or not waiting.ready.is_set() or waiting.environment != own:
                return None
            self._waiting, self._handing_over = None, True
        job_id, mark, done = int(environment[JOB_VARIABLE]), environment[RUN_VARIABLE], False
        try:
            done = waiting.become(job_id, mark, min(HAND_OVER_S, self._place.settings.lease_s / 4))
        finally:
            with self._lock:
                self._handing_over = False
                if done:
                    self._marks.discard(waiting.mark)
                    self._failures = 0
                else:
                    self._dropped.put((waiting, "it did not answer"))
        if not done:
            log.warning("job %s: the spare trainer could not be handed over, a new trainer is started", job_id)
            return None
        log.info("job %s: takes the spare trainer, process %s", job_id, waiting.process.pid)
        return waiting.process

    def _run(self) -> None:
        while not self._place.clock.wait(self._stopped, LOOK_S):
            try:
                self._tend()
            except OSError as error:  # no memory or no number for another process
                self._failed(f"it could not be started: {error.strerror or error}")
            except Exception as error:
                # if this thread ended silently, every later job would start cold, and what was dropped would stay
                log.exception("the check of the spare trainer failed and is repeated")
                self._failed(repr(error))

    def _tend(self) -> None:
        """Drop what died or hangs; make a spare when it is time."""
        while not self._dropped.empty():
            spare, reason = self._dropped.get()
            self._end(spare)
            self._failed(reason)
        with self._lock:
            waiting = self._waiting
            if waiting is not None and (why := self._fault(waiting)) is not None:
                self._waiting = None
                self._dropped.put((waiting, why))
            none = waiting is None and not self._handing_over and self._dropped.empty()
        if none and self._place.drain.asked is None and not self._busy() and self._place.clock.now() >= self._next:
            self._make()

    def _make(self) -> None:
        mark = secrets.token_hex(8)  # as long as an attempt's
        common = common_environment(self._place)
        with self._lock:
            self._marks.add(mark)
        # The placeholder is the last: what is cut off behind the job's number ends the block.
        environment = {**common, RUN_VARIABLE: mark, PLACEHOLDER: PLACEHOLDER_VALUE}
        try:
            process = self._place.launch(self._place.settings.trainer, environment, SPARE, self._place.device.trains_on)
        except OSError:
            with self._lock:
                self._marks.discard(mark)
            raise
        spare = SpareTrainer(process=process, mark=mark, environment=common, clock=self._place.clock)
        with self._lock:
            self._waiting = spare  # before its pipes are read: it is ready only then
        try:
            spare.read()
        except RuntimeError:  # no thread for its pipes
            with self._lock:
                self._waiting = None
            self._end(spare)
            raise

    def _end(self, spare: SpareTrainer) -> None:
        kill(spare.process)
        end_leftovers(spare.mark)
        with self._lock:
            self._marks.discard(spare.mark)

    def _failed(self, why: str) -> None:
        again_s = min(MOST_AGAIN_S, FIRST_AGAIN_S * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._next = self._place.clock.now() + again_s
        log.warning("the spare trainer is dropped: %s; another one is made in %.0f s", why, again_s)

    def _fault(self, spare: SpareTrainer) -> str | None:
        """Why a spare that waits is none any more."""
        if (code := spare.process.poll()) is not None:
            return f"it ended (exit status {code}){': ' if spare.last else ''}{spare.last[:300]}"
        if not spare.ready.is_set() and self._place.clock.now() - spare.born > IMPORT_S:
            return f"it was not ready after {IMPORT_S:.0f} s"
        if spare.environment != common_environment(self._place):
            return "the environment of the node has changed"
        return None
