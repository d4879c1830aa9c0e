"""The placement rule: which waiting job starts now, on which card, with which method and how much memory.

Pure functions of values. The claim, `loractl why` and the simulator all ask `place`, so they share one rule.

The job with the least work that counts is tried first (`turns`): the seconds that it has left, and a part for what its
user has used lately, halved for each day that it has waited. A job that can't start is passed over. But a card is kept
for the first one that has waited past RESERVE_AFTER_S: from then on no job that would delay it starts there. A job
keeps off a card that failed it while another one could hold it. A job that would share a card waits for one that will
be empty before it has waited for as long as sharing would cost it. Where a card's worker will stop, a job begins only
if it can store a checkpoint before that, and nothing is kept or gathered beyond it.
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loractl.common.job.method import Method, Parallel, RoomyForm, SharedNeed
from loractl.common.units import GIB

from .cards import (
    Card,
    Kept,
    Occupant,
    Reservation,
    Room,
    has_room,
    largest_gpu,
    lasts,
    least_limit,
    room_for,
    takes,
)
from .duration import CONTENTION
from .gangs import GangShare, best_group, first_gathering, gang_of, takers
from .lines import Queue, Waiting, in_turn, waited, waited_again
from .shares import HALF_LIFE_S, LAST, NONE_LEFT, START_CHARGE_S

RESERVE_AFTER_S = 30 * 60.0
"""How long the first job in the order waits without fitting before a card is kept for it."""

USE_S = 2 * 3600.0
"""All the use of the cards lately adds this to the work of each of its user's jobs, a part of it adds that part. Chosen
by replay (docs/placement.md): more would hold up a heavy user's short jobs for longer than it spares others."""

PRIORITY_DAYS = 14.0
"""A step of priority counts for this many days of waiting. So of two jobs that came together the one of higher priority
goes first, if it has no more than 2 ** 14 times the work of the other: 11 days against a minute."""

GANG_FIRST_AFTER_S = 24 * 3600.0
"""Once a job on several cards has waited this long, its cards stay idle for it however late the others have room."""

