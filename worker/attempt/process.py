"""The trainer as a child process, seen from its supervisor: its pipes, its end, the reason that its end gives."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

from loractl.common.job.status import Reason
from loractl.worker.device.occupancy import end_leftovers
from loractl.worker.protocol.card_error import last_card_error
from loractl.worker.protocol.messages import Start, Stop, Take, Told, decode_told, encode

from .log import Sink, read_log

log = logging.getLogger("loractl.worker")

KILL_S = 5.0
"""Seconds within which a killed process ends, unless it waits in the kernel."""

MESSAGE_LIMIT = 1 << 20
"""Characters of a line; no message is nearly as long."""


def exit_reason(
    code: int | None, printed: Sequence[str] = (), *, limited: bool = False, on_card: bool = False
) -> dict[str, Any]:
    """Reason and sentence (`reason`, `message`) for a trainer that ended without a word.

    `code`: None for one that even SIGKILL does not end. `printed`: its last lines; some libraries end the process after
    a line on standard error. `limited`: its RAM was held to a limit. Not every library checks what it got; some crash
    where torch raises.
    """
    if code is None:
        reason, where = (Reason.GPU_ERROR, "the card's driver") if on_card else (Reason.TRAINER_ERROR, "a disk")
        return {"reason": reason, "message": f"the trainer can't be ended: it waits in the kernel, as for {where}"}
    if code == -signal.SIGKILL:
        return {
            "reason": Reason.HOST_OUT_OF_MEMORY,
            "message": "the trainer was killed (SIGKILL), most likely by the box's out-of-memory killer",
        }
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if (said := last_card_error(printed)) is not None:
        return {"reason": said[0], "message": f"the trainer ended ({how}) after it printed: {said[1]}"}
    if limited and code in (-signal.SIGSEGV, -signal.SIGABRT):
        name = signal.Signals(-code).name
        return {
            "reason": Reason.OUT_OF_MEMORY,
            "message": f"the trainer crashed ({name}), most likely at its limit of memory (LORACTL_TRAINER_RAM)",
        }
    return {"reason": Reason.TRAINER_ERROR, "message": f"the trainer ended without a result ({how})"}


def send(pipe: IO[str], message: Start | Stop | Take) -> None:
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
    trainer: subprocess.Popen[str], run: str, start: Start, log_file: IO[str], book: Sink
) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[Told | str]]]:
    """Read what a trainer says: the process, and the queue of what it tells. On exit all processes of the run end."""
    told: queue.SimpleQueue[Told | str] = queue.SimpleQueue()
    assert trainer.stdin and trainer.stdout and trainer.stderr
    readers = [
        threading.Thread(target=read_messages, args=(trainer.stdout, told, start.job_id), daemon=True),
        threading.Thread(target=read_log, args=(trainer.stderr, log_file, book), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        yield trainer, told
    finally:
        kill(trainer)
        end_leftovers(run)  # a process that holds the pipes open would make the readers wait
        for reader in readers:
            reader.join(timeout=5)


def read_messages(pipe: IO[str], told: queue.SimpleQueue[Told | str], job_id: int) -> None:
    """Queue what the trainer tells of this job; a line that is not a message goes to the log."""
    while line := pipe.readline(MESSAGE_LIMIT):  # a line may never end
        try:
            message = decode_told(line)
        except ValueError:
            told.put(f"[not a message] {line}")
            continue
        if message.job_id == job_id:
            told.put(message)
