"""A fork server without its process: the pipes of its trainers, and one that can't be killed."""

from __future__ import annotations

import io
import locale
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from loractl.worker.attempt.trainer_process import kill
from loractl.worker.clock import NodeClock
from loractl.worker.device.occupancy import JOB_VARIABLE, RUN_VARIABLE
from loractl.worker.node import fork_server as module
from loractl.worker.node.fork_server import ForkServer, ServerProcess
from loractl.worker.protocol.messages import PACKET, ForkAnswer, ForkRequest

from ...held_lab import HeldLab
from ...waiting import until_shown

REQUEST = ForkRequest(job_id=7, mark="f00d")


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """Answers a request as a fork server does. Its trainer is `cat`, which repeats its orders."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    marks = {JOB_VARIABLE: str(REQUEST.job_id), RUN_VARIABLE: REQUEST.mark}

    def answer() -> None:
        _, (stdin, stdout, stderr), _, _ = socket.recv_fds(theirs, PACKET, 3)
        trainer = subprocess.Popen(
            ["cat"], env={**os.environ, **marks}, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
        for pipe in (stdin, stdout, stderr):
            os.close(pipe)
        until_shown(trainer.pid)
        theirs.send(ForkAnswer(pid=trainer.pid).model_dump_json().encode())

    threading.Thread(target=answer, daemon=True).start()
    with ours, theirs:
        yield ServerProcess(process=None, connection=ours, mark="", inherited={}, born=0.0)  # type: ignore[arg-type]


def test_a_forked_trainer_s_pipes_are_utf_8_in_any_locale(server: ServerProcess) -> None:
    """As those of one that is started: the trainer reads and writes UTF-8. It waited for ever for an order with a path
    that the node's locale can't write."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        trainer = server.fork(REQUEST, patience_s=20)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    trainer.stdin.write("/data/実験/Universität\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "/data/実験/Universität\n"
    kill(trainer)


class Hangs:
    """A fork server that waits in the kernel while it imports: SIGKILL does not end it."""

    pid = 1 << 23  # Linux gives it to no process

    def __init__(self) -> None:
        self.stdout = io.StringIO()
        self.ended = False

    def poll(self) -> int | None:
        return -signal.SIGKILL if self.ended else None

    def wait(self, timeout: float) -> int:
        raise subprocess.TimeoutExpired("fork server", timeout)


class Leaps(NodeClock):
    """Runs a thread's work at once. Each of its waits takes a minute, and calls `each` with their number."""

    def __init__(self, each: Callable[[int, threading.Event], None]) -> None:
        self._each, self._number = each, 0

    def now(self) -> float:
        return 60.0 * self._number

    def start(self, work: Callable[[], object], name: str, *, daemon: bool = True) -> threading.Thread:
        work()
        return threading.current_thread()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self._number += 1
        self._each(self._number, event)
        return event.is_set()


def test_while_a_hanging_server_can_t_be_killed_no_other_is_started(
    held: HeldLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = list[Hangs]()

    def start(*_: Any, **__: Any) -> Hangs:
        servers.append(Hangs())
        return servers[-1]

    def look(minute: int, stopped: threading.Event) -> None:
        if minute == 60:
            assert len(servers) == 1
            servers[0].ended = True
        if minute == 70:
            assert len(servers) == 2
            stopped.set()

    monkeypatch.setattr(module.subprocess, "Popen", start)
    ForkServer(replace(held.places()[0], clock=Leaps(look)), lambda: False).start()
