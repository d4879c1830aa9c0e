"""A sweep: the state of its members, and its settings in short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loractl.common.job.status import Status
from loractl.common.text import clean_line

if TYPE_CHECKING:
    from loractl.common.job.sweep import Member, SweepView
    from loractl.common.store.store import Store

_STATES = ("running", "waiting", "stopped", "done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class SweepStanding:
    """A sweep at one moment."""

    sweep: SweepView
    troubles: Mapping[int, str] = field(default_factory=dict)  # what is wrong with a running member's card, by job

    def as_json(self) -> dict[str, Any]:
        """The sweep as JSON values.

        `sweep_id`, `name`, `user`, `created_at`; `varied`: the values of each key as given; `trials` and `seed` of the
        draw, null without one; `rungs`: the shares of the steps after which losers stop; `ended`; the number of members
        that are `running`, `waiting`, `stopped`, `done`, `failed`, `cancelled`; `best_job_id`, null before the first
        loss; `saved_steps` of `total_steps`; `members`: each with its fields, `settings`, and the `rungs` that it has
        reached.
        """
        sweep, best = self.sweep, self.sweep.best
        saved, steps = sweep.saved_steps
        return {
            "sweep_id": sweep.sweep_id,
            "name": sweep.name,
            "user": sweep.user,
            "created_at": sweep.created_at.isoformat(),
            "varied": dict(sweep.varied),
            "trials": sweep.trials,
            "seed": sweep.seed,
            "rungs": list(sweep.rungs),
            "ended": sweep.ended,
            **count(sweep),
            "best_job_id": None if best is None else best.job_id,
            "saved_steps": saved,
            "total_steps": steps,
            "members": [_as_member(member) for member in sweep.members],
        }


def sweep_standing(store: Store, sweep_id: int) -> SweepStanding:
    """Raises SweepNotFound."""
    from .job import trouble_on  # opens the store's tables; sweep needs only the texts below

    sweep = store.sweeps.get(sweep_id)
    running = [member for member in sweep.members if member.status is Status.RUNNING]
    there = store.cards.fleet() if running else None
    found = {m.job_id: said for m in running if there is not None and (said := trouble_on(there, m.cards))}
    return SweepStanding(sweep=sweep, troubles=found)


def count(sweep: SweepView) -> dict[str, int]:
    """How many members run, wait, were stopped early, are done, have failed, or were cancelled by a person."""
    states = [
        "running" if m.status is Status.RUNNING
        else "waiting" if m.status is Status.QUEUED
        else "done" if m.status is Status.SUCCEEDED
        else "stopped" if m.pruned
        else "failed" if m.status is Status.FAILED
        else "cancelled"
        for m in sweep.members
    ]  # fmt: skip
    return {name: states.count(name) for name in _STATES}


def named_settings(sweep: SweepView, member: Member) -> str:
    """The member's values of the varied keys in a phrase, like "r 8, learning_rate 0.0003"."""
    settings = zip(short_keys(sweep), settings_of(sweep, member), strict=True)
    return ", ".join(f"{name} {text}" for name, text in settings)


def short_keys(sweep: SweepView) -> list[str]:
    """The last word of each varied key, or the whole key if two have the same last word."""
    lasts = [key.rpartition(".")[2] for key in sweep.varied]
    named = zip(sweep.varied, lasts, strict=True)
    return [clean_line(last if lasts.count(last) == 1 else key) for key, last in named]


def titles(view: SweepView) -> list[str]:
    """The varied keys as column heads."""
    return [name.upper() for name in short_keys(view)]


def settings_of(sweep: SweepView, member: Member) -> list[str]:
    """The member's values of the varied keys, written short."""
    return [short_setting(member.settings[key]) for key in sweep.varied]


def short_setting(value: Any) -> str:
    """A setting, written short: 0.0003 rather than 0.00030000000000000003."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return clean_line(value if isinstance(value, str) else json.dumps(value))


def loss_of(member: Member) -> str:
    """Its loss at the end, or at the last rung that it reached."""
    if member.final_loss is not None:
        return f"{member.final_loss:.3f}"
    point = member.rungs[-1]
    return f"{point.loss:.3f} at {point.rung * 100:g} %"


def shares(rungs: Sequence[float]) -> str:
    """0.25 and 0.5 as "25 % and 50 %"."""
    return " and ".join(f"{rung * 100:g} %" for rung in rungs)


def _as_member(member: Member) -> dict[str, Any]:
    rungs, cards = [vars(point) for point in member.rungs], list(member.cards)
    return {**vars(member), "settings": dict(member.settings), "rungs": rungs, "cards": cards}
