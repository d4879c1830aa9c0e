"""Whether any card of the fleet could ever hold a job, however long it waits."""

from __future__ import annotations

from collections.abc import Collection

from loractl.common.units import gib

from .cards import Card
from .lines import Waiting


def out_of_reach(job: Waiting, cards: Collection[Card]) -> str | None:
    """Why none of these cards could ever hold the job, as a sentence; None: one could, or that is not known.

    `job`: with all methods that it may run with at last.
    """
    if not cards:
        return None
    labelled = with_labels(cards, job.requires)
    if not labelled:
        return f"no box has the label {', '.join(f'{k}={v}' for k, v in sorted(job.requires))}"
    most = most_usable(labelled)
    if job.least is None or most is None or job.least <= most:
        return None
    largest = max(card.usable for card in [card for card in labelled if not card.processor] or labelled)
    return f"needs {gib(job.least)} GiB, the largest card has {gib(largest)}"


def with_labels(cards: Collection[Card], requires: frozenset[tuple[str, str]]) -> list[Card]:
    """The cards whose box has what a job asks for."""
    return [card for card in cards if requires <= card.labels]


def most_usable(cards: Collection[Card]) -> int | None:
    """Bytes that our jobs could ever take of the largest of these cards; None: of one that is not known now."""
    return max(card.usable for card in cards) if all(card.total for card in cards) else None