IDLE_FOR_GANG_S = 3600.0
"""A card that already has room stays idle for a job on several cards if the others will have room within this time, or
within the time that the job has waited by then, or once that is a day. Others may use it before: until that day no card
idles for longer than the job has waited, and jobs of one length pass it for twice that length at most. After it nothing
bounds how long a card idles. The time begins again with each attempt, hold and retry: no card idles for earlier waits.
A job that began within the hour and whose end is not known yet counts as ending soon: else short jobs on two cards, one
of them always just begun, would pass the job for a day. A job whose end stays unknown would keep a card idle without
limit."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A job that starts."""

    job: Waiting
    node: str
    method: Method
    reserved: int  # bytes of that card
    beside: tuple[GangShare, ...] = ()  # what it has of other cards of the box
    parallel: Parallel = Parallel.NONE
    room: int = 0  # bytes of that card that it may have, `reserved` among them
    form: RoomyForm | None = None  # in which it does without recomputing; `reserved` is that form's

    @property
    def shares(self) -> tuple[GangShare, ...]:
        """What the job has of each of its cards."""
        return GangShare(node=self.node, bytes=self.reserved), *self.beside


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One step of the rule: a job that starts, or a job for which a card is kept."""

    placed: Placement | None = None
    reserved: Reservation | None = None
    declined: Placement | None = None  # next to other jobs: it is sooner done on the kept card, which will be empty


@dataclass(kw_only=True)
class _Fleet:
    """The cards while they fill up."""

    cards: dict[str, Card]
    now: dt.datetime
    charges: dict[str, float]
    running: dict[str, int]  # jobs by user
    shares: bool  # jobs share a card whatever that costs them, as before
    kept: Reservation | None = None
    promised: set[str] = field(default_factory=set)  # cards that are kept until they are empty
    tried: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)  # started, or has a card that will be empty
    largest: int = field(init=False)  # bytes for jobs on the largest open card that is no processor, others gone
    user_limit: int | None = field(init=False)
    awaited: set[int] = field(init=False)
    """Jobs for which running jobs were asked to stop: for nothing if others took their other room."""
    rooms: dict[str, int] = field(init=False)  # bytes that a job may take now, beside what is kept; of cards with room
    most_room: int = field(init=False)  # on one of them
    is_full: bool = field(init=False)
    """Whether no job can start any more. A processor leaves to GPUs what the largest could hold."""

    def __post_init__(self) -> None:
        usable = [c for c in self.cards.values() if c.open]
        self.largest = largest_gpu(usable)
        self.user_limit = least_limit(usable)
        running = [one for card in self.cards.values() for one in card.running]
        self.awaited = {one.gives_way_to for one in running if one.gives_way_to is not None}
        self._look()

    def _look(self) -> None:
        self.__dict__.pop("emptying", None)
        self.rooms = {node: room for node, card in self.cards.items() if (room := self._room(card)) > 0}
        self.most_room = max(self.rooms.values(), default=0)
        self.is_full = not any(r > self.largest or not self.cards[node].processor for node, r in self.rooms.items())

    def _room(self, card: Card) -> int:
        room = 0 if card.node in self.promised else card.room
        kept = self.kept.on(card.node) if room and self.kept is not None else None
        if kept is None:
            return room
        return max(0, min(room, kept.spare)) if kept.spare_slots > 0 else 0

    @functools.cached_property
    def emptying(self) -> list[tuple[float, int, str]]:
        """The cards that will be empty: after how many seconds, their bytes and names, the first one first."""
        empty = ((_until_empty_s(card, self.now), card.capacity, node) for node, card in self.cards.items())
        return sorted(one for one in empty if one[0] < math.inf)

    def is_hopeless(self, job: Waiting) -> bool:
        """Whether no card has room for the job, and none would be kept for it."""
        return self.kept is not None and job.bound is not None and job.bound > self.most_room

    def takes(self, card: Card, job: Waiting) -> bool:
        """Whether the job may run there at all, see `cards.takes`."""
        return takes(card, job, self.cards.values(), self.largest)

    def gang_of(self, job: Waiting) -> SharedNeed | None:
        """The way in which several cards are to share the job, see `gangs.gang_of`."""
        return gang_of(job, self.cards.values()) if job.gangs else None

    def start(self, placed: Placement, now: dt.datetime) -> None:
        """Take what the job has of its cards."""
        job = placed.job
        for share in placed.shares:
            occupant = Occupant(job_id=job.job_id, user=job.user, reserved=share.bytes, began=now)
            self.cards[share.node] = self.cards[share.node].with_job(occupant)
            if self.kept is not None:
                self.kept = self.kept.without(share.node, share.bytes)
        self._look()
        self.settled.add(job.job_id)
        hours = sum(share.bytes for share in placed.shares) / GIB * START_CHARGE_S / 3600
        self.charges[job.user] = self.charges.get(job.user, 0.0) + hours
        self.running[job.user] = self.running.get(job.user, 0) + 1

    def keep(self, kept: Reservation) -> None:
        """From now on others leave it what it needs."""
        self.kept = kept
        self._look()

    def promise(self, node: str, job: Waiting) -> None:
        """From now on nothing starts there until it is empty."""
        self.promised.add(node)
        self.settled.add(job.job_id)
        self._look()

    def at_limit(self, user: str) -> bool:
        """Whether the user may start nothing: the limit of running jobs is reached, or the quota is used up."""
        reached = self.user_limit is not None and self.running.get(user, 0) >= self.user_limit
        return reached or self.charges.get(user) == NONE_LEFT


def place(
    queue: Queue,
    cards: Sequence[Card],
    charges: Mapping[str, float],
    now: dt.datetime,
    by_share: bool = False,
) -> Iterator[Decision]:
    """What starts now, in the order in which it is decided; lazily, so that a caller may stop early.

    `charges`: GiB hours by user, see `charge`. `by_share`: in the order of before, see `turns_by_share`.
    """
    fleet = _Fleet(
        cards={c.node: c for c in cards},
        now=now,
        charges=dict(charges),
        running=jobs_by_user(cards),
        shares=by_share,
    )
    if fleet.is_full:
        return
    turn = turns_in(by_share, fleet.charges, now)
    yield from _try_in_turn(queue, queue.firsts(fleet.awaited, fleet.most_room), turn, fleet)
    if not fleet.is_full:
        yield from _try_in_turn(queue, queue.beyond(fleet.most_room), turn, fleet)


def _try_in_turn(
    queue: Queue, firsts: Iterable[Waiting], turn: Callable[[Waiting], tuple[float, ...]], fleet: _Fleet
) -> Iterator[Decision]:
    """Try the first job of each line, and the next of a line once the one before has started or has a card kept until
    it is empty: room only shrinks here, so where a job can't start, the rest of its line can't either."""
    for job in in_turn(queue, firsts, turn, lambda job: job.job_id in fleet.settled, fleet.is_hopeless):
        if fleet.is_full:
            return
        if job.job_id not in fleet.tried and not fleet.at_limit(job.user):
            yield from _try(job, fleet, fleet.now)


def turns_in(by_share: bool, charges: Mapping[str, float], now: dt.datetime) -> Callable[[Waiting], tuple[float, ...]]:
    """The lab's order: `turns`, or the one of before."""
    return turns_by_share(charges, now) if by_share else turns(charges)


