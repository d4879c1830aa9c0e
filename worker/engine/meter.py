"""Measures passes over a shared base, a few of many: the results decide which jobs may train together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

EVERY_S = 5.0
"""Seconds between two measured passes: on a card, measuring waits for all earlier work."""

FIRST = 2
"""Unmeasured first passes of a new group of trainings: they compile, and fill memory for the first time."""


class PassMeter:
    """`tell` gets the tokens, the members and the seconds of a pass: of computing, and of wall-clock time. Only one
    thread at a time may use it."""

    def __init__(self, tell: Callable[[int, int, float, float], None]) -> None:
        self._tell = tell
        self._members, self._seen, self._next = 0, 0, 0.0

    @contextlib.contextmanager
    def around(self, tokens: int, members: int, device: torch.device) -> Iterator[None]:
        """A pass; a failing one does not count."""
        if members != self._members:
            self._members, self._seen, self._next = members, 0, 0.0
        self._seen += 1
        if self._seen <= FIRST or time.monotonic() < self._next:
            yield
            return
        began, computed = _seconds(device), time.process_time()
        yield
        seconds = wall = _seconds(device) - began
        if device.type == "cpu":
            # Other programs' load would look like a cost of the pass. Other threads of ours count as well, so
            # wall-clock time is the upper bound. A time limit is about wall-clock time.
            seconds = min(seconds, (time.process_time() - computed) / torch.get_num_threads())
        self._tell(tokens, members, seconds, wall)
        self._next = time.monotonic() + EVERY_S


def _seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
