"""Preemption: which running jobs would have to stop for one of higher priority."""

from __future__ import annotations

from collections.abc import Sequence

from .cards import Card, Occupant, largest_gpu, takes
from .lines import Waiting


def give_way(job: Waiting, cards: Sequence[Card]) -> tuple[str, tuple[int, ...]] | None:
    """A card, and the running jobs that would have to stop there for a job of higher priority; None: no stop helps.

    As few jobs as possible; first those of the lowest priority, then those that hold least.
    """
    largest, options = largest_gpu(cards), []
    for card in (c for c in cards if c.open and takes(c, job, cards, largest)):
        willing = [j for j in card.running if j.preemptible and j.priority < job.priority]
        for method in job.methods:
            size = job.need.of(method)
            going = None if size is None else _fewest(card, size, willing)
            if going:
                cost = max(j.priority for j in going), sum(j.reserved for j in going)
                options.append((len(going), *cost, card.node, tuple(j.job_id for j in going)))
    return min(options)[3:] if options else None


def _fewest(card: Card, size: int, willing: Sequence[Occupant]) -> list[Occupant] | None:
    """The smallest group of willing jobs that leaves room for `size` bytes and a slot when it ends."""
    for count in range(1, len(willing) + 1):
        # try the largest: if these are too small, any other group of this size is, too
        going = sorted(willing, key=lambda j: -max(j.reserved, j.used))[:count]
        if _has_room(card, size, going):
            single = [j for j in willing if _has_room(card, size, [j])] if count == 1 else []
            return [min(single, key=lambda j: (j.priority, j.reserved))] if single else going
    return None


def _has_room(card: Card, size: int, going: Sequence[Occupant]) -> bool:
    """Whether these leave room and a slot: a member of a host leaves its own part alone while others are in it."""
    then = card.without([job.job_id for job in going])
    return then.free >= size and then.slots > 0