def turns(charges: Mapping[str, float]) -> Callable[[Waiting], tuple[float, int]]:
    """Orders jobs as the rule tries them, the first one least: by the work that counts, then by number.

    The work that counts is (left_s + USE_S * share) / 2 ** (days waited + PRIORITY_DAYS * priority); `share` is the
    user's part of all use lately. Its logarithm is compared. There all waits grow alike, so the time of submission
    stands for them, and a job is passed only by those that come at most as many days later as their logarithms differ:
    nothing waits for ever. The charge of a user beyond a soft quota puts the user's jobs about a month behind.
    """
    share = _shares(charges)

    def turn(job: Waiting) -> tuple[float, int]:
        work = max(1.0, job.left_s + USE_S * share(job.user))
        days = job.since.timestamp() / HALF_LIFE_S - PRIORITY_DAYS * job.priority
        return math.log2(work) + days, job.job_id

    return turn


def turns_by_share(charges: Mapping[str, float], now: dt.datetime) -> Callable[[Waiting], tuple[float, float, int]]:
    """The order of before, which a lab may have back until the next release: what has waited a day by age, then by
    priority, by what its user has used, and by age."""

    def turn(job: Waiting) -> tuple[float, float, int]:
        if waited(job, now) >= HALF_LIFE_S:
            return -math.inf, 0.0, job.job_id
        return -job.priority, charges.get(job.user, 0.0), job.job_id

    return turn


def _shares(charges: Mapping[str, float]) -> Callable[[str], float]:
    """Gives a user's part of all use lately. `charges` may grow meanwhile, and so does the part."""
    total = max(1.0, sum(used for used in charges.values() if used < LAST))

    def share(user: str) -> float:
        return charges.get(user, 0.0) / total

    return share


class Term(enum.Enum):
    """What puts one job before another."""

    PRIORITY = enum.auto()
    LEFT = enum.auto()  # the work that is left
    USE = enum.auto()  # what its user has used
    WAIT = enum.auto()  # its age


