"""What happened in a training, once it is over."""

from __future__ import annotations

from dataclasses import dataclass

from loractl.common.job.adjustment import Adjustment
from loractl.worker.protocol.messages import Peaks


@dataclass(frozen=True, kw_only=True)
class TrainingCourse:
    """The course of one attempt's training. The report reads it; nothing changes it any more."""

    first_step: int  # from which it was resumed; 0: from its beginning
    steps: int  # done in all, resumed ones included
    kept_step: int  # of the adapter that was kept
    stopped_early: int | None  # the step at which early stopping ended it
    losses: tuple[tuple[int, float], ...]  # (step, training loss)
    eval_losses: tuple[tuple[int, float], ...]  # (step, held-out loss)
    seconds: float  # inside this attempt's steps: evaluations and checkpoints left out
    wall_seconds: float  # of this attempt, preparing and evaluating included
    tokens: int  # real ones, padding left out, from the first step on
    tokens_per_second: float | None
    peaks: Peaks
    peak_kind: str  # what the peak counts, for people
    adjustment: Adjustment  # to what memory allowed
    changes: tuple[str, ...]  # the same in words
    optimizer: str
    train_batch: int
    accumulation_steps: int
    eval_batch: int
    gradient_checkpointing: bool
    threads: int
    companions: tuple[int, ...] = ()  # jobs that trained in the same process meanwhile
