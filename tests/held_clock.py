"""A clock that stands while anybody works, and jumps when all who know it wait: a node's time in a test."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from loractl.worker.clock import NodeClock

Item = TypeVar("Item")

POLL_S, RARELY_S = 0.0005, 0.01
"""Real seconds between two looks at what threads wait for, while one of them works: at first, and when nothing comes
of it. A new wait begins at the first again."""


@dataclass(eq=False, kw_only=True)
class _Wait:
    holds: Callable[[], object]
    until: float
    woken: threading.Event = field(default_factory=threading.Event)


class HeldClock(NodeClock):
    """A thread works from its start, or from the end of its wait, to its next wait or its end. While one works, no time
    passes: neither a busy machine nor a slow service makes a test's seconds longer. When all wait, and no pipe that
    somebody reads has anything in it (`watch`), the time of the first who waits has come at once.

    What is made by `start`, and any thread that waits here, is known to the clock.
    """

    def __init__(self) -> None:
        self._now = 1000.0
        self._lock = threading.Lock()
        self._waits: dict[threading.Thread, _Wait] = {}
        self._known: set[threading.Thread] = {threading.current_thread()}
        self._changes = 0  # of the two above
        self._watched: list[Callable[[], bool]] = []
        self._stirred = threading.Event()
        self._closed = False
        self._fault: Exception | None = None  # that ended the ticker
        self._ticker = threading.Thread(target=self._tick, name="held clock", daemon=True)
        self._ticker.start()

    def close(self) -> None:
        self._closed = True
        self._stirred.set()
        self._ticker.join()

    def watch(self, quiet: Callable[[], bool]) -> None:
        """Let no time pass while `quiet` is false: a thread that is not known here reads a pipe."""
        self._watched.append(quiet)

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._wait(lambda: False, seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return self._wait(event.is_set, seconds)

    def wait_for(
        self, condition: threading.Condition, holds: Callable[[], object], seconds: float | None = None
    ) -> bool:
        def holds_now() -> bool:
            with condition:
                return bool(holds())

        until = math.inf if seconds is None else self._now + seconds
        while not (done := bool(holds())) and self._now < until:
            condition.release()
            try:
                self._wait(holds_now, until - self._now)
            finally:
                condition.acquire()
        return done

    def get(self, items: queue.SimpleQueue[Item], seconds: float) -> Item:
        until = self._now + seconds
        while True:
            try:
                return items.get_nowait()
            except queue.Empty:
                if self._now >= until:
                    raise
            self._wait(lambda: not items.empty(), until - self._now)

    def join(self, thread: threading.Thread, seconds: float | None = None) -> bool:
        return self._wait(lambda: not thread.is_alive(), math.inf if seconds is None else seconds)

    @contextlib.contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        while not lock.acquire(blocking=False):
            self._wait(lambda: not lock.locked(), math.inf)
        try:
            yield
        finally:
            lock.release()

    def start(self, work: Callable[[], object], name: str, *, daemon: bool = True) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)  # a test that fails leaves some
        with self._lock:
            self._known.add(thread)
            self._changes += 1
            thread.start()
        return thread

    def _wait(self, holds: Callable[[], object], seconds: float) -> bool:
        until, me = self._now + seconds, threading.current_thread()
        while not (done := bool(holds())) and self._now < until:
            wait = _Wait(holds=holds, until=until)
            with self._lock:
                if self._fault is not None:
                    raise RuntimeError("the held clock has ended: nobody would wake this wait") from self._fault
                self._known.add(me)
                self._waits[me] = wait
                self._changes += 1
            self._stirred.set()
            try:
                wait.woken.wait()
            except BaseException:  # a test's timeout
                with self._lock:
                    self._waits.pop(me, None)
                raise
        return done

    def _tick(self) -> None:
        pause = POLL_S
        try:
            while not self._closed:
                self._stirred.clear()
                came = self._look() or self._stirred.wait(pause)
                pause = POLL_S if came else min(2 * pause, RARELY_S)
        except Exception as fault:
            with self._lock:
                self._fault, waits = fault, list(self._waits.values())
            for wait in waits:
                wait.woken.set()
            raise

    def _look(self) -> bool:
        """Wake those whose wait is over; with nobody at work and nobody to wake, let the next time come."""
        with self._lock:
            at_work = self._known - self._waits.keys()
            working = {thread for thread in at_work if thread.is_alive()}
            self._known -= at_work - working
            waits, changes = dict(self._waits), self._changes
        quiet = not working and all(quiet() for quiet in self._watched)
        over = [thread for thread, wait in waits.items() if wait.until <= self._now or wait.holds()]
        with self._lock:
            if quiet and not over and changes == self._changes:
                self._now = max(self._now, min((w.until for w in waits.values() if w.until < math.inf), default=0.0))
                over = [thread for thread, wait in waits.items() if wait.until <= self._now]
            for thread in over:
                if self._waits.get(thread) is waits[thread]:
                    self._changes += 1
                    del self._waits[thread]
                    waits[thread].woken.set()
        return bool(over)
