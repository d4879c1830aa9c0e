"""The members of a trainer process: jobs that are in it at the same time, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from loractl.worker.protocol.messages import Ended, MemberLeft, Start, Told

from .order_desk import MemberOver, OrderDesk, Orders
from .roster import Company


class MemberServer(Protocol):
    """What a process does for its members. All but `serve` is called in the main thread."""

    def begin(self, order: Start, *, alone: bool) -> None:
        """A member comes, whose thread has not begun. `alone`: there is no other one."""

    def serve(self, order: Start, orders: Orders, tell: Callable[[Told], None]) -> Ended:
        """Train, in the member's thread."""
        ...

    def let_go(self, order: Start, ended: Ended) -> str | None:
        """A member has left others. Returns why nobody may come any more: what of it is here, or how it ended."""
        ...

    def settle(self, order: Start, ended: Ended) -> Ended:
        """The last one has left. Its end says how many bytes of the base stay; None: this process ends."""
        ...


class Members:
    """Who trains in this process. The main thread calls it."""

    def __init__(
        self, server: MemberServer, desk: OrderDesk, tell: Callable[[Told], None], company: Company | None = None
    ) -> None:
        self._server, self._desk, self._tell = server, desk, tell
        self._company = company or Company()
        self._threads: dict[int, threading.Thread] = {}

    def __len__(self) -> int:
        return len(self._threads)

    def begin(self, order: Start) -> None:
        """Let a member train in a thread of its own; its end comes to the desk."""
        self._server.begin(order, alone=not self._threads)
        self._company.enter(order.job_id)
        # daemon: where one raises what nobody expected, the process ends with all
        thread = threading.Thread(target=self._work, args=(order,), name=f"job {order.job_id}", daemon=True)
        self._threads[order.job_id] = thread
        thread.start()

    def finish(self, over: MemberOver) -> bool:
        """Tell the end of a member whose thread is done; whether the process goes on. Raises what the thread raised."""
        order, ended = over.order, over.ended
        self._threads.pop(order.job_id).join()
        self._desk.close(order)  # before its end is told: the job may come back at once
        if isinstance(ended, BaseException):
            raise ended
        if self._threads:
            self._tell(ended.model_copy(update={"base_bytes": None}))
            self._company.leave(order.job_id)
            self._tell(MemberLeft(job_id=order.job_id, fault=self._server.let_go(order, ended)))
        else:
            ended = self._server.settle(order, ended)
            self._company.leave(order.job_id)
            self._tell(ended)
        return bool(self._threads) or ended.base_bytes is not None

    def _work(self, order: Start) -> None:
        ended: Ended | BaseException
        try:
            ended = self._server.serve(order, self._desk.of(order), self._tell)
        except BaseException as error:  # noqa: BLE001  raised again in the main thread, which ends the process
            ended = error
        self._desk.put(MemberOver(order=order, ended=ended))
