"""Whether any card of the fleet could ever hold a job, and if not, why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from loractl.common.units import duration, gib

from .cards import Card
from .gangs import gang_of
from .lines import Waiting


def out_of_reach(job: Waiting, cards: Collection[Card]) -> str | None:
    """Why none of these cards could ever hold the job, as a sentence; None: one could, or that is not known.

    `job`: with all methods that it may eventually run with.
    """
    if not cards:
        return None
    labelled = with_labels(cards, job.requires)
    if not labelled:
        return f"no box has the label {', '.join(f'{k}={v}' for k, v in sorted(job.requires))}"
    if (why := _why_no_time(job, labelled)) is not None:
        return why
    most = most_usable(labelled)
    if job.gangs or not job.alone:
        if most is None or _several_could_hold(job, labelled):
            return None
        if not job.alone:
            return _why_not_several(job, labelled)
    if job.least is None or most is None or job.least <= most:
        return None
    largest = max(card.usable for card in [card for card in labelled if not card.processor] or labelled)
    return f"needs {gib(job.least)} GiB, and the largest card has {gib(largest)} GiB"


def _why_no_time(job: Waiting, cards: Collection[Card]) -> str | None:
    """Where the job is longer on its way to a checkpoint than any of these workers stays."""
    windows = [card.window_s for card in cards if (job.bound or 0) <= card.usable]
    known = [seconds for seconds in windows if seconds is not None]
    if job.checkpoint_s is None or not known or len(known) < len(windows) or job.checkpoint_s <= max(known):
        return None
    took, longest = duration(job.checkpoint_s), duration(max(known))
    return f"needs {took} to store its first checkpoint, and no worker stays longer than {longest}"


def _several_could_hold(job: Waiting, cards: Collection[Card]) -> bool:
    """Whether cards of one box could share the job, once all else has left them."""
    empty = [replace(c, running=(), outside=0, open=True, max_jobs=max(1, c.max_jobs)) for c in cards]
    return gang_of(replace(job, alone=False), empty) is not None


def _why_not_several(job: Waiting, cards: Collection[Card]) -> str:
    fewest = min((gang.cards for gang in job.gangs), default=2)
    if not any(card.gangs for card in cards):
        return f"asks for {fewest} cards, and no worker here runs a job on several"
    size = job.bound
    each = "" if size is None else f" of {gib(size)} GiB"
    return f"needs {fewest} cards{each} of one box, and no box has them"


def with_labels(cards: Collection[Card], requires: frozenset[tuple[str, str]]) -> list[Card]:
    """The cards whose box has what a job asks for."""
    return [card for card in cards if requires <= card.labels]


def most_usable(cards: Collection[Card]) -> int | None:
    """Bytes that our jobs could ever take of the largest of these cards; None: of one that is not known now."""
    return max(card.usable for card in cards) if all(card.total for card in cards) else None
