"""Faults that a trainer has to come to: a file in a box's home tells the stand-in, which takes it (trainer.py)."""

from __future__ import annotations

import psutil

from .lab import Box, trainers_below
from .trainer import GANG_TRAP, TRAP


def in_a_checkpoint(box: Box, *, others: bool) -> psutil.Process | None:
    """A trainer that stands in the middle of a checkpoint's file, or another rank of it. None: none does yet, and the
    next one that writes a checkpoint will, for some seconds."""
    trap = box.home / (GANG_TRAP if others else TRAP)
    for sign in sorted(trap.parent.glob(f"{trap.name}.*")):
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
