"""A sweep: jobs that were submitted together, how far each has come, and which of them continue after a rung.

The rule is ASHA's (Li et al. 2020, arXiv:1810.05934), with one change: every member starts at once and is stopped where
the paper would not promote it. No member waits or is paused. A rung is a share of a member's own steps. Pure.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .status import Reason, Stage, Status

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


OTHER_LOSSES = ("task_type", "base_model", "revision", "dataset", "evaluation", "preference")
"""Keys and sections that change what the held-out loss measures: losses that differ in one can't be compared.
training.label_smoothing_factor is none of them: held-out rows are measured without it."""


def unlike(varied: Iterable[str], task: str | None) -> str | None:
    """The first varied key by which the members' held-out losses can't be compared; None: they can. `task`: their
    task_type, as it is stored."""
    keys = list(varied)
    found = next((key for key in keys if any(_overlap(key, other) for other in OTHER_LOSSES)), None)
    begun = next((key for key in keys if _overlap(key, "lora.init_from")), None)
    if found is not None or begun is None:
        return found
    from .kinds import kind_of  # pydantic, without which status starts faster
    from .sections import TaskType

    known = task in list(TaskType)  # else a newer version wrote it
    return begun if kind_of(task if known else None).measured_from_start else None


def _overlap(key: str, other: str) -> bool:
    """Whether one of two keys is the other, or a section that holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


@dataclass(frozen=True, kw_only=True)
class NewSweep:
    """The sweep's own row, without its members."""

    name: str
    varied: Mapping[str, str]  # the values of each key, as they were given
    rungs: tuple[float, ...] | None = None  # None: no loser is stopped
    trials: int | None = None  # None: all points
    seed: int | None = None  # of the draw


@dataclass(frozen=True, kw_only=True)
class RungPoint:
    """A member's evaluation at a rung."""

    rung: float
    step: int
    loss: float

    @property
    def metric(self) -> str:
        return metric_of(self.rung)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One job of a sweep, as far as the sweep is concerned."""

    job_id: int
    name: str
    settings: Mapping[str, Any]  # of the varied keys
    status: Status
    reason: Reason | None = None
    stage: Stage | None = None
    held: bool = False
    step: int | None = None
    total_steps: int | None = None
    node: str | None = None  # the first of its cards
    cards: tuple[str, ...] = ()  # on which it runs
    message: str | None = None
    rungs: tuple[RungPoint, ...] = ()  # ascending
    final_loss: float | None = None  # of the tuned model, once the member has succeeded
    has_result: bool = False  # adapter and report are stored, and not removed since

    @property
    def pruned(self) -> bool:
        return self.status is Status.CANCELLED and self.reason is Reason.PRUNED

    @property
    def loss(self) -> float | None:
        """The last known held-out loss."""
        return self.final_loss if self.final_loss is not None else self.rungs[-1].loss if self.rungs else None


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """A sweep at one moment."""

    sweep_id: int
    name: str
    user: str
    varied: Mapping[str, str]
    created_at: dt.datetime
    rungs: tuple[float, ...] = ()
    trials: int | None = None
    seed: int | None = None
    members: Sequence[Member] = field(default_factory=tuple)
    unlike: str | None = None  # the varied key by which their losses can't be compared; None: they can

    @property
    def ended(self) -> bool:
        return all(member.status.is_terminal for member in self.members)

    @property
    def best(self) -> Member | None:
        """The member with the least final loss of those that have succeeded.

        Before the first success: the member with the least loss at its last rung, since less loss after fewer steps is
        ahead. None before the first rung, and where losses can't be compared.
        """
        if self.unlike is not None:
            return None
        done = [(m.final_loss, m.job_id, m) for m in self.members if m.final_loss is not None]
        if done:
            return min(done)[-1]
        there = [(m.rungs[-1].loss, m.job_id, m) for m in self.members if m.rungs]
        return min(there)[-1] if there else None

    @property
    def stored_best(self) -> Member | None:
        """The best of those with a final loss and a stored adapter, from which another job can begin. None where losses
        can't be compared."""
        if self.unlike is not None:
            return None
        stored = [(m.final_loss, m.job_id, m) for m in self.members if m.has_result and m.final_loss is not None]
        return min(stored)[-1] if stored else None

    @property
    def saved_steps(self) -> tuple[int, int]:
        """(steps that stopped members did not take, steps of all members); only members with a known number count."""
        saved = sum((m.total_steps or 0) - (m.step or 0) for m in self.members if m.pruned)
        return saved, sum(m.total_steps or 0 for m in self.members)


def no_best(view: SweepView) -> str:
    """Why no member of a sweep is its best, where losses can't be compared."""
    return f"sweep {view.sweep_id} has no best member: losses of different {view.unlike} can't be compared"


def metric_of(rung: float) -> str:
    """The name under which the loss at a rung is stored, like rung_0.25."""
    return f"rung_{rung:g}"


def setting(spec: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in a spec."""
    place: Any = spec
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place
