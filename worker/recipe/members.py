"""The members of a trainer process: jobs that are in it at the same time, each in its own thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from loractl.worker.protocol.messages import Ended, LogLines, MemberLeft, Start, Told

from .order_desk import MemberOver, OrderDesk, Orders

SWITCH_S = 0.0005
"""Seconds for which a thread that reads rows may keep the interpreter from one that computes. With Python's own 5 ms
each operation of a concurrent step waits that long."""


@dataclass(kw_only=True)
class Roster:
    """The jobs in this process. Any thread may ask."""

    lost: str | None = None  # in words, why training here no longer counts for any job
    shared: bool = False  # it is a host's: neither its output nor its memory peak belongs to one job
    _met: dict[int, set[int]] = field(default_factory=dict)  # job -> all jobs that were here at the same time
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, job_id: int) -> None:
        with self._lock:
            for met in self._met.values():
                met.add(job_id)
            self._met[job_id] = set(self._met)

    def leave(self, job_id: int) -> None:
        with self._lock:
            self._met.pop(job_id, None)

    def met_by(self, job_id: int) -> tuple[int, ...]:
        """The jobs that a job has shared the process with so far."""
        with self._lock:
            return tuple(sorted(self._met.get(job_id, ())))

    @property
    def any_job(self) -> int | None:
        """Note that a job is here."""
        with self._lock:
            return next(iter(self._met), None)

    def share(self, say: Callable[[], None]) -> None:
        """Become several jobs' process. `say` prints the line after which standard error belongs to no job."""
        with self._lock:
            sys.setswitchinterval(SWITCH_S)
            say()
            self.shared = True

    def write(self, job_id: int, text: str, tell: Callable[[Told], None]) -> None:
        """Add lines to a job's log: by standard error, or as a message."""
        with self._lock:
            if not self.shared:
                sys.stderr.write(text)
                sys.stderr.flush()
                return
        tell(LogLines(job_id=job_id, text=text))


class MemberServer(Protocol):
    """What a process does for its members. All but `serve` is called in the main thread."""

    def begin(self, order: Start, *, alone: bool) -> None:
        """A member comes; its thread has not started. `alone`: there is no other member."""

    def serve(self, order: Start, orders: Orders, tell: Callable[[Told], None]) -> Ended:
        """Train, in the member's thread."""
        ...

    def let_go(self, order: Start, ended: Ended) -> str | None:
        """A member has left others. Returns why nobody may join any more: what is left of it here, or how it ended."""
        ...

    def settle(self, order: Start, ended: Ended) -> Ended:
        """The last member has left. Its end says how many bytes of the base stay; None: this process ends."""
        ...


class Members:
    """The members that train in this process. Only the main thread calls it."""

    def __init__(
        self, server: MemberServer, desk: OrderDesk, tell: Callable[[Told], None], roster: Roster | None = None
    ) -> None:
        self._server, self._desk, self._tell = server, desk, tell
        self._roster = roster or Roster()
        self._threads: dict[int, threading.Thread] = {}

    def __len__(self) -> int:
        return len(self._threads)

    def begin(self, order: Start) -> None:
        """Let a member train in its own thread; its end comes to the desk."""
        self._server.begin(order, alone=not self._threads)
        self._roster.enter(order.job_id)
        # daemon: if one raises something unexpected, the process ends with all of them
        thread = threading.Thread(target=self._work, args=(order,), name=f"job {order.job_id}", daemon=True)
        self._threads[order.job_id] = thread
        thread.start()

    def finish(self, over: MemberOver) -> bool:
        """Report the end of a member whose thread is done; returns whether the process continues. Raises what the
        thread raised."""
        order, ended = over.order, over.ended
        self._threads.pop(order.job_id).join()
        self._desk.close(order)  # before its end is reported: the job may come back at once
        if isinstance(ended, BaseException):
            raise ended
        if self._threads:
            self._tell(ended.model_copy(update={"base_bytes": None}))
            self._roster.leave(order.job_id)
            self._tell(MemberLeft(job_id=order.job_id, fault=self._server.let_go(order, ended)))
        else:
            ended = self._server.settle(order, ended)
            self._roster.leave(order.job_id)
            self._tell(ended)
        return bool(self._threads) or ended.base_bytes is not None

    def _work(self, order: Start) -> None:
        ended: Ended | BaseException
        try:
            ended = self._server.serve(order, self._desk.of(order), self._tell)
        except BaseException as error:  # noqa: BLE001  raised again in the main thread, which ends the process
            ended = error
        self._desk.put(MemberOver(order=order, ended=ended))
