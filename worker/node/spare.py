"""The spare of a node, a trainer that has done its imports and waits for a job: it is made, handed over, replaced."""

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
"""Seconds between two looks at the spare. A node waits at least this long before it makes its first."""

IMPORT_S = 600.0
"""A spare that has not imported everything by then hangs: even a slow disk takes a minute or two at low priority."""

HAND_OVER_S = 5.0
"""A spare answers in milliseconds. If it does not within this time or a quarter of a lease, it is dropped."""

FIRST_AGAIN_S, MOST_AGAIN_S = 10.0, 600.0
"""Seconds until the next spare is made after one has failed; each failure in a row doubles them."""


@dataclass(kw_only=True)
class SpareTrainer:
    """A spare's process, and the threads that read its pipes until a job gets it."""

    process: subprocess.Popen[str]
    mark: str  # LORACTL_RUN until a job gets it
    environment: dict[str, str]  # the part that trainers of jobs have too
    clock: NodeClock = SYSTEM
    born: float = field(init=False)
    ready: threading.Event = field(default_factory=threading.Event)
    lines: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)  # the last line of each reader
    readers: list[threading.Thread] = field(default_factory=list)
    last: str = ""  # the last line that it printed on standard error
    until: str = ""  # the line that ends its time as a spare; empty matches no line

    def __post_init__(self) -> None:
        self.born = self.clock.now()

    def read(self) -> None:
        """Begin to read both pipes, up to the line with which it goes to a job."""
        assert self.process.stdout and self.process.stderr
        for pipe, heard in ((self.process.stdout, self._answered), (self.process.stderr, self._printed)):
            reader = threading.Thread(target=self._read, args=(pipe, heard), name="spare's pipe", daemon=True)
            reader.start()
            self.readers.append(reader)

    def become(self, job_id: int, mark: str, patience_s: float) -> bool:
        """Hand it over. True: its environment shows the attempt's marks, and its pipes are free for a new reader."""
        assert self.process.stdin
        self.until = taken(mark)
        deadline = self.clock.now() + patience_s
        send(self.process.stdin, Take(job_id=job_id, mark=mark))
        try:
            read = [self.clock.get(self.lines, max(0.0, deadline - self.clock.now())) for _ in self.readers]
        except queue.Empty:
            return False
        for reader in self.readers:
            reader.join()  # each has put its last line
        return read == [self.until] * len(read) and self.shows(str(job_id), mark)

    def shows(self, name: str, mark: str) -> bool:
        """Whether a search for the attempt's processes, or for the host's, would find this one."""
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
            self.ready.set()  # first: a reader of the log line may submit a job that takes the spare at once
            log.info("a spare trainer is ready, process %s", self.process.pid)

    def _printed(self, line: str) -> None:
        """Keep what it prints as a spare out of any job's log."""
        self.last = line.strip() or self.last
        log.debug("the spare trainer: %s", line.rstrip())


class Spares:
    """Keeps one spare trainer, made while the node is not busy.

    `busy`: whether making one now would compete with a job that starts.
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
        """End the spare, and make none from now on."""
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
        """Marks of processes that are not strays: of the waiting spare, and of one that is being handed over."""
        with self._lock:
            return frozenset(self._marks)

    def take(self, environment: Mapping[str, str]) -> subprocess.Popen[str] | None:
        """The spare, as the trainer with this environment; None if none fits or the hand-over fails.

        A supervisor calls this, so it takes no longer than a heartbeat may be late.
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
            except OSError as error:  # no memory or no PID for another process
                self._failed(f"it could not be started: {error.strerror or error}")
            except Exception as error:
                # if this thread ended silently, every later job would start cold, and dropped spares would never end
                log.exception("the check of the spare trainer failed and is repeated")
                self._failed(repr(error))

    def _tend(self) -> None:
        """Drop a spare that died or hangs; make one when it is time."""
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
        # The placeholder comes last: a job's number overwrites it, and the zeros after the number end the block.
        environment = {**common, RUN_VARIABLE: mark, PLACEHOLDER: PLACEHOLDER_VALUE}
        try:
            process = self._place.launch(self._place.settings.trainer, environment, SPARE, self._place.device.trains_on)
        except OSError:
            with self._lock:
                self._marks.discard(mark)
            raise
        spare = SpareTrainer(process=process, mark=mark, environment=common, clock=self._place.clock)
        with self._lock:
            self._waiting = spare  # before its pipes are read, since that is what makes it ready
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
        """Why a waiting spare can't be used any more; None: it can."""
        if (code := spare.process.poll()) is not None:
            return f"it ended (exit status {code}){': ' if spare.last else ''}{spare.last[:300]}"
        if not spare.ready.is_set() and self._place.clock.now() - spare.born > IMPORT_S:
            return f"it was not ready after {IMPORT_S:.0f} s"
        if spare.environment != common_environment(self._place):
            return "the environment of the node has changed"
        return None
