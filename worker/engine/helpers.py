"""The helpers of a thread: OpenMP's threads, which compute with it.

libgomp gives each thread that computes helpers of its own, and they stay. While there are more of all of them than
cores, helpers sleep after each piece of work, however soon the next one comes: a pack's step takes nearly twice as
long. So a thread that lets others compute gives its helpers up; new ones are made in a tenth of a millisecond.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

SOFT = 1
"""omp_pause_soft (OpenMP 5.0, omp_pause_resource_all): settings stay, threads go."""


def give_up_helpers() -> None:
    """End the helpers of this thread. Call it outside of any computation."""
    for pause in _pauses():
        pause(SOFT)


@functools.cache
def _pauses() -> tuple[Callable[[int], int], ...]:
    """libgomp's function, where torch has brought that library; others need none."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return tuple(ctypes.CDLL(str(path)).omp_pause_resource_all for path in found)
