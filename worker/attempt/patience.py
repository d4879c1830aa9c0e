"""Patience with a service that is down: work is repeated until it succeeds, or until the patience ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from loractl.common.errors import ServiceUnreachable
from loractl.common.store.database import absence, outage
from loractl.worker.clock import SYSTEM, NodeClock

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
