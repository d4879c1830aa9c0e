"""The orders to a trainer: each stop goes to its job, all others to the trainer itself."""

from __future__ import annotations

import os
import queue
import sys
import threading
from dataclasses import dataclass
from typing import IO

from loractl.worker.protocol.messages import Ended, Order, Start, Stop, decode_order

EXIT_ORPHANED = 9

Orders = queue.SimpleQueue[Order]


@dataclass(frozen=True, kw_only=True)
class MemberOver:
    """A job's thread has finished: its report of the end, or an error of our own."""

    order: Start
    ended: Ended | BaseException


class OrderDesk:
    """Reads orders in a thread. Without a supervisor that it understands, it ends the process."""

    def __init__(self, commands: IO[str]) -> None:
        self._commands = commands
        self._own: queue.SimpleQueue[Order | MemberOver] = queue.SimpleQueue()
        self._members: dict[int, Orders] = {}

    def open(self) -> None:
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def next(self) -> Order | MemberOver:
        """Wait for the next order for the trainer itself, or the end of a job."""
        return self._own.get()

    def put(self, over: MemberOver) -> None:
        """Report to the trainer that a job has ended; the job's thread calls it."""
        self._own.put(over)

    def of(self, order: Start) -> Orders:
        """The orders for one job."""
        return self._members[order.job_id]

    def close(self, order: Start) -> None:
        """The job has ended: later orders for it are dropped."""
        self._members.pop(order.job_id, None)

    def _listen(self) -> None:
        try:
            for line in self._commands:
                order = decode_order(line)
                if isinstance(order, Stop):
                    if (member := self._members.get(order.job_id)) is not None:
                        member.put(order)
                    continue
                if isinstance(order, Start):
                    self._members[order.job_id] = queue.SimpleQueue()
                self._own.put(order)
        except ValueError as error:
            sys.stderr.write(f"the supervisor sent what this trainer can't read: {error}\n")
        os._exit(EXIT_ORPHANED)  # not sys.exit: the main thread may be in a CUDA call
