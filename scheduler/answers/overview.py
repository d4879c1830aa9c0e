"""The jobs at a glance: what runs, what waits and why, and what has ended."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.job.status import Status

from .job import JobState, state_of
from .wait.queue import WaitingJobs, waiting_jobs

if TYPE_CHECKING:
    from loractl.common.job.sweep import SweepView
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A filter for jobs; with nothing set it takes all."""

    user: str | None = None
    label: tuple[str, str] | None = None  # key, value

    @property
    def is_set(self) -> bool:
        return bool(self.user or self.label)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What runs, what waits and why, and how the day went."""

    running: tuple[JobState, ...]  # the oldest first
    waiting: tuple[JobState, ...]  # by priority, then the oldest first
    waits: WaitingJobs
    sweeps: tuple[SweepView, ...]  # the sweeps of these jobs and of those that ended today
    ended: tuple[JobState, ...]  # today, by the clock of this machine
    now: dt.datetime

    def as_json(self) -> list[dict[str, Any]]:
        """The running jobs, then those that wait: each with its fields, and with why it waits as its `message`."""
        return _listed((*self.running, *self.waiting), self.waits)


@dataclass(frozen=True, kw_only=True)
class JobList:
    """Jobs in any state, the newest first."""

    jobs: tuple[JobState, ...]
    waits: WaitingJobs
    chosen: bool  # a filter left others out
    now: dt.datetime

    def as_json(self) -> list[dict[str, Any]]:
        """Each job's fields, with why it waits as its `message`."""
        return _listed(self.jobs, self.waits)


def overview(store: Store, choice: Choice) -> Overview:
    """What runs and what waits."""
    now = store.now()
    midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0).astimezone(dt.UTC)
    running = store.jobs(statuses=[Status.RUNNING], user=choice.user, label=choice.label)[::-1]
    queued = store.jobs(statuses=[Status.QUEUED], user=choice.user, label=choice.label)
    queued.sort(key=lambda job: (-job.priority, job.job_id))
    ended = store.jobs(ended_since=midnight, user=choice.user, label=choice.label)
    return Overview(
        running=tuple(map(state_of, running)),
        waiting=tuple(map(state_of, queued)),
        waits=waiting_jobs(store, queued),
        sweeps=_sweeps(store, [*running, *queued, *ended]),
        ended=tuple(map(state_of, ended)),
        now=now,
    )


def job_list(store: Store, choice: Choice, limit: int) -> JobList:
    """The newest jobs, in any state."""
    rows = store.jobs(user=choice.user, label=choice.label, limit=limit)
    jobs = tuple(map(state_of, rows))
    return JobList(jobs=jobs, waits=waiting_jobs(store, rows), chosen=choice.is_set, now=store.now())


def _sweeps(store: Store, jobs: list[Job]) -> tuple[SweepView, ...]:
    sweep_ids = {job.sweep_id for job in jobs if job.sweep_id is not None}
    return tuple(store.sweeps(sweep_ids)) if sweep_ids else ()


def _listed(jobs: tuple[JobState, ...], waits: WaitingJobs) -> list[dict[str, Any]]:
    reasons = {job_id: {"message": str(wait)} for job_id, wait in waits.reasons.items()}
    return [job.as_json() | reasons.get(job.job_id, {}) for job in jobs]
