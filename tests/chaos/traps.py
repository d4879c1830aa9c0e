"""Faults that a trainer has to come to: a file in a box's home tells the stand-in, which takes it (trainer.py)."""

from __future__ import annotations

from pathlib import Path

import psutil

from .lab import Box, trainers_below
from .trainer import GANG_TRAP, TRAP

NEW_BASE = "change-the-base"
"""No trainer takes it: each has one job."""


def in_a_checkpoint(box: Box, *, others: bool) -> psutil.Process | None:
    """A trainer that stands in the middle of a checkpoint's file, or another rank of it. None: none does yet, and the
    next one that writes a checkpoint will, for some seconds."""
    trap = box.home / (GANG_TRAP if others else TRAP)
    for sign in _signs(trap):
        sign.unlink(missing_ok=True)  # else it goes on by itself
        try:
            trainer = psutil.Process(int(sign.suffix[1:]))
            found = trainers_below(trainer) if others else [trainer]
        except psutil.NoSuchProcess:  # another fault has killed it there
            continue
        if found:
            return found[0]
    trap.touch()
    return None


def changed_bases(box: Box) -> int:
    """Of how many trainers with several jobs on this box the base was changed."""
    return len(_signs(box.home / NEW_BASE))


def change_next_base(box: Box) -> None:
    """Let the next trainer there that has several jobs change its base."""
    (box.home / NEW_BASE).touch()


def _signs(trap: Path) -> list[Path]:
    return sorted(trap.parent.glob(f"{trap.name}.*"))
