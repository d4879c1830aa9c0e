"""The trainer as a child process, seen from its supervisor: its pipes and its end."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from loractl.worker.device.occupancy import end_leftovers
from loractl.worker.protocol.messages import Release, Start, Stop, Take, Told, decode_told, encode
from loractl.worker.protocol.spare import taken

from .log import Sink, read_log

log = logging.getLogger("loractl.worker")

LEAVE_S = 5.0
"""A trainer that stays answers in milliseconds. One that does not is killed."""

KILL_S = 5.0
"""Seconds within which a killed process ends, unless it waits in the kernel."""

MESSAGE_LIMIT = 1 << 20
"""Characters of a line; no message is nearly as long."""


@dataclass(kw_only=True)
class Leave:
    """How a trainer leaves its job and stays: by a mark of its own, after which its pipes are no job's."""

    mark: str
    asked: bool = False
    done: bool = False


def send(pipe: IO[str], message: Start | Stop | Take | Release) -> None:
    """Write an order; a trainer that has ended is noticed elsewhere, by its exit status."""
    try:
        pipe.write(encode(message))
        pipe.flush()
    except BrokenPipeError:
        log.warning("the trainer had ended before it could be told %s", message.type)


def kill(trainer: subprocess.Popen[str]) -> None:
    """End the trainer and all that it started: close its stdin first, then kill its whole session.

    A process that waits in the kernel (state D: a lost card, a hard NFS mount) outlives SIGKILL. It is left, with its
    `returncode` None: the supervisor must go on, and what remains on the card closes it.
    """
    assert trainer.stdin
    try:
        trainer.stdin.close()
    except BrokenPipeError:
        log.debug("the trainer had closed its input")
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


@contextlib.contextmanager
def running(
    trainer: subprocess.Popen[str],
    run: str,
    start: Start,
    log_file: IO[str],
    book: Sink,
    leave: Leave | None = None,
) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[Told | str]]]:
    """Read what a trainer says: the process, and the queue of what it tells. On exit all processes of the run end.

    `leave`: where it was asked for, the trainer itself may stay; then `done` is set, and nobody reads its pipes.
    """
    told: queue.SimpleQueue[Told | str] = queue.SimpleQueue()
    until, left = "" if leave is None else taken(leave.mark), queue.SimpleQueue[bool]()
    assert trainer.stdin and trainer.stdout and trainer.stderr
    out, err = trainer.stdout, trainer.stderr
    readers = [
        threading.Thread(target=lambda: left.put(read_messages(out, told, start.job_id, until)), daemon=True),
        threading.Thread(target=lambda: left.put(read_log(err, log_file, book, until=until)), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        yield trainer, told
    finally:
        if leave is not None and leave.asked:
            leave.done = _have_left(left, len(readers))
        if leave is None or not leave.done:
            kill(trainer)
        end_leftovers(run)  # a process that holds the pipes open would make the readers wait
        for reader in readers:
            reader.join(timeout=5)


def _have_left(left: queue.SimpleQueue[bool], readers: int) -> bool:
    """Whether every pipe was read up to the line with which the trainer leaves its job."""
    deadline = time.monotonic() + LEAVE_S
    try:
        return all(left.get(timeout=max(0.0, deadline - time.monotonic())) for _ in range(readers))
    except queue.Empty:
        return False


def read_messages(pipe: IO[str], told: queue.SimpleQueue[Told | str], job_id: int, until: str = "") -> bool:
    """Queue what the trainer tells of this job; a line that is not a message goes to the log.

    Returns whether it came to the line `until`, behind which nothing is this job's.
    """
    while line := pipe.readline(MESSAGE_LIMIT):  # a line may never end
        if line == until:
            return True
        try:
            message = decode_told(line)
        except ValueError:
            told.put(f"[not a message] {line}")
            continue
        if message.job_id == job_id:
            told.put(message)
    return False