def deciding(first: Waiting, other: Waiting, charges: Mapping[str, float], by_share: bool = False) -> Term | None:
    """What does most to put the first job before the other one; None: they are alike. `by_share`: in the order of
    before."""
    if by_share:
        less = charges.get(first.user, 0.0) < charges.get(other.user, 0.0)
        return Term.PRIORITY if first.priority > other.priority else Term.USE if less else Term.WAIT
    share = _shares(charges)

    def work(left_s: float, user: str) -> float:
        return math.log2(max(1.0, left_s + USE_S * share(user)))

    gains = {
        Term.PRIORITY: PRIORITY_DAYS * (first.priority - other.priority),
        Term.LEFT: work(other.left_s, first.user) - work(first.left_s, first.user),
        Term.USE: work(other.left_s, other.user) - work(other.left_s, first.user),
        Term.WAIT: (other.since - first.since).total_seconds() / HALF_LIFE_S,
    }
    term = max(gains, key=gains.__getitem__)
    return term if gains[term] > 0 else None


def _try(job: Waiting, fleet: _Fleet, now: dt.datetime) -> Iterator[Decision]:
    """Start the job on the best cards, or keep some for it when it has waited long enough."""
    gang, given_way = fleet.gang_of(job), job.job_id in fleet.awaited
    fleet.tried.add(job.job_id)
    found = _best(job, fleet) if gang is None else _best_gang(job, gang, fleet)
    if found is not None:
        empty = _sooner_alone(found, fleet) if gang is None and not given_way else None
        if empty is None:
            fleet.start(found, now)
            yield Decision(placed=found)
        else:
            fleet.promise(empty, job)
            yield Decision(reserved=Reservation(job=job, node=empty, spare=0, spare_slots=0), declined=found)
    elif fleet.kept is None and (given_way or waited(job, now) >= RESERVE_AFTER_S):
        kept = _keep(job, fleet, now) if gang is None else _keep_gang(job, gang, fleet, now)
        if kept is not None:
            fleet.keep(kept)
            yield Decision(reserved=kept)


def _sooner_alone(found: Placement, fleet: _Fleet) -> str | None:
    """The card that will be empty first, if by then the job has waited for less than sharing a card costs it.

    Both sides of the comparison stay the same while time passes, so a round that stops jobs for this one agrees with
    the claim after it. The job waits at most contention * (jobs beside it) * (its seconds left) for an empty card.
    """
    job, shared = found.job, fleet.cards[found.node]
    contention = CONTENTION if shared.contention is None else shared.contention
    patience_s = contention * len(shared.running) * job.left_s - waited_again(job, fleet.now)
    if fleet.shares or patience_s <= 0:
        return None
    for empty_s, _, node in fleet.emptying:
        if empty_s >= patience_s:
            break
        card = fleet.cards[node]
        kept = node in fleet.promised or (fleet.kept is not None and fleet.kept.on(node) is not None)
        if not kept and found.reserved <= card.capacity and fleet.takes(card, job) and lasts(card, job, empty_s):
            return node
    return None


def _until_empty_s(card: Card, now: dt.datetime) -> float:
    """Seconds until all jobs have left the card; what has outlived its expected end may go on."""
    ends = [one.ends for one in card.running if one.ends is not None and one.ends > now]
    known = ends and len(ends) == len(card.running) and card.takes_jobs
    return (max(ends) - now).total_seconds() if known else math.inf


def _best(job: Waiting, fleet: _Fleet) -> Placement | None:
    """The preferred method that some card holds now, and the card that it fills best.

    The fewer jobs share its compute, the better. Then large cards are left to large jobs.
    """
    for method in job.methods:
        size = job.need.of(method)
        roomy = ((fleet.cards[node], room) for node, room in fleet.rooms.items())
        holding = [card for card, room in roomy if has_room(card, job, size, room) and fleet.takes(card, job)]
        if holding:
            most = 1 if fleet.shares else math.inf
            card = min(holding, key=lambda card: (min(len(card.running), most), card.free, card.node))
            reserved = card.free if size is None else size
            return Placement(job=job, node=card.node, method=method, reserved=reserved, room=fleet.rooms[card.node])
    return None


