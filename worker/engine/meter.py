"""Measures passes over a shared base, a few of many: what they tell decides who may train together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

EVERY_S = 5.0
"""Seconds between two passes that are measured: on a card a measured one waits for all that was begun before it."""

FIRST = 2
"""Passes of new company that are not measured: they compile, and fill memory for the first time."""


class PassMeter:
    """`tell` gets the tokens, the members and the seconds of a pass: of its own computing, and of the clock. For one
    thread at a time."""

    def __init__(self, tell: Callable[[int, int, float, float], None]) -> None:
        self._tell = tell
        self._members, self._seen, self._next = 0, 0, 0.0

    @contextlib.contextmanager
    def around(self, tokens: int, members: int, device: torch.device) -> Iterator[None]:
        """A pass; it does not count where it fails."""
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
            # Others' load would look like a cost of the pass. Other threads of ours count as well, so the clock is the
            # upper end. A time limit is about the clock.
            seconds = min(seconds, (time.process_time() - computed) / torch.get_num_threads())
        self._tell(tokens, members, seconds, wall)
        self._next = time.monotonic() + EVERY_S


def _seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
