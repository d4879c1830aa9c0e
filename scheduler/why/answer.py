"""Why one job waits: the reason, every card, who goes first, when it starts, and what would help."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.job.status import Status
from loractl.scheduler.status.job import JobState, state_of, trouble_on
from loractl.scheduler.wait.cards import CardFit, card_fits
from loractl.scheduler.wait.gangs import CardsAsked, asked_of
from loractl.scheduler.wait.queue import reason, with_awaited
from loractl.scheduler.wait.reasons import Tier, Wait
from loractl.scheduler.wait.remedies import remedies, ways_out
from loractl.scheduler.wait.starts import REPLAYED_JOBS, ExpectedStart, ahead_of, reaches, read_starts, rivals

if TYPE_CHECKING:
    from loractl.common.placement.lines import Waiting
    from loractl.common.store.fleet import FleetView
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


@dataclass(frozen=True, kw_only=True)
class NotWaiting:
    """A job that runs or has ended."""

    job: JobState
    trouble: str | None = None  # what is wrong with a card on which it runs, in a few words

    def as_json(self) -> dict[str, Any]:
        """`job_id`, `status`, `word` (always null), and the job's message as `sentence`."""
        return {
            "job_id": self.job.job_id,
            "status": self.job.status.value,
            "word": None,
            "sentence": self.job.message,
        }


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """Who goes before a job."""

    jobs: tuple[tuple[int, str], ...]  # number and owner, in order of start
    complete: bool  # False: too many wait to list them all
    of: int | None  # jobs that could take the same cards, this one included; None: more than were read


NO_PLACE = Ahead(jobs=(), complete=True, of=None)
"""Of a job that somebody holds, or that waits for another one: it is in no line."""


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why a job waits."""

    job: JobState
    wait: Wait
    start: ExpectedStart | None  # None: not known
    cards: tuple[CardFit, ...]
    ahead: Ahead
    remedies: tuple[str, ...]  # sentences; empty if nothing helps, or nothing was tried
    now: dt.datetime
    asks: CardsAsked | None = None

    def as_json(self) -> dict[str, Any]:
        """The reason, the start and the cards.

        `tier`: never, policy, fleet, capacity or next; `word` and `sentence`: the reason; `vram_needed`: bytes, null
        while unknown; `asks`: `cards`, `bytes` of each, null while unknown, and `parallel`; `expected_start`: `at`,
        `spread_s`, `node` and `nodes`, or null; `cards`: how each card sees the job.
        """
        return {
            "job_id": self.job.job_id,
            "tier": self.wait.tier.name.lower(),
            "word": self.wait.word,
            "sentence": self.wait.sentence,
            "vram_needed": self.job.vram_needed,
            "asks": None if self.asks is None else self.asks.as_json(),
            "expected_start": None if self.start is None else self.start.as_json(),
            "cards": [card.as_json() for card in self.cards],
        }


def why(store: Store, job_id: int, *, with_remedies: bool = True) -> Why | NotWaiting:
    """Why a job waits. Raises JobNotFound. Remedies take time: they plan the job in smaller forms."""
    job = store.jobs.get(job_id)
    if job.status is not Status.QUEUED:
        if job.status is not Status.RUNNING:
            return NotWaiting(job=state_of(job))
        there = store.cards.fleet()
        state = state_of(job, there)
        return NotWaiting(job=state, trouble=trouble_on(there, state.cards))
    view, waiting = with_awaited(store.cards.fleet(), store, [job]), store.jobs.ready(REPLAYED_JOBS + 1)
    starts = read_starts(store, view, waiting)
    wait = reason(job, view, waiting, starts)
    if wait.tier is Tier.NEVER and with_remedies:
        helping = ways_out(job, view)
    elif wait.tier in (Tier.POLICY, Tier.NEXT) or not with_remedies:
        helping = _releases(job, wait, view)
    else:
        helping = remedies(job, view, store.cards.would_start)
    return Why(
        job=state_of(job),
        wait=wait,
        start=starts.get(job_id),
        cards=tuple(card_fits(job, view)),
        ahead=NO_PLACE if job.held else _ahead(job, view, waiting),
        remedies=helping,
        now=view.now,
        asks=asked_of(job, view),
    )


def _releases(job: Job, wait: Wait, view: FleetView) -> tuple[str, ...]:
    """What would let a job start that a person, or another job, holds back."""
    from loractl.common.job.ancestor import may_go_without

    if wait.word == "held":
        return (f"Release it: loractl retry {job.job_id}",)
    if wait.word != "after":
        return ()
    without: tuple[str, ...] = (f"Start without: loractl edit {job.job_id} --set after=[]",)
    if not may_go_without(job.spec, job.awaits):
        without = ()
    first = view.awaited.get(job.awaits or 0)
    ended = first is not None and first.status.is_terminal and first.status is not Status.SUCCEEDED
    return (f"Queue that one again: loractl retry {job.awaits}", *without) if ended and not job.after_any else without


def _ahead(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> Ahead:
    jobs = tuple((other.job_id, other.user) for other in ahead_of(job, view, waiting))
    of = len(rivals(job, view, waiting)) + 1 if len(waiting) <= REPLAYED_JOBS else None
    return Ahead(jobs=jobs, complete=reaches(job, waiting), of=of)
