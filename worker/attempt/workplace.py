"""What all attempts on one device share: its services and the patience with them, and the request to stop its jobs
(after a checkpoint, or now)."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from loractl.common.errors import LoractlError, ServiceUnreachable
from loractl.common.queue.hints import wake_cards
from loractl.common.settings import Settings
from loractl.common.store.database import absence, outage
from loractl.common.store.store import Store
from loractl.worker.allowance import threads_of_trainer
from loractl.worker.clock import SYSTEM, NodeClock
from loractl.worker.device.devices import Device

from .storage.client import StoreClient
from .trainer_process import ChildProcess, launch

Wish = Literal["checkpoint", "now"]

STOP_SHARE = 2 / 3
"""Of a bounded stop, for the current step and its checkpoint. The rest is for its way into the artifact store."""


class Drain:
    """What was asked of this node. Any thread may ask, and all threads read it.

    The worker's request ends this process and is never withdrawn. A person's order ends with another order.
    """

    def __init__(self, grace_s: float | None = None) -> None:
        """`grace_s`: how long a stop may take; None: as long as it needs."""
        self.grace_s = grace_s
        self._lock = threading.RLock()  # a signal handler asks, in whatever the main thread does at that moment
        self.asked: Wish | None = None  # what the worker wants, whatever people have ordered
        self.why: LoractlError | None = None  # why this node can't serve any more, if it ends by itself
        self.ordered = False  # a person drains this device at once
        self.alone = False  # the coming stop is only this node's: its worker starts another, and other nodes continue

    def ask(self, how: Wish) -> None:
        """The worker stops. A late first Ctrl-C must not undo the second one's "now"."""
        with self._lock:
            if self.asked is None or how == "now":
                self.asked = how

    @property
    def wish(self) -> Wish | None:
        """What the attempts here must obey."""
        return self.asked or ("checkpoint" if self.ordered else None)


log = logging.getLogger("loractl.worker")

BEAT_S = 5.0
"""How often a running job's row is written; more often with a short lease. A cancel takes effect within this time and a
step."""

SLOW_S = 30.0
"""The store may be silent for this long before a job's history says that it waits for it; less with a short lease."""

BEATS_A_LEASE = 6
"""The least number of beats in a lease: one or two may be late."""


class TrainerForks(Protocol):
    """A source of trainers that have finished their imports."""

    @property
    def marks(self) -> frozenset[str]:
        """Marks of processes that are no attempt's and no stray."""
        ...

    def fork(self, environment: Mapping[str, str], say: Callable[[str], None]) -> ChildProcess | None:
        """A trainer with this environment that waits for its order. None: start one; `say` gets the reason, if any."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """One device with its services."""

    settings: Settings
    store: Store
    artifacts: StoreClient
    device: Device
    node: str
    drain: Drain
    trainers: int = 1  # that this box may run at a time; they share its cores
    forks: TrainerForks | None = None  # None: every trainer is a new process
    clock: NodeClock = SYSTEM
    launch: Callable[..., ChildProcess] = launch  # starts a trainer
    held: Callable[[int], int] = lambda job_id: 0  # bytes of the device that a job's processes hold now

    @property
    def threads(self) -> int:
        """The threads for a trainer that starts now. Raises UsageError."""
        return threads_of_trainer(self.trainers)

    @property
    def slow_s(self) -> float:
        """A call of the artifact store without an answer for this long is reported, and may be abandoned."""
        return min(SLOW_S, self.settings.lease_s / 2)

    @property
    def beat_s(self) -> float:
        return min(BEAT_S, self.settings.lease_s / BEATS_A_LEASE)

    def wake_others(self, nodes: Collection[str]) -> None:
        """A hint to other cards; without it they look on their own a few seconds later. It may take seconds."""
        if not nodes:
            return
        try:
            wake_cards(self.settings, nodes)
        except LoractlError as error:  # the queue is down, or may not be used
            log.warning("%s", error.sentence)


Answer = TypeVar("Answer")


def away(error: BaseException) -> str | None:
    """Which service is down, as a sentence; None for an error that another try can't help."""
    if isinstance(error, ServiceUnreachable):
        return error.sentence
    why = outage(error)
    return None if why is None else absence(why)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long work is repeated. Seconds."""

    first_s: float  # between the first two tries; doubles after each
    most_s: float
    total_s: float = math.inf
    passing: Callable[[BaseException], str | None] = away
    over: Callable[[], bool] = lambda: False  # whether the answer is no longer wanted
    clock: NodeClock = SYSTEM

    def repeat(self, work: Callable[[], Answer], tell: Callable[[str], None]) -> Answer:
        """The answer of the first successful try; `tell` gets the error of each failed try.

        Raises what the last try raised: an error that more tries can't help, or any error once the patience is over.
        """
        end = self.clock.now() + self.total_s
        tries = Retrying(
            retry=retry_if_exception(lambda error: self.passing(error) is not None),
            wait=wait_exponential(multiplier=self.first_s, max=self.most_s),
            stop=lambda state: self.over() or self.clock.now() + state.upcoming_sleep >= end,
            before_sleep=lambda state: tell(self._met(state)),
            sleep=self.clock.sleep,
            reraise=True,
        )
        return tries(work)

    def _met(self, state: RetryCallState) -> str:
        error = state.outcome.exception() if state.outcome else None
        return (error and self.passing(error)) or str(error)
