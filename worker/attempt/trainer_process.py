"""A trainer as a child process: its start, pipes and end. Its output goes to the attempts whose jobs are in it."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import IO

from loractl.worker.clock import SYSTEM, NodeClock
from loractl.worker.device.occupancy import end_leftovers
from loractl.worker.protocol.idle_trainer import shared, taken
from loractl.worker.protocol.messages import (
    Ended,
    LogLines,
    MemberLeft,
    Order,
    Release,
    Share,
    Stop,
    Told,
    decode_told,
    encode,
)  # fmt: skip

from .log import CHUNK, END_LINES, LogBook, LogFile

log = logging.getLogger("loractl.worker")

ANSWER_S = 5.0
"""A trainer answers an order to change its marks in milliseconds. One that does not within this time is left or
killed."""

LEAVE_S = 120.0
"""How long a stopped member has to leave the others, counted from the last sign of a step of any of them."""


@dataclass(eq=False, kw_only=True)
class TrainerLink:
    """What one attempt sees of its trainer. Its supervisor's thread uses it."""

    trainer: TrainerProcess
    job_id: int
    book: LogFile
    told: queue.SimpleQueue[Told | str] = field(default_factory=queue.SimpleQueue)
    left: threading.Event = field(default_factory=threading.Event)  # nothing of the job is left in the process

    @property
    def pid(self) -> int:
        return self.trainer.process.pid

    @property
    def alone(self) -> bool:
        """Whether no other attempt is in the process."""
        return self.trainer.count <= 1

    @property
    def stuck(self) -> bool:
        """Whether no job in the process has taken a step for a long time."""
        return self.trainer.clock.now() - self.trainer.heard_at > LEAVE_S

    @property
    def leaves_others(self) -> bool:
        """Whether the process has other jobs, and still something of this one."""
        return not self.alone and not self.left.is_set()

    @property
    def host(self) -> str | None:
        """The mark in the process's environment, if it is a host's and not the attempt's."""
        return self.trainer.mark if self.trainer.shared else None

    def poll(self) -> int | None:
        return self.trainer.process.poll()

    def send(self, order: Order) -> None:
        self.trainer.send(order)

    def hear(self, message: Told) -> None:
        if isinstance(message, LogLines):
            self.book.put(message.text)
            return
        self.told.put(message)
        if isinstance(message, MemberLeft) or (isinstance(message, Ended) and message.base_bytes is not None):
            self.left.set()


