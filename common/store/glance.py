"""The jobs at a glance, as rows: what runs, a part of what waits, and numbers for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from loractl.common.job.status import Status

from .tables import Job


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What an overview of the jobs needs: a few rows, and numbers for the rest."""

    running: list[Job]  # the oldest first
    waiting: list[Job]  # the page's, by priority, then the oldest first
    more_wait: bool  # behind the page
    waiting_count: int  # all that wait
    ended: dict[Status, int]  # that succeeded and that failed since the asked moment
    sweep_ids: list[int]  # the newest sweeps with a job of these, newest last
    sweep_count: int  # all such sweeps
