"""Sizes of needs: coarse VRAM classes for the queues, fine steps for the order of waiting jobs."""

from __future__ import annotations

import math

from loractl.common.units import GIB

VRAM_CLASSES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 144, 192, 288)
"""GiB. A job waits in the smallest class that holds its need; sizes are those of cards that labs own."""


def vram_class(size: int | None) -> int:
    """The class (GiB) of a need in bytes; the smallest for an unknown one, the largest for one beyond all."""
    if size is None:
        return VRAM_CLASSES[0]
    return next((c for c in VRAM_CLASSES if size <= c * GIB), VRAM_CLASSES[-1])


def served_classes(free: int) -> tuple[int, ...]:
    """Classes of the jobs that fit into `free` bytes: those with a lower bound below it."""
    lower = (0, *VRAM_CLASSES[:-1])
    return tuple(c for c, bound in zip(VRAM_CLASSES, lower, strict=True) if bound * GIB < free)


def size_step(size: int | None) -> int:
    """The step of a need in bytes: eight to the octave from 1 GiB, 0 for an unknown one, 1 below 1 GiB."""
    if size is None:
        return 0
    octaves = math.log2(max(size, 1) / GIB)
    return 1 if octaves < 0 else 2 + math.floor(8 * octaves)
