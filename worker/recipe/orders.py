"""The supervisor's orders, as they come in on stdin: the one to start, then perhaps one to stop."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from typing import IO

from loractl.worker.protocol.messages import Order, Stop, decode_order

EXIT_ORPHANED = 9


@dataclass(frozen=True, kw_only=True)
class StopOrder:
    """Whether the supervisor has asked to stop, and for a checkpoint first. Any thread may look."""

    came: threading.Event = field(default_factory=threading.Event)
    saves: threading.Event = field(default_factory=threading.Event)

    def give(self, order: Stop) -> None:
        if order.save:
            self.saves.set()
        self.came.set()


def next_order(commands: IO[str]) -> Order:
    """Wait for the next order. Without a supervisor that it understands, the process ends."""
    try:
        if line := commands.readline():
            return decode_order(line)
    except ValueError as error:
        sys.stderr.write(f"the supervisor sent what this trainer can't read: {error}\n")
    sys.stderr.flush()
    os._exit(EXIT_ORPHANED)  # not sys.exit: the main thread may be in a CUDA call


def listen(commands: IO[str]) -> StopOrder:
    """Read orders from now on in a thread of their own: they can only ask to stop."""
    stop = StopOrder()

    def read() -> None:
        while True:
            if isinstance(order := next_order(commands), Stop):
                stop.give(order)

    threading.Thread(target=read, name="orders", daemon=True).start()
    return stop
