"""Why the rule gives a waiting job no card, as values: for one job, after the rule has decided; and whether any card of
the fleet could ever hold it.

This asks the deciding predicates again, for every card. A claim never does: `place` stops early, and skips most jobs
unread.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from loractl.common.job.method import SharedNeed, least_need
from loractl.common.units import duration, gib

from .cards import (
    Card,
    Obstacle,
    Reservation,
    Room,
    avoided,
    failed,
    largest_gpu,
    lasts,
    least_limit,
    room_at,
    room_for,
    unsuited,
)
from .gangs import gang_of, may_share
from .lines import Waiting
from .rule import Decision, Placement, jobs_by_user


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


@dataclass(frozen=True, kw_only=True)
class Full:
    """The card has room for the job once others have ended."""

    at: dt.datetime | None  # None: not known
    after: tuple[int, ...]  # the jobs that must end
    only_slot: bool  # the memory is free already

    @property
    def rank(self) -> tuple[bool, dt.datetime]:
        """Orders cards by time; unknown times come last."""
        return self.at is None, self.at or dt.datetime.max.replace(tzinfo=dt.UTC)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The card has room for the job, but the rule gives that room to other jobs, or keeps it for one."""

    given: tuple[Waiting, ...]
    kept_for: Waiting | None  # perhaps this job


Refusal = Obstacle | Full | Taken


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A user already runs as many jobs as allowed."""

    user: str
    runs: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """The cards at one moment, and what the rule decided for them."""

    cards: Mapping[str, Card]
    decisions: Sequence[Decision]
    now: dt.datetime

    @functools.cached_property
    def largest(self) -> int:
        """See largest_gpu."""
        return largest_gpu(self.cards.values())

    @functools.cached_property
    def placed(self) -> dict[int, Placement]:
        """What starts, by job."""
        return {d.placed.job.job_id: d.placed for d in self.decisions if d.placed is not None}

    @functools.cached_property
    def kept(self) -> Reservation | None:
        """For which job cards are kept."""
        return next((d.reserved for d in self.decisions if d.reserved is not None), None)

    @functools.cached_property
    def _given(self) -> dict[str, tuple[Waiting, ...]]:
        given: dict[str, tuple[Waiting, ...]] = {}
        for placed in self.placed.values():
            for share in placed.shares:
                given[share.node] = (*given.get(share.node, ()), placed.job)
        return given

    def limit_of(self, user: str) -> Limit | None:
        """The limit on a user's jobs, if the running jobs reach it."""
        most, runs = least_limit(self.cards.values()), jobs_by_user(self.cards.values()).get(user, 0)
        return None if most is None or runs < most else Limit(user=user, runs=runs, most=most)

    def gang_of(self, job: Waiting) -> SharedNeed | None:
        """See gangs.gang_of."""
        return gang_of(job, self.cards.values()) if job.gangs else None

    def refusals(self, job: Waiting, at_last: Waiting) -> dict[str, Refusal | None]:
        """Why each card does not take the job. None: it has room and is nobody's, so the rule gives the job this card
        or another, unless its user may run no more.

        `at_last`: the job with all methods that it may have once it has waited for the preferred one.
        """
        gang = self.gang_of(job)
        return {node: self._refusal(job, at_last, card, gang) for node, card in self.cards.items()}

    def _refusal(self, job: Waiting, at_last: Waiting, card: Card, gang: SharedNeed | None) -> Refusal | None:
        """The first that applies: what holds for ever, what people and workers say, what the job waits for."""
        obstacle = unsuited(card, at_last, self.largest)
        if obstacle is Obstacle.LABELS or not at_last.methods:
            return obstacle if obstacle is Obstacle.LABELS else Obstacle.METHODS
        if card.total and (at_last.bound or 0) > card.usable:
            return Obstacle.SMALL
        if obstacle is Obstacle.RESULT or not card.open:
            return obstacle if obstacle is Obstacle.RESULT else Obstacle.CLOSED
        if not lasts(card, job):
            return Obstacle.TIME
        if gang is not None:
            return self._share(job, card, gang)
        if obstacle is Obstacle.SEVERAL:
            return self._too_few(at_last, card)
        if card.total and (at_last.least or 0) > card.usable:
            return Obstacle.TOO_FEW_NOW if job.gangs and self._enough_at_last(at_last, card) else Obstacle.SMALL
        if obstacle is Obstacle.PROCESSOR and unsuited(card, job, self.largest) is not None:
            return obstacle
        if avoided(card, job, self.cards.values()):
            return Obstacle.AVOIDED if failed(card, job) else Obstacle.FORMAT
        if (room := self._room(job, card)) is not None:
            return room if room.after else self._taken(job, card)
        if job.methods != at_last.methods and (job.bound or 0) > card.usable:
            return Obstacle.PATIENCE
        if card.left_s is not None and room_at(card, max(1, job.least or card.capacity), self.now) is not None:
            return Obstacle.TIME
        return Obstacle.PROGRAMS

    def _room(self, job: Waiting, card: Card) -> Full | None:
        """When the card has room for the job, by the method with which that is soonest; None: never by itself."""
        sizes = {None} if job.least is None else {job.need.of(method) for method in job.methods}
        rooms = [(size, room_for(card, job, size or max(1, card.capacity), self.now)) for size in sizes]
        full = [_full(card, size, room) for size, room in rooms if room is not None]
        return min(full, key=lambda one: (*one.rank, len(one.after)), default=None)

    def _taken(self, job: Waiting, card: Card) -> Taken | None:
        """Who has the card instead, where it has room."""
        given = tuple(other for other in self._given.get(card.node, ()) if other.job_id != job.job_id)
        kept_for = None if self.kept is None or self.kept.on(card.node) is None else self.kept.job
        mine = job.job_id in self.placed and card.node in {one.node for one in self.placed[job.job_id].shares}
        return None if mine or not (given or kept_for) else Taken(given=given, kept_for=kept_for)

    def _share(self, job: Waiting, card: Card, gang: SharedNeed) -> Refusal | None:
        """The same for a card that is to be one of several."""
        size = least_need(job.methods, gang.need)

        def room(other: Card) -> Room | None:
            return room_for(other, job, size or max(1, other.capacity), self.now) if may_share(other, job) else None

        mine, box = room(card), [other for other in self.cards.values() if other.host == card.host]
        if mine is not None and sum(room(other) is not None for other in box) >= gang.cards:
            return _full(card, size, mine) if mine.after else self._taken(job, card)
        if (size or 0) > card.usable:
            return Obstacle.UNSHARED
        if may_share(card, job) and (size or 1) > card.capacity:
            return Obstacle.PROGRAMS
        return self._too_few(replace(job, gangs=(gang,)), card)

    def _too_few(self, job: Waiting, card: Card) -> Obstacle:
        """Why the box of a card lacks others for the job: for ever, or until they open and are free again."""
        if not may_share(card, job):
            return Obstacle.UNSHARED
        return Obstacle.TOO_FEW_NOW if self._enough_at_last(job, card) else Obstacle.TOO_FEW

    def _enough_at_last(self, job: Waiting, card: Card) -> bool:
        """Whether the card's box could share the job once all its cards are open and all else has left them."""
        box = [other for other in self.cards.values() if other.host == card.host]
        return may_share(card, job) and out_of_reach(replace(job, alone=False), box) is None


def _full(card: Card, size: int | None, room: Room) -> Full:
    after = tuple(job.job_id for job in room.after)
    return Full(at=room.at, after=after, only_slot=size is not None and size <= card.free)
