"""The stand-in's several cards: each rank makes a link in its turn, and all answer before a step is done.

Like loractl's own: they meet in a file that only they know, speak over loopback, and whoever is gone breaks the link of
the others. It has no patience of its own; a rank that stands still keeps all of them waiting.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from loractl.worker.protocol.messages import Start

Step = Callable[[bytes, int], bytes]

MEET_S = 60.0
"""Ranks that have not met by then never will: one has ended before."""

LINK_BYTES, STEP_BYTES = 32, 8


class Ranks(Protocol):
    def next_link(self, link: bytes, step: int) -> bytes: ...


class Alone:
    """One card."""

    def __init__(self, make: Step) -> None:
        self._make = make

    def next_link(self, link: bytes, step: int) -> bytes:
        return self._make(link, step)


class Gang:
    """The leader's side of several. Raises OSError when one of them is gone."""

    def __init__(self, order: Start, make: Step) -> None:
        assert order.meeting is not None
        self._make = make
        with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
            server.settimeout(MEET_S)
            aside = Path(f"{order.meeting}.new")
            aside.write_text(str(server.getsockname()[1]))
            aside.rename(order.meeting)
            self._others = [stack.enter_context(server.accept()[0]) for _ in order.ranks[1:]]
            for other in self._others:
                other.settimeout(None)
            self._stack = stack.pop_all()

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def next_link(self, link: bytes, step: int) -> bytes:
        """Whose turn it is makes it; the others say that they have seen the step."""
        for other in self._others:
            other.sendall(step.to_bytes(STEP_BYTES, "big") + link)
        made = [self._make(link, step), *(_read(other, LINK_BYTES) for other in self._others)]
        return made[step % len(made)]


def follow(order: Start, make: Step) -> None:
    """Do as the leader says until it has ended. Raises OSError when it is gone in the middle of a word."""
    assert order.meeting is not None
    deadline = time.monotonic() + MEET_S
    while not Path(order.meeting).exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the leader never came")
        time.sleep(0.02)
    with socket.create_connection(("127.0.0.1", int(Path(order.meeting).read_text()))) as leader:
        while told := leader.recv(STEP_BYTES + LINK_BYTES, socket.MSG_WAITALL):
            if len(told) < STEP_BYTES + LINK_BYTES:
                raise ConnectionResetError("half an order")
            leader.sendall(make(told[STEP_BYTES:], int.from_bytes(told[:STEP_BYTES], "big")))


def _read(other: socket.socket, size: int) -> bytes:
    said = other.recv(size, socket.MSG_WAITALL)
    if len(said) < size:
        raise ConnectionResetError("another rank is gone")
    return said
