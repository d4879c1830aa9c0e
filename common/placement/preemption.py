"""Preemption: which running jobs would have to stop for one of higher priority."""

from __future__ import annotations

from collections.abc import Sequence

from loractl.common.job.method import SharedNeed

from .cards import Card, Occupant, largest_gpu, takes
from .gangs import gang_of, takers
from .lines import Waiting


def give_way(job: Waiting, cards: Sequence[Card]) -> tuple[str, tuple[int, ...]] | None:
    """A card, and the running jobs that would have to stop there for a job of higher priority; None: no stop helps.

    As few jobs as possible; first those of the lowest priority, then those that hold least.
    """
    if (gang := gang_of(job, cards)) is not None:
        return _for_gang(job, gang, cards)
    largest, options = largest_gpu(cards), []
    for card in (c for c in cards if c.open and takes(c, job, cards, largest)):
        willing = _willing(job, card)
        for method in job.methods:
            size = job.need.of(method)
            going = None if size is None else _fewest(card, size, willing)
            if going:
                options.append((*_cost(going), card.node, tuple(j.job_id for j in going)))
    return min(options)[3:] if options else None


def _for_gang(job: Waiting, gang: SharedNeed, cards: Sequence[Card]) -> tuple[str, tuple[int, ...]] | None:
    """The same for a job on several cards: the cards, and the jobs that would have to stop on any of them. It does not
    begin on a silent card: stopping jobs for that one would gain nothing."""
    options, heard = [], [card for card in takers(job, gang, cards) if not card.silent]
    for method in job.methods:
        size = gang.need.of(method)
        if size is None:
            continue
        ways = [(card, going) for card in heard if (going := _leaving(job, card, size)) is not None]
        for host in {card.host for card, _ in ways}:
            of_box = sorted(
                (pair for pair in ways if pair[0].host == host), key=lambda way: (_cost(way[1]), way[0].node)
            )
            chosen = of_box[: gang.cards]
            going = list({j.job_id: j for _, leaving in chosen for j in leaving}.values())
            if len(chosen) == gang.cards and going:
                nodes = " and ".join(card.node for card, _ in chosen)
                options.append((*_cost(going), nodes, tuple(j.job_id for j in going)))
    return min(options)[3:] if options else None


def _willing(job: Waiting, card: Card) -> list[Occupant]:
    return [j for j in card.running if j.preemptible and j.priority < job.priority]


def _leaving(job: Waiting, card: Card, size: int) -> list[Occupant] | None:
    """The jobs that would have to stop on the card; none if it has room."""
    return [] if _has_room(card, size, []) else _fewest(card, size, _willing(job, card))


def _cost(going: Sequence[Occupant]) -> tuple[int, int, int]:
    return len(going), max((j.priority for j in going), default=-(2**31)), sum(j.reserved for j in going)


def _fewest(card: Card, size: int, willing: Sequence[Occupant]) -> list[Occupant] | None:
    """The smallest group of willing jobs that leaves room for `size` bytes and a slot when it ends: as few as possible,
    of the lowest priorities that suffice, and each the least that does."""
    for count in range(1, len(willing) + 1):
        for priority in sorted({job.priority for job in willing}):
            low = [job for job in willing if job.priority <= priority]
            # try the largest: if these are too small, any other group of this size is, too
            going = sorted(low, key=lambda j: -max(j.reserved, j.used))[:count]
            if len(going) == count and _has_room(card, size, going):
                return _spared(card, size, going, low)
    return None


def _spared(card: Card, size: int, going: list[Occupant], low: Sequence[Occupant]) -> list[Occupant]:
    """Replace each job, from the highest priority on, by the one of the lowest priority that frees enough room."""
    for one in sorted(going, key=lambda j: (-j.priority, -j.reserved)):
        rest = [job for job in going if job is not one]
        enough = [job for job in low if job not in rest and _has_room(card, size, [*rest, job])]
        going = [*rest, min(enough, key=lambda j: (j.priority, j.reserved))]
    return going


def _has_room(card: Card, size: int, going: Sequence[Occupant]) -> bool:
    """Whether these leave room and a slot."""
    then = card.without([job.job_id for job in going])
    return then.free >= size and then.slots > 0