class TrainerProcess:
    """A process that trains, from its first order to its end, or until it stays without a job.

    `run`: the mark of the attempt for which it was started. `mark`: of the host that it may become; empty if it ends
    with that attempt.
    """

    def __init__(self, process: subprocess.Popen[str], run: str, mark: str = "", clock: NodeClock = SYSTEM) -> None:
        self.process, self.run, self.mark, self.clock = process, run, mark, clock
        self.shared = False  # its marks are the host's, and its jobs' log lines come as messages
        self.stays = False  # its last job has left, and nobody reads its pipes
        self.over = False  # it has ended, with all processes that it started
        self.base_bytes: int | None = None  # that it keeps, as its last job's end reported
        self.spoilt: str | None = None  # in words, why nobody may join it and it ends; None: it may stay
        self.lost = 0  # jobs that were in it when it ended by itself
        self.heard_at = self.clock.now()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._changing = threading.Lock()  # its marks, or its end
        self._links: dict[int, TrainerLink] = {}
        self._closing = False  # nobody may join any more
        self._answered = threading.Event()  # it is shared
        self._last: deque[str] = deque(maxlen=END_LINES)  # its last output that belongs to no job
        self._until = ""  # the line after which nothing belongs to a job; no line is empty
        self._read: queue.SimpleQueue[bool] = queue.SimpleQueue()  # from each reader: whether it reached that line
        assert process.stdout and process.stderr
        pipes = ((self._read_messages, process.stdout), (self._read_log, process.stderr))
        self._readers = [threading.Thread(target=read, args=(pipe,), daemon=True) for read, pipe in pipes]

    @property
    def count(self) -> int:
        """The attempts in it."""
        with self._lock:
            return len(self._links)

    def begin(self, job_id: int, file: IO[str], book: LogBook) -> TrainerLink:
        """The first attempt's link. From now on the pipes are read."""
        link = self._links[job_id] = TrainerLink(trainer=self, job_id=job_id, book=LogFile(file, book))
        for reader in self._readers:
            reader.start()
        return link

    def join(self, job_id: int, file: IO[str], book: LogBook) -> TrainerLink | None:
        """Another attempt's link, while the process has one; None: it is ending, or does not answer."""
        link = TrainerLink(trainer=self, job_id=job_id, book=LogFile(file, book))
        with self.clock.holding(self._changing):  # nobody else leaves before it answers, or this attempt leaves again
            with self._lock:
                if self._closing or not self.mark or self.spoilt is not None or self.process.poll() is not None:
                    return None
                if job_id in self._links:  # an earlier attempt of the job has not left it yet
                    return None
                self._links[job_id] = link
            if self._share(job_id):
                return link
            self._forget(link)
        return None

    def holds(self, job_id: int) -> bool:
        """Whether an attempt of the job is in it."""
        with self._lock:
            return job_id in self._links

    def leave(self, link: TrainerLink, *, stay: bool, end: bool = False) -> None:
        """An attempt no longer needs the process. Others continue in it; after the last it stays, or ends.

        `stay`: it may wait for another job. `end`: it must end, even with others in it.
        """
        with self._lock:
            alone = len(self._links) == 1
            self._closing |= alone or end
        if not (alone or end) and self._has_left(link):
            # the others may have left: the last to leave ends it, and exactly one is last
            with self.clock.holding(self._changing), self._lock:
                alone = len(self._links) == 1
                self._closing |= alone
                if not alone:
                    self._links.pop(link.job_id)
                    return
        with self.clock.holding(self._changing):
            if alone and stay and not end:
                self._release(link)
            if not self.stays:
                self._end()
        self._forget(link)

    def send(self, order: Order) -> None:
        assert self.process.stdin
        with self._sending:
            send(self.process.stdin, order)

    def spoil(self, why: str) -> None:
        """Let nobody join it any more, and let it end with its last job. The first reason is kept."""
        self.spoilt = self.spoilt or why

    def end(self) -> list[str]:
        """The last lines of its output that belong to no job."""
        return list(self._last)

    def _forget(self, link: TrainerLink) -> None:
        with self._lock:
            self._links.pop(link.job_id, None)

    def _share(self, job_id: int) -> bool:
        """Make it the host's: ending the first attempt's processes must not find it."""
        if not self.shared and self.process.poll() is None:
            self.send(Share(job_id=job_id, mark=self.mark))
            self.shared = self.clock.wait(self._answered, ANSWER_S)
        return self.shared and self.process.poll() is None

    def _has_left(self, link: TrainerLink) -> bool:
        """Wait until nothing of a job is left in the process, which others need."""
        if not link.left.is_set() and self.process.poll() is None:
            self.send(Stop(job_id=link.job_id, save=False))
        while not self.clock.wait(link.left, 0.1) and self.process.poll() is None:
            if link.stuck:
                log.error("job %s does not leave process %s, which is killed", link.job_id, link.pid)
                return False
        return link.left.is_set()

    def _release(self, link: TrainerLink) -> None:
        self._until = taken(self.mark)
        self.send(Release(job_id=link.job_id, mark=self.mark))
        deadline = self.clock.now() + ANSWER_S
        try:
            self.stays = all(self.clock.get(self._read, max(0.0, deadline - self.clock.now())) for _ in self._readers)
        except queue.Empty:
            self.stays = False
        if self.stays:
            end_leftovers(self.run)

    def _end(self) -> None:
        """End all its processes, and read their output."""
        kill(self.process)
        for run in (self.run, self.mark) if self.mark else (self.run,):
            end_leftovers(run)  # a process that holds the pipes open would make the readers wait
        for reader in self._readers:
            reader.join(timeout=5)
        self.over = True

    def _read_messages(self, pipe: IO[str]) -> None:
        found = False
        while not found and (line := pipe.readline(MESSAGE_LIMIT)):  # a line may never end
            if line == shared(self.mark):
                self._answered.set()
            elif line == self._until:
                found = True
            else:
                self._hand_on(line)
        if not found:
            with self._lock:
                self._closing = True  # a job that joined now would not be counted, but be blamed for the end
                self.lost = sum(not link.left.is_set() for link in self._links.values())
        self._read.put(found)

    def _hand_on(self, line: str) -> None:
        """Pass a message to its job, and any other line to the log."""
        try:
            message = decode_told(line)
        except ValueError:
            self._print(f"[not a message] {line}")
            return
        self.heard_at = self.clock.now()
        if isinstance(message, Ended):
            self.base_bytes = message.base_bytes
        elif isinstance(message, MemberLeft) and message.fault is not None:
            self.spoil(message.fault)
        with self._lock:
            link = self._links.get(message.job_id)
        if link is not None:
            link.hear(message)

    def _read_log(self, pipe: IO[str]) -> None:
        found, own = False, True
        while not found and (line := pipe.readline(CHUNK)):
            if line == shared(self.mark):
                own = False
            elif line == self._until:
                found = True
            elif own:
                self._print(line)
            else:
                self._keep(line)
        self._read.put(found)

    def _print(self, line: str) -> None:
        """A line of the only job here, or of none."""
        with self._lock:
            link = None if self.shared else next(iter(self._links.values()), None)
        if link is None:
            self._keep(line)
        else:
            link.book.put(line)

    def _keep(self, line: str) -> None:
        self._last.append(line[:1000])
        log.debug("process %s: %s", self.process.pid, line.rstrip())


