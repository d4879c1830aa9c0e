"""Why one job waits: the reason, what ends it, every card, who goes first, and the command that helps."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace
from typing import Any

from loractl.common.job.status import Status
from loractl.common.store.store import Store
from loractl.scheduler.status.job import JobState, state_of, trouble_on
from loractl.scheduler.wait.cards import CardFit, card_fits
from loractl.scheduler.wait.queue import CardsAsked, asked_of, reason, with_awaited
from loractl.scheduler.wait.reasons import Tier, Wait
from loractl.scheduler.wait.sooner import sooner
from loractl.scheduler.wait.starts import LISTED_JOBS, ExpectedStart, ahead_of, reaches, read_outlook, why_unknown


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


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why a job waits."""

    job: JobState
    wait: Wait
    start: ExpectedStart | None  # None: not known
    cards: tuple[CardFit, ...]
    ahead: Ahead | None  # None: it is in no line, since somebody holds it or it waits for another one
    now: dt.datetime
    asks: CardsAsked | None = None
    unknown: str = ""  # why no start is expected, of a job that waits for room

    def as_json(self) -> dict[str, Any]:
        """The reason, what ends it and what helps, and the cards.

        `tier`: never, policy, fleet, capacity or next; `word` and `sentence`: the reason; `ends`: when that is over,
        null if not known; `helps` and `command`: the command that helps, null if waiting does; `vram_needed`: bytes,
        null while unknown; `asks`: `cards`, `bytes` of each, null while unknown, and `parallel`; `expected_start`:
        `at`, `spread_s`, `node`, `nodes`, `measured` and `predicted`, or null; `cards`: how each card sees the job.
        """
        return {
            "job_id": self.job.job_id,
            "tier": self.wait.tier.name.lower(),
            "word": self.wait.word,
            "sentence": self.wait.sentence,
            "ends": None if self.wait.ends is None else self.wait.ends.isoformat(),
            "helps": self.wait.helps or None,
            "command": self.wait.command or None,
            "vram_needed": self.job.vram_needed,
            "asks": None if self.asks is None else self.asks.as_json(),
            "expected_start": None if self.start is None else self.start.as_json(),
            "cards": [card.as_json() for card in self.cards],
        }


def why(store: Store, job_id: int, *, in_other_forms: bool = True) -> Why | NotWaiting:
    """Why a job waits. Raises JobNotFound. `in_other_forms`: whether to look for one that could start now; it is
    planned for that, which takes time."""
    job = store.jobs.get(job_id)
    if job.status is not Status.QUEUED:
        if job.status is not Status.RUNNING:
            return NotWaiting(job=state_of(job))
        there = store.cards.fleet()
        state = state_of(job, there)
        return NotWaiting(job=state, trouble=trouble_on(there, state.cards))
    view, waiting = with_awaited(store.cards.fleet(), store, [job]), store.jobs.ready(LISTED_JOBS + 1)
    found = read_outlook(store, view, [job_id], waiting)
    wait = reason(job, view, waiting, found.starts)
    looks = in_other_forms and wait.word != "patience" and wait.tier in (Tier.FLEET, Tier.CAPACITY)
    if looks and (form := sooner(job, view)) is not None:
        wait = replace(wait, helps=form[0], command=form[1])
    ahead = tuple((other.job_id, other.user) for other in ahead_of(job, view, waiting))
    return Why(
        job=state_of(job),
        wait=wait,
        start=found.starts.get(job_id),
        cards=tuple(card_fits(job, view)),
        ahead=None if job.held or job.awaits is not None else Ahead(jobs=ahead, complete=reaches(job, waiting)),
        now=view.now,
        asks=asked_of(job, view),
        unknown=why_unknown(job, view, waiting, found) if wait.tier is Tier.CAPACITY else "",
    )
