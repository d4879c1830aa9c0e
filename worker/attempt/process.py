"""The trainer as a child process, seen from its supervisor: its pipes and its end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from typing import IO

from loractl.worker.protocol.messages import Order, encode

log = logging.getLogger("loractl.worker")

KILL_S = 5.0
"""Seconds within which a killed process ends, unless it waits in the kernel."""

MESSAGE_LIMIT = 1 << 20
"""Characters of a line; no message is nearly as long."""


def send(pipe: IO[str], message: Order) -> None:
    """Write an order; a trainer that has ended is noticed elsewhere, by its exit status."""
    line = encode(message)
    try:
        pipe.write(line)
        pipe.flush()
    except (BrokenPipeError, ValueError):  # the second: another thread is ending it and has closed the pipe
        log.warning("the trainer had ended before it could be told %s", message.type)


def kill(trainer: subprocess.Popen[str]) -> None:
    """End the trainer and all that it started: close its stdin first, then kill its whole session.

    A process that waits in the kernel (state D: a lost card, a hard NFS mount) outlives SIGKILL. It is left, with its
    `returncode` None: the supervisor must go on, and what remains on the card closes it.
    """
    assert trainer.stdin
    # in a thread: who writes to a trainer that reads nothing holds the pipe until that is killed
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