def _best_gang(job: Waiting, gang: SharedNeed, fleet: _Fleet) -> Placement | None:
    """The preferred method that enough cards of some box hold now, and those that it fills best."""
    allowed = [card for card in takers(job, gang, fleet.cards.values()) if not card.silent]
    for method in job.methods:
        size = gang.need.of(method)
        roomy = [(c, fleet.rooms[c.node]) for c in allowed if c.node in fleet.rooms]
        holding = [c for c, room in roomy if (size <= room if size else not c.running)]
        group = best_group(holding, gang.cards)
        if group is not None:
            first, *beside = (GangShare(node=c.node, bytes=c.free if size is None else size) for c in group)
            parallel = gang.parallel
            return Placement(
                job=job, node=first.node, method=method, reserved=first.bytes, beside=tuple(beside), parallel=parallel
            )
    return None


def _keep(job: Waiting, fleet: _Fleet, now: dt.datetime) -> Reservation | None:
    """Keep the card where the job can start first: by expected ends, then by missing bytes."""

    def rank(option: tuple[int, int, Card, Room]) -> tuple[bool, dt.datetime, int, int, int, str]:
        index, size, card, room = option
        return room.at is None, room.at or now, size - card.free, index, card.capacity, card.node

    best = min(_rooms(job, fleet, now), key=rank, default=None)
    if best is None:
        return None
    *_, card, room = best
    return Reservation(job=job, node=card.node, spare=room.spare, spare_slots=room.spare_slots)


def _keep_gang(job: Waiting, gang: SharedNeed, fleet: _Fleet, now: dt.datetime) -> Reservation | None:
    """Keep the cards of one box where the job can start first, of those that are kept for no other job. Those that have
    room already are lent to others while that is far off. A card that takes nothing at the moment may do so when the
    others have room."""
    allowed = takers(job, gang, fleet.cards.values())
    cards = [replace(card, stuck=False) for card in allowed if card.node not in fleet.promised]
    first = first_gathering(job, gang, cards, now)
    if first is None:
        return None
    _, found = first
    waits_s = waited_again(job, now)
    patience_s = max(IDLE_FOR_GANG_S, waits_s)
    idle = all(_ends_soon(one, now, patience_s) for _, room in found.rooms for one in room.after)
    idle = idle or waits_s >= GANG_FIRST_AFTER_S
    kept = [
        Kept(node=card.node, spare=room.spare, spare_slots=room.spare_slots)
        for card, room in found.rooms
        if idle or room.after
    ]
    return None if not kept else Reservation(job=job, beside=tuple(kept[1:]), **vars(kept[0]))


def _ends_soon(job: Occupant, now: dt.datetime, patience_s: float) -> bool:
    """Whether its end is near; or is not known yet, as it began a short while ago."""
    if job.ends is not None:
        return (job.ends - now).total_seconds() <= patience_s
    return job.began is not None and (now - job.began).total_seconds() <= IDLE_FOR_GANG_S


def _rooms(job: Waiting, fleet: _Fleet, now: dt.datetime) -> Iterator[tuple[int, int, Card, Room]]:
    """Where and when the job could start: the method's place in its list, bytes, card and room."""
    for card in fleet.cards.values():
        if not card.open or card.node in fleet.promised or not fleet.takes(card, job):
            continue
        for index, method in enumerate(job.methods):
            size = job.need.of(method)
            bytes_ = max(1, card.capacity) if size is None or job.least is None else size
            if (room := room_for(card, job, bytes_, now)) is not None:
                yield index, bytes_, card, room


def jobs_by_user(cards: Iterable[Card]) -> dict[str, int]:
    """How many jobs of each user run."""
    users = {job.job_id: job.user for card in cards for job in card.running}
    counts: dict[str, int] = {}
    for user in users.values():
        counts[user] = counts.get(user, 0) + 1
    return counts
