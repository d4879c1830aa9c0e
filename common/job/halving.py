"""Which members of a sweep continue after a rung: asynchronous successive halving in its stopping form.

The rule is ASHA's (Li et al. 2020, arXiv:1810.05934), with one change: every member starts at once and is stopped where
the paper would not promote it. No member waits or is paused. A rung is a share of a member's own steps. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

RUNGS = (0.25, 0.5)
"""Shares of a member's steps, ascending, at which it is compared."""

ETA = 2
"""At a rung the best 1/ETA continue."""

_SLACK = 1e-9
"""A decimal share like 0.05 is not exact in binary, so it may miss a rung by rounding."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rung says of one member. Losses in nats a token."""

    goes_on: bool
    kept: int  # how many of the best continue
    reached: int  # members that have been at the rung, this one included
    bar: float  # the largest loss that continues now


def judge(loss: float, others: Collection[float]) -> Verdict:
    """Whether a member with this held-out loss at a rung continues; `others`: losses of earlier members.

    Among the best 1/ETA of all of them, at least one; ties continue. A member that is best at every rung is
    never stopped, in whatever order the members come.
    """
    losses = sorted([loss, *others])
    kept = max(1, len(losses) // ETA)
    bar = losses[kept - 1]
    return Verdict(goes_on=loss <= bar, kept=kept, reached=len(losses), bar=bar)


def eval_interval(eval_steps: float, total_steps: int) -> int:
    """Steps between two evaluations, as transformers counts them: below 1, `eval_steps` is a share of all steps."""
    return math.ceil(total_steps * eval_steps) if eval_steps < 1 else int(eval_steps)


def rung_step(rung: float, eval_steps: float, total_steps: int) -> int | None:
    """The step of the first evaluation at or beyond a rung; None where none comes before the last step."""
    every = eval_interval(eval_steps, total_steps)
    step = every * math.ceil(rung * total_steps / every - _SLACK)
    return step if 0 < step < total_steps else None


def meets_rungs(eval_steps: float, max_steps: int | None) -> bool:
    """Whether evaluations fall on the rungs, apart from rounding up to whole steps. `max_steps`: None if unknown."""
    if eval_steps >= 1:
        return max_steps is not None and all(rung * max_steps % eval_steps == 0 for rung in RUNGS)
    return all(abs(rung / eval_steps - round(rung / eval_steps)) < _SLACK and eval_steps <= rung for rung in RUNGS)
