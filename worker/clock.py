"""The clock that a node reads and waits on: the system's, or a test's."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class NodeClock:
    """The system's clock. All times are monotonic seconds.

    Timed waits in a node go through it, so that a test's clock knows what waits, and for what. Real I/O (a process's
    end, a pipe, a socket) waits as usual.
    """

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Whether the event was set in time."""
        return event.wait(seconds)

    def wait_for(
        self, condition: threading.Condition, holds: Callable[[], object], seconds: float | None = None
    ) -> bool:
        """With the condition held, wait until `holds`; False if the time runs out first. None: wait forever."""
        return bool(condition.wait_for(holds, seconds))

    def get(self, items: queue.SimpleQueue[Item], seconds: float) -> Item:
        """The next item. Raises queue.Empty when the time runs out."""
        return items.get(timeout=seconds)

    def join(self, thread: threading.Thread, seconds: float | None = None) -> bool:
        """Whether the thread ended in time. None: wait forever."""
        thread.join(seconds)
        return not thread.is_alive()

    @contextlib.contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """Hold a lock whose holder may wait on this clock."""
        with lock:
            yield

    def start(self, work: Callable[[], object], name: str, *, daemon: bool = True) -> threading.Thread:
        """Do work in its own thread."""
        thread = threading.Thread(target=work, name=name, daemon=daemon)
        thread.start()
        return thread


SYSTEM = NodeClock()
