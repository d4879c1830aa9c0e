"""The waiting jobs: for each its reason, what it asks for, and its expected start if known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.common.job.method import Parallel, least_need
from loractl.common.job.status import Status
from loractl.common.placement.gangs import gang_of
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import FleetView, is_ready, waiting_of
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.text import when_they_end

from .cards import KEPT
from .reasons import Tier, Wait, explain
from .starts import LISTED_JOBS, ExpectedStart, ahead_of, reaches, read_outlook


@dataclass(frozen=True, kw_only=True)
class CardsAsked:
    """How much a waiting job asks for."""

    bytes: int | None  # of its card, or of each of several; None: unknown
    cards: int = 1
    parallel: Parallel = Parallel.NONE

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return {**vars(self), "parallel": self.parallel.value}


def asked_of(job: Job, view: FleetView) -> CardsAsked:
    """What a waiting job asks of the current fleet."""
    me = waiting_of(vars(job), view.now)
    gang = gang_of(me, view.cards.values()) or (me.gangs[0] if me.gangs and not me.alone else None)
    if gang is None:
        return CardsAsked(bytes=me.least if me.gangs else job.vram_needed)
    return CardsAsked(bytes=least_need(me.methods, gang.need), cards=gang.cards, parallel=gang.parallel)


@dataclass(frozen=True, kw_only=True)
class WaitingJobs:
    """What is known about waiting jobs, by their numbers."""

    reasons: Mapping[int, Wait] = field(default_factory=dict)
    starts: Mapping[int, ExpectedStart] = field(default_factory=dict)  # of all ready jobs
    asks: Mapping[int, CardsAsked] = field(default_factory=dict)


def waiting_jobs(store: Store, jobs: Sequence[Job], view: FleetView | None = None) -> WaitingJobs:
    """Why the waiting jobs among these wait, and when the ready ones start.

    `view`: the fleet, if already read.
    """
    queued = [job for job in jobs if job.status is Status.QUEUED]
    if not queued:
        return WaitingJobs()
    view, ready = with_awaited(view or store.cards.fleet(), store, queued), store.jobs.ready(LISTED_JOBS + 1)
    wanted = [job.job_id for job in queued if is_ready(job, view.now)]
    starts = read_outlook(store, view, wanted, ready).starts if view.running or view.allowed else {}
    return WaitingJobs(
        reasons={job.job_id: reason(job, view, ready, starts) for job in queued},
        starts=starts,
        asks={job.job_id: asked_of(job, view) for job in queued},
    )


def with_awaited(view: FleetView, store: Store, jobs: Sequence[Job]) -> FleetView:
    """The view with the jobs that these start after, and those that they wait for in turn."""
    found: dict[int, Job] = {}
    while numbers := {job.awaits for job in jobs if job.awaits is not None} - found.keys():
        jobs = list(store.jobs.numbered(numbers).values())
        found |= {job.job_id: job for job in jobs}
    return replace(view, awaited=found) if found else view


def without_queue(waits: WaitingJobs, away: str) -> WaitingJobs:
    """The reasons while the queue is down (`away`: a sentence): jobs that a card is about to take wait for it."""
    told = {
        job_id: replace(wait, word="queue", sentence=f"{away}; {wait.sentence}, by polling")
        for job_id, wait in waits.reasons.items()
        if wait.tier is Tier.NEXT
    }
    return replace(waits, reasons={**waits.reasons, **told})


def reason(job: Job, view: FleetView, ready: Sequence[Waiting], starts: Mapping[int, ExpectedStart]) -> Wait:
    """Why the job waits. If it waits for room, the card on which it is expected to start is named, and when.

    If jobs of unknown length go before it, they are named instead.
    """
    wait, start = explain(job, view), starts.get(job.job_id)
    if wait.word not in ("memory", "busy") or not view.running:
        return wait
    if start is not None:
        after = start.after if len(start.nodes) == 1 else ()
        sentence = f"{start.nodes[0]} when {when_they_end(after)}" if after else wait.sentence
        kept = wait.sentence.endswith(KEPT) and not sentence.endswith(KEPT)
        return replace(wait, sentence=f"{sentence}{KEPT if kept else ''}", ends=start.at)
    if not (ahead := ahead_of(job, view, ready)):
        return wait
    more = f" and {'' if reaches(job, ready) else 'at least '}{len(ahead) - 1} more" if ahead[1:] else ""
    goes = "go first" if more else "goes first"
    return replace(wait, sentence=f"{wait.sentence}; job {ahead[0].job_id}{more} {goes}", ends=None)
