"""The orders that come to a trainer: each stop goes to the job that it is for, all else to the trainer itself."""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import IO

from .messages import Release, Start, Stop, Take, decode_order

EXIT_ORPHANED = 9

Orders = queue.SimpleQueue[Start | Stop | Take | Release]


class OrderDesk:
    """Reads orders in a thread. Without a supervisor that can be understood it ends the process."""

    def __init__(self, commands: IO[str]) -> None:
        self._commands = commands
        self._own: Orders = queue.SimpleQueue()
        self._members: dict[int, Orders] = {}

    def open(self) -> None:
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def next(self) -> Start | Stop | Take | Release:
        """Wait for the next order that is for the trainer itself."""
        return self._own.get()

    def of(self, order: Start) -> Orders:
        """What is ordered of one job."""
        return self._members[order.job_id]

    def close(self, order: Start) -> None:
        """The job has ended: what comes for it now is for nobody."""
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
        os._exit(EXIT_ORPHANED)  # not sys.exit: the main thread may sit in a CUDA call