KILL_S = 5.0
"""Seconds within which a killed process ends, unless it waits in the kernel."""

MESSAGE_LIMIT = 1 << 20
"""Characters of a line; no message is nearly as long."""


def send(pipe: IO[str], message: Order) -> None:
    """Write an order; the end of a trainer is noticed elsewhere, by its exit status."""
    line = encode(message)
    try:
        pipe.write(line)
        pipe.flush()
    except (BrokenPipeError, ValueError):  # ValueError: another thread is ending it and has closed the pipe
        log.warning("the trainer had ended before it could be told %s", message.type)


def kill(trainer: subprocess.Popen[str]) -> None:
    """End the trainer and all that it started: close its stdin first, then kill its whole session.

    A process that waits in the kernel (state D: a lost card, a hard NFS mount) outlives SIGKILL. It is left alone, with
    its `returncode` None: the supervisor must continue, and what remains on the card closes it.
    """
    assert trainer.stdin
    # in a thread: a writer to a trainer that reads nothing holds the pipe until the trainer is killed
    closing = threading.Thread(target=_close, args=(trainer.stdin,), daemon=True)
    closing.start()
    try:
        trainer.wait(timeout=2)
    except subprocess.TimeoutExpired:
        log.debug("the trainer outlived its input and is killed")
    try:
        os.killpg(trainer.pid, signal.SIGKILL)
    except ProcessLookupError:
        log.debug("the trainer's session is empty")
    try:
        trainer.wait(timeout=KILL_S)
    except subprocess.TimeoutExpired:
        log.error("process %s, a trainer, was killed and does not end: it waits in the kernel", trainer.pid)
    closing.join(timeout=KILL_S)


def _close(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        log.debug("the trainer had closed its input")


def launch(module: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start `python -m MODULE`. It ends with its stdin, and so with this process."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env=environment,
    )
