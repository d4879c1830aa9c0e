"""A trainer as a child process: its start, pipes and end."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from loractl.common.text import without_passwords
from loractl.worker.device.occupancy import end_leftovers
from loractl.worker.protocol.messages import Order, Told, encode, told_in

from .log import CHUNK, LogBook, LogFile

log = logging.getLogger("loractl.worker")


class ForkedTrainer:
    """A trainer that the fork server has forked and the node has adopted, with the face of a subprocess.Popen."""

    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None
        self._waiting = threading.Lock()

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        with self._waiting:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # `end_leftovers` has killed it and taken its status
                    self.returncode = -signal.SIGKILL
                else:
                    self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"trainer {self.pid}", timeout or 0.0)
            time.sleep(0.01)
        return code


ChildProcess = subprocess.Popen[str] | ForkedTrainer


class TrainerProcess:
    """The process that trains one attempt. Its supervisor's thread uses it; two threads read its pipes."""

    def __init__(self, process: ChildProcess, job_id: int, run: str, file: IO[str], book: LogBook) -> None:
        """`run`: the attempt's mark. `file`, `book`: for its log, which is its standard error."""
        self._process, self._job_id, self._run = process, job_id, run
        self._log = LogFile(file, book)
        self.told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        assert process.stdout and process.stderr
        pipes = ((self._read_messages, process.stdout), (self._read_log, process.stderr))
        self._readers = [threading.Thread(target=read, args=(pipe,), daemon=True) for read, pipe in pipes]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status once `end` has been called; None: even SIGKILL does not end it."""
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, order: Order) -> None:
        assert self._process.stdin
        send(self._process.stdin, order)

    def end(self) -> None:
        """End it with all that it started, and read its output to the end."""
        kill(self._process)
        end_leftovers(self._run)  # a process that holds the pipes open would make the readers wait
        for reader in self._readers:
            reader.join(timeout=5)

    def _read_messages(self, pipe: IO[str]) -> None:
        while line := pipe.readline(MESSAGE_LIMIT):  # a line may never end
            message = told_in(line)
            if message is None or message.job_id != self._job_id:
                self._log.put(f"[not a message] {line}")
            else:
                self.told.put(message)

    def _read_log(self, pipe: IO[str]) -> None:
        while line := pipe.readline(CHUNK):
            self._log.put(without_passwords(line))  # a tracker's client repeats its address


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
    except UnicodeError:  # also a ValueError, but this trainer lives, and would wait for the order
        raise
    except (BrokenPipeError, ValueError):  # ValueError: another thread is ending it and has closed the pipe
        log.warning("the trainer had ended before it could be told %s", message.type)


def kill(trainer: ChildProcess) -> None:
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
