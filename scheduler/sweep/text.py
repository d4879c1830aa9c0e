"""A sweep before it runs, or just queued: its members' settings, for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loractl.scheduler.cli.screen import Screen, number_columns, table
from loractl.scheduler.status.standing import shares, short_setting

if TYPE_CHECKING:
    from loractl.common.job.sweep import SweepView

    from .answer import SweepDraft


def queued_text(view: SweepView, screen: Screen) -> str:
    """A sentence that the members are queued, and the drawn points."""
    jobs = listed([member.job_id for member in view.members])
    losers = f"; losers stop after {shares(view.rungs)} of their steps" if view.rungs else ""
    lines = [f"Sweep {view.sweep_id}: {len(view.members)} jobs ({jobs}) are queued{losers}."]
    if view.trials is not None:
        members = [(str(member.job_id), member.settings) for member in view.members]
        lines += ["", f"Drawn with seed {view.seed}:", *_points("JOB", members, screen)]
    return "\n".join(lines)


def draft_text(answer: SweepDraft, screen: Screen) -> str:
    """The members that would be queued."""
    drawn = "" if answer.trials is None else f", drawn with seed {answer.seed}"
    losers = f" Losers would stop after {shares(answer.rungs)} of their steps." if answer.rungs else ""
    lines = [*_points("NAME", answer.points, screen), ""]
    return "\n".join([*lines, f"{len(answer.specs)} jobs{drawn}; none is queued.{losers}"])


def listed(job_ids: Sequence[int]) -> str:
    """12, 13, 14 as "12 to 14"; numbers with gaps one by one."""
    if len(job_ids) > 2 and all(b == a + 1 for a, b in itertools.pairwise(job_ids)):
        return f"{job_ids[0]} to {job_ids[-1]}"
    return ", ".join(map(str, job_ids))


def _points(first: str, members: Sequence[tuple[str, Mapping[str, Any]]], screen: Screen) -> list[str]:
    """The settings of each member, below the line `first`."""
    headers = [first, *members[0][1]]
    rows = [[name, *map(short_setting, settings.values())] for name, settings in members]
    return table(headers, rows, screen, right=number_columns(headers, rows))
