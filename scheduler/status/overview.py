"""The jobs at a glance: what runs, what waits and why, and what has ended."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.common.job.status import Status
from loractl.common.job.sweep import SweepView
from loractl.common.settings import Settings
from loractl.common.store.fleet import FleetView
from loractl.common.store.records import Choice, Page
from loractl.common.store.store import Store
from loractl.common.units import thousands
from loractl.scheduler.wait.cards import closed_cards, interruption_of, listed_cards
from loractl.scheduler.wait.queue import WaitingJobs, waiting_jobs, without_queue
from loractl.scheduler.wait.reasons import Tier
from loractl.scheduler.wait.starts import ExpectedStart

from .job import JobState, state_of

SWEEPS_SHOWN = 20
"""Sweeps that an overview lists; nobody reads more."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What runs, what waits and why, and what has ended today."""

    running: tuple[JobState, ...]  # the oldest first; none on a later page
    waiting: tuple[JobState, ...]  # a page of them, by priority, then the oldest first
    waits: WaitingJobs
    running_count: int
    waiting_count: int  # all that wait
    sweeps: tuple[SweepView, ...]  # the newest of these jobs
    sweep_count: int  # all such sweeps
    ended: Mapping[Status, int]  # today, by the clock of this machine
    after: int | None  # the next page starts after this job; None: this is the last
    now: dt.datetime
    closed: tuple[str, ...] = ()  # boxes and cards that are silent or drained, each in a few words
    nodes: Mapping[str, str] = field(default_factory=dict)  # what is wrong with a card with running jobs, by name

    @property
    def sentence(self) -> str:
        """What runs and waits, and which cards are silent or drained; without its full stop."""
        counts = f"{thousands(self.running_count)} running, {thousands(self.waiting_count)} waiting"
        return ", ".join([counts, *self.closed])

    def trouble_of(self, job: JobState) -> str | None:
        """What is wrong with a card on which a job runs; with its number if it is one of several."""
        found = ((card, self.nodes[card]) for card in job.cards if card in self.nodes)
        return next((f":{card.rpartition(':')[2]} {said}" if job.cards[1:] else said for card, said in found), None)

    @property
    def next_start(self) -> tuple[int, ExpectedStart] | None:
        """The waiting job that starts first, if known; of several at one moment, the one that the rule tries first."""
        coming = [(job_id, start) for job_id, start in self.waits.starts.items() if start.at > self.now]
        return min(coming, key=lambda found: found[1].at, default=None)

    def as_json(self) -> list[dict[str, Any]]:
        """The running jobs, then the waiting ones: each with its fields, and the reason for its wait as its
        `message`."""
        return _listed((*self.running, *self.waiting), self.waits)


@dataclass(frozen=True, kw_only=True)
class JobList:
    """Jobs in any state, the newest first."""

    jobs: tuple[JobState, ...]
    waits: WaitingJobs
    chosen: bool  # a filter left others out
    after: int | None  # the next page starts after this job; None: this is the last
    now: dt.datetime

    def as_json(self) -> list[dict[str, Any]]:
        """Each job's fields, with the reason for its wait as its `message`."""
        return _listed(self.jobs, self.waits)


def overview(
    store: Store,
    choice: Choice,
    page: Page,
    *,
    alone: bool = False,
    view: FleetView | None = None,
    with_sweeps: bool = True,
) -> Overview:
    """What runs, and a page of what waits. Raises JobNotFound.

    `alone`: no members of sweeps on the page. `view`: the fleet, if already read. `with_sweeps`: False if nobody looks
    at them; sweeps have all their members.
    """
    now = store.now()
    midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0).astimezone(dt.UTC)
    seen = store.jobs.glance(choice, page, midnight, alone=alone, most_sweeps=SWEEPS_SHOWN if with_sweeps else 0)
    first, view = page.after is None, view or store.cards.fleet()
    running = tuple(state_of(job, view) for job in seen.running)
    places = {card for job in running for card in job.cards if card in view.nodes}
    only_sweeps = bool(seen.waiting_count) and not seen.waiting  # no job's line says what it waits for
    no_card = ("no worker is online",) if only_sweeps and not listed_cards(view) else ()
    return Overview(
        running=running if first else (),
        waiting=tuple(map(state_of, seen.waiting)),
        waits=waiting_jobs(store, seen.waiting, view),
        running_count=len(seen.running),
        waiting_count=seen.waiting_count,
        sweeps=tuple(store.sweeps.several(seen.sweep_ids)) if first and seen.sweep_ids else (),
        sweep_count=seen.sweep_count,
        ended=seen.ended,
        after=seen.waiting[-1].job_id if seen.more_wait else None,
        now=now,
        closed=tuple(closed_cards(view)) or no_card,
        nodes={name: said for name in places if (said := interruption_of(view, name))},
    )


def told_of_queue(answer: Overview, settings: Settings) -> Overview:
    """The overview; while the queue is down, that is the reason of jobs that a card is about to take."""
    if all(wait.tier is not Tier.NEXT for wait in answer.waits.reasons.values()):
        return answer
    from loractl.common.queue.hints import queue_away

    away = queue_away(settings)
    return answer if away is None else replace(answer, waits=without_queue(answer.waits, away.sentence))


def job_list(store: Store, choice: Choice, page: Page) -> JobList:
    """A page of the jobs, in any state, the newest first."""
    found = store.jobs.newest(choice, page)
    rows = found[: page.limit]
    view = None if all(job.status.is_terminal for job in rows) else store.cards.fleet()
    return JobList(
        jobs=tuple(state_of(job, view) for job in rows),
        waits=waiting_jobs(store, rows, view),
        chosen=choice.is_set,
        after=rows[-1].job_id if len(found) > len(rows) else None,
        now=store.now(),
    )


def _listed(jobs: tuple[JobState, ...], waits: WaitingJobs) -> list[dict[str, Any]]:
    reasons = {job_id: {"message": str(wait)} for job_id, wait in waits.reasons.items()}
    return [job.as_json() | reasons.get(job.job_id, {}) for job in jobs]
