"""The lab in numbers, for a monitoring system: read at one moment, and bounded for any number of jobs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loractl.scheduler.fleet.answer import DeviceState, fleet_of

if TYPE_CHECKING:
    from loractl.common.store.records import ChannelTraffic, JobCount, PastRun
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job

MOST_RUNNING = 1000
"""Running jobs with their own numbers."""

SETTLED_S = 5.0
"""A transaction commits at most this long after the time that it wrote; younger runs are read next time."""


@dataclass(frozen=True, kw_only=True)
class RunningJob:
    """A running job in numbers."""

    job_id: int
    node: str
    user: str
    progress: float | None  # 0..1
    lease_ends_at: dt.datetime | None
    reserved: Mapping[str, int]  # bytes, by card: on several cards, those of each


@dataclass(frozen=True, kw_only=True)
class LabCensus:
    """The lab at one moment."""

    now: dt.datetime
    counts: Sequence[JobCount]
    oldest_ready: dt.datetime | None
    round_at: dt.datetime | None  # when a node last made the round for all
    devices: Sequence[DeviceState]
    running: Sequence[RunningJob]
    traffic: Sequence[ChannelTraffic]  # of messages
    card_hours: Mapping[str, float]  # of all ended attempts ever, by user


def lab_census(store: Store) -> LabCensus:
    """The lab as it is now."""
    view = store.cards.fleet()
    reserved: dict[int, dict[str, int]] = {}
    for name, card in view.cards.items():
        for occupant in card.running:
            reserved.setdefault(occupant.job_id, {})[name] = occupant.reserved
    return LabCensus(
        now=view.now,
        counts=store.jobs.counts(),
        oldest_ready=store.jobs.oldest_ready(),
        round_at=view.round_at,
        devices=fleet_of(view).devices,
        running=[_running(job, reserved.get(job.job_id, {})) for job in list(view.running.values())[:MOST_RUNNING]],
        traffic=store.outbox.traffic(),
        card_hours=store.usage.card_hours(),
    )


def runs_since(store: Store, since: dt.datetime) -> tuple[Sequence[PastRun], dt.datetime]:
    """The attempts that began or ended since a moment, and the moment up to which they are known."""
    until = max(since, store.now() - dt.timedelta(seconds=SETTLED_S))
    return store.attempts.runs(since, until), until


def _running(job: Job, reserved: Mapping[str, int]) -> RunningJob:
    share = job.step / job.total_steps if job.step is not None and job.total_steps else None
    return RunningJob(
        job_id=job.job_id,
        node=job.node or "",
        user=job.user,
        progress=share,
        lease_ends_at=job.lease_expires_at,
        reserved=reserved,
    )
