"""Gangs: several cards of one box that share a job. Which way a job takes, and which cards it gets or waits for.

Pure functions of values, like all of the placement.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from loractl.common.job.method import Method, SharedNeed

from .cards import Card, Room, could_hold, differs, elsewhere, failed, largest_gpu, lasts, room_for
from .lines import Waiting


@dataclass(frozen=True, kw_only=True)
class GangShare:
    """What a job has of one card."""

    node: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """The cards of one box on which a job would wait, and when each has room for it."""

    at: dt.datetime | None  # when the last one has; None: it depends on an end that is not known
    rooms: tuple[tuple[Card, Room], ...]


def gang_of(job: Waiting, cards: Collection[Card]) -> SharedNeed | None:
    """The way in which several cards are to share the job; None: one card is to have it, or it may have none.

    One card goes before several, where some GPU could hold the job once our other jobs have left it. Of the ways for
    several the first that some box could hold is taken.
    """
    if not job.gangs or (job.alone and _one_could_hold(job, cards)):
        return None
    return next((gang for gang in job.gangs if any(_holding(job, gang, cards))), None)


def _one_could_hold(job: Waiting, cards: Collection[Card]) -> bool:
    largest = largest_gpu(cards)
    return any(not card.processor and could_hold(card, job, largest) for card in cards)


def _holding(job: Waiting, gang: SharedNeed, cards: Iterable[Card]) -> Iterator[list[Card]]:
    """The cards of each box that could hold the job by a permitted method, once our other jobs have left them."""
    able = [card for card in cards if may_share(card, job) and card.max_jobs and card.capacity > 0]
    for of_box in _by_box(able):
        for method in job.methods:
            size = gang.need.of(method)
            holding = [card for card in of_box if size is None or size <= card.capacity]
            if len(holding) >= gang.cards:
                yield holding


def may_share(card: Card, job: Waiting) -> bool:
    """Whether the card may be one of several for the job at all; neither its room nor what failed is asked."""
    return elsewhere(card, job) is None and card.open and card.gangs and not card.processor and lasts(card, job)


def takers(job: Waiting, gang: SharedNeed, cards: Collection[Card]) -> list[Card]:
    """The cards that the rule may give the job: none that failed it, nor any of another number format than its
    checkpoint, while a box could hold it without them."""
    sound = [card for card in cards if not failed(card, job)]
    alike = [card for card in sound if not differs(card, job)]
    fewer = (some for some in (alike, sound) if len(some) < len(cards) and any(_holding(job, gang, some)))
    return [card for card in next(fewer, cards) if may_share(card, job)]


def best_group(cards: Sequence[Card], count: int) -> list[Card] | None:
    """`count` cards of one box: of one speed before others, idle before shared, then those that they fill best."""

    def order(card: Card) -> tuple[bool, int, str]:
        return len(card.running) > 0, card.free, card.node

    def rank(group: list[Card]) -> tuple[bool, int, int, list[str]]:
        shared = sum(len(card.running) > 0 for card in group)
        return _mixed(group), shared, sum(card.free for card in group), [card.node for card in group]

    groups = (sorted(pool, key=order)[:count] for pool in _pools(cards))
    whole = (sorted(group, key=lambda card: card.node) for group in groups if len(group) == count)
    return min(whole, key=rank, default=None)


def first_gathering(
    job: Waiting, gang: SharedNeed, cards: Sequence[Card], now: dt.datetime
) -> tuple[Method, Gathering] | None:
    """The cards on which the job can start first if no other job starts, by the method for which that is."""
    options = []
    for index, method in enumerate(job.methods):
        size = gang.need.of(method)
        rooms = [(card, room) for card in cards if (room := _room(card, job, size, now)) is not None]
        by_node = {card.node: (card, room) for card, room in rooms}
        for pool in _pools([card for card, _ in rooms]):
            chosen = sorted((by_node[card.node] for card in pool), key=lambda pair: _soonest(pair, now))[: gang.cards]
            at = _last(room for _, room in chosen)
            if len(chosen) == gang.cards and all(_lasts_until(at, card, job, now) for card, _ in chosen):
                found = Gathering(at=at, rooms=tuple(chosen))
                options.append((*_waited_for(found, now), index, [card.node for card, _ in chosen], method, found))
    if not options:
        return None
    *_, method, found = min(options, key=lambda option: option[:-2])
    return method, found


def _room(card: Card, job: Waiting, size: int | None, now: dt.datetime) -> Room | None:
    return room_for(card, job, max(1, card.capacity) if size is None else size, now)


def _lasts_until(at: dt.datetime | None, card: Card, job: Waiting, now: dt.datetime) -> bool:
    """Whether the card has time for the job when the last of the others has room."""
    return card.left_s is None or (at is not None and lasts(card, job, (at - now).total_seconds()))


def _soonest(pair: tuple[Card, Room], now: dt.datetime) -> tuple[bool, dt.datetime, int, str]:
    card, room = pair
    return room.at is None, room.at or now, card.capacity, card.node


def _waited_for(found: Gathering, now: dt.datetime) -> tuple[bool, dt.datetime, bool, int]:
    cards = [card for card, _ in found.rooms]
    return found.at is None, found.at or now, _mixed(cards), sum(card.capacity for card in cards)


def _last(rooms: Iterable[Room]) -> dt.datetime | None:
    moments = [room.at for room in rooms]
    return None if None in moments else max(at for at in moments if at is not None)


def _pools(cards: Sequence[Card]) -> Iterator[list[Card]]:
    """The cards of each box: all of them, then those of each model."""
    for of_box in _by_box(cards):
        models = {card.model for card in of_box}
        yield of_box
        if len(models) > 1:
            yield from ([card for card in of_box if card.model == model] for model in models)


def _by_box(cards: Iterable[Card]) -> Iterator[list[Card]]:
    of_box = sorted(cards, key=lambda card: (card.host, card.node))
    for _, group in itertools.groupby(of_box, key=lambda card: card.host):
        yield list(group)


def _mixed(cards: Sequence[Card]) -> bool:
    return len({card.model for card in cards}) > 1
