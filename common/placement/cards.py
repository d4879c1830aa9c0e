"""Cards as the placement sees them: what they have free, when they will have more, which jobs suit them and
for whom they are kept."""

from __future__ import annotations

import datetime as dt
import enum
import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from loractl.common.units import GIB

from .lines import Waiting

MARGIN_BYTES = GIB // 2
"""Left free on every device unless its owner says otherwise (`worker --reserve`): a desktop or a driver may take this
much between the check and the allocation."""

SHARED_FROM_BYTES = 40 * GIB
"""Cards below this run one job unless their owner says otherwise: a small card has no room for two."""

SHARED_JOBS = 4
"""Jobs that may share a larger card unless its owner says otherwise; they also share its compute."""


def default_max_jobs(total: int) -> int:
    """Jobs that may share a card of `total` bytes."""
    return SHARED_JOBS if total >= SHARED_FROM_BYTES else 1


UNMEASURED_S = 3600.0
"""A job whose time to a checkpoint was not measured begins where an hour is left, or half of the card's whole window.
So a short allocation takes new jobs too, and one that is nearly over takes none in vain."""

TIME_GROWTH = 1.25
"""If a worker's end stops a job before its first stored checkpoint, the job then asks for this many times the time it
had."""


STOP_COST_S = 60.0
"""Seconds of its card that a stop costs a job until that was measured: its checkpoint, and loading again."""


@dataclass(frozen=True, kw_only=True)
class Yields:
    """What decides when a running job yields to a much shorter one, see preemption.py."""

    stops: int = 0  # how often it was asked to stop for others before
    cost_s: float = STOP_COST_S
    slowed: float = 1.0  # times as long as jobs just like it took on such a card, so any other would there


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """A running job's share of its card."""

    job_id: int
    user: str
    reserved: int
    used: int = 0  # bytes measured now; more than reserved when the plan was too small
    priority: int = 0
    preemptible: bool = False  # gives way to a job of higher priority
    ends: dt.datetime | None = None  # expected; None: not known
    began: dt.datetime | None = None
    since: dt.datetime | None = None  # from when its wait counts, should it wait again; None: not known
    gives_way_to: int | None = None  # the job for which it was asked to stop
    yields: Yields | None = None  # None: it stops for no shorter job


@dataclass(frozen=True, kw_only=True)
class Card:
    """One device as the placement sees it. Bytes."""

    node: str
    total: int
    outside: int = 0  # held by programs that are not ours, now or a short while ago
    margin: int = 0  # kept free: by its owner, and for what contexts take beyond plans
    running: tuple[Occupant, ...] = ()
    max_jobs: int = 1
    labels: frozenset[tuple[str, str]] = frozenset()
    open: bool = True  # online and not draining
    processor: bool = False  # a CPU: the last resort
    user_limit: int | None = None  # jobs that one user may run in the fleet
    model: str = ""  # the device's name: cards of one model are of one speed
    gangs: bool = False  # may be one of several cards for one job
    silent: bool = False  # not heard of lately: no job on several cards begins there, though one may wait for it
    stuck: bool = False  # takes no job that the rule gives it: none begins there, though one on several may wait for it
    contention: float | None = None  # measured on cards of its model; None: CONTENTION is assumed
    bf16: bool | None = None  # whether it computes in bfloat16, unless a job says otherwise; None: not known
    left_s: float | None = None  # until its worker stops, as it has said; None: it stays
    window_s: float | None = None  # from its worker's start until then

    @property
    def host(self) -> str:
        """The box in which it is."""
        return self.node.rpartition(":")[0]

    @property
    def usable(self) -> int:
        """The most that our jobs could ever take: the card without what is kept free."""
        return self.total - self.margin

    @property
    def capacity(self) -> int:
        """What our jobs may take together while others keep what they hold."""
        return max(0, self.usable - self.outside)

    @functools.cached_property
    def taken(self) -> int:
        """Reserved but not yet allocated counts as used, and so does what was allocated beyond it."""
        return sum(max(job.reserved, job.used) for job in self.running)

    @property
    def measured(self) -> int:
        """Bytes that our jobs really hold, as far as they are measured."""
        return sum(job.used for job in self.running)

    @property
    def free(self) -> int:
        return max(0, self.capacity - self.taken)

    @property
    def takes_jobs(self) -> bool:
        """Whether a job may begin there as soon as it has room."""
        return self.open and self.max_jobs > 0 and not self.stuck

    @property
    def slots(self) -> int:
        return 0 if self.stuck else max(0, self.max_jobs - len(self.running))

    @property
    def room(self) -> int:
        """Bytes that a job may take there now."""
        return self.free if self.open and self.slots else 0

    def with_job(self, job: Occupant) -> Card:
        """The card with one more job."""
        return replace(self, running=(*self.running, job))

    def without(self, job_ids: Collection[int]) -> Card:
        """The card once these jobs have left it."""
        return replace(self, running=tuple(job for job in self.running if job.job_id not in job_ids))


def largest_gpu(cards: Iterable[Card]) -> int:
    """Bytes for our jobs on the largest open GPU, once all else has left it; 0 without a GPU."""
    return max((c.usable for c in cards if c.open and not c.processor), default=0)


def least_limit(cards: Iterable[Card]) -> int | None:
    """Jobs that one user may run: the smallest limit of all open cards; None: as many as there is room for."""
    return min((card.user_limit for card in cards if card.open and card.user_limit is not None), default=None)


class Obstacle(enum.Enum):
    """Why a card does not take a job, apart from memory that others hold or get. The deciding predicates return it."""

    LABELS = enum.auto()  # its box lacks one
    METHODS = enum.auto()  # the job's own limit is less than it needs with any method
    SMALL = enum.auto()  # it could never hold the job, or a share of it
    RESULT = enum.auto()  # another box has the job's finished result
    CLOSED = enum.auto()  # drained, stopping, silent or at fault: its node's row says which
    SEVERAL = enum.auto()  # the job is for several cards
    UNSHARED = enum.auto()  # it can't be one of several
    TOO_FEW = enum.auto()  # its box has too few cards for such a job
    TOO_FEW_NOW = enum.auto()  # its box has enough such cards, but some are closed or full of other programs
    PROCESSOR = enum.auto()  # it leaves the job to GPUs
    AVOIDED = enum.auto()  # it failed the job a short while ago
    FORMAT = enum.auto()  # it computes in another number format than the job's checkpoint, and another card does not
    PATIENCE = enum.auto()  # it holds the job by a method that is not permitted yet
    PROGRAMS = enum.auto()  # other programs hold too much of it
    TIME = enum.auto()  # its worker stops before the job could store a checkpoint


def could_start(job: Waiting, card: Card, fleet: Collection[Card]) -> bool:
    """Whether the card would hold the job now, no matter which jobs go before it."""
    return has_room(card, job, job.least, card.room) and takes(card, job, fleet, largest_gpu(fleet))


def has_room(card: Card, job: Waiting, size: int | None, room: int) -> bool:
    """Whether `room` bytes of the card are enough for `size`. A job that is not predictable gets a card of its own
    until the worker has planned it."""
    return room > 0 and (job.least is not None or not card.running) and (size is None or size <= room)


def takes(card: Card, job: Waiting, fleet: Collection[Card], largest: int) -> bool:
    """Whether the rule may give the job to this card at all; its room is not asked."""
    return suits(card, job, largest) and lasts(card, job) and not avoided(card, job, fleet)


def lasts(card: Card, job: Waiting, wait_s: float = 0.0) -> bool:
    """Whether the job can store a checkpoint before the card's worker stops, if it begins there after so long."""
    return card.left_s is None or wait_s + time_to_checkpoint(card, job) <= card.left_s


def time_to_checkpoint(card: Card, job: Waiting) -> float:
    """Seconds that must be left of a card whose worker stops."""
    return time_unmeasured(card.window_s) if job.checkpoint_s is None else job.checkpoint_s


def time_unmeasured(window_s: float | None) -> float:
    """Seconds that must be left for a job whose time to a checkpoint was never measured."""
    return UNMEASURED_S if window_s is None else min(UNMEASURED_S, window_s / 2)


@dataclass(frozen=True, kw_only=True)
class TimeLeft:
    """What is left to a worker that stops by itself."""

    host: str  # its box
    seconds: float
    window_s: float  # from its start on

    def suffices(self, checkpoint_s: float | None) -> bool:
        """Whether a job with that time to a checkpoint may begin, see `lasts`."""
        return self.seconds >= (time_unmeasured(self.window_s) if checkpoint_s is None else checkpoint_s)


def suits(card: Card, job: Waiting, largest: int) -> bool:
    """Whether the job may run on this card; room is not checked."""
    return unsuited(card, job, largest) is None


def unsuited(card: Card, job: Waiting, largest: int) -> Obstacle | None:
    """Why the job may not run on this card; room is not checked. A processor takes only what no GPU could hold."""
    if (obstacle := elsewhere(card, job)) is not None:
        return obstacle
    if not job.alone:
        return Obstacle.SEVERAL
    left_to_gpus = card.processor and largest > 0 and (job.least is None or job.least <= largest)
    return Obstacle.PROCESSOR if left_to_gpus else None


def elsewhere(card: Card, job: Waiting) -> Obstacle | None:
    """Why the job must be on another box."""
    if not job.requires <= card.labels:
        return Obstacle.LABELS
    return None if job.only_host in (None, card.host) else Obstacle.RESULT


def avoided(card: Card, job: Waiting, fleet: Collection[Card]) -> bool:
    """Whether the job keeps off a card that failed it, or that computes in another number format than its checkpoint:
    only while another one could hold it that did not fail it, and has that format. So it never waits for nothing."""
    if not failed(card, job) and not differs(card, job):
        return False
    largest = largest_gpu(fleet)
    others = [other for other in fleet if not failed(other, job) and could_hold(other, job, largest)]
    return bool(others) if failed(card, job) else any(other.bf16 == job.bf16 for other in others)


def differs(card: Card, job: Waiting) -> bool:
    """Whether the card is known to compute in another number format than the job's checkpoint."""
    return card.bf16 is not None and job.bf16 is not None and card.bf16 != job.bf16


def failed(card: Card, job: Waiting) -> bool:
    """Whether the card or its box failed the job a short while ago."""
    return card.node in job.avoids or card.host in job.avoids


def could_hold(card: Card, job: Waiting, largest: int) -> bool:
    """Whether an open card will hold the job once our other jobs have left it."""
    if not card.takes_jobs or card.capacity <= 0 or not (suits(card, job, largest) and lasts(card, job)):
        return False
    return job.least is None or job.least <= card.capacity


@dataclass(frozen=True, kw_only=True)
class Room:
    """When a card will have room for a size."""

    at: dt.datetime | None  # None: it depends on an end that is not known
    after: tuple[Occupant, ...]  # what must end first
    spare: int  # bytes left then besides the size
    spare_slots: int


def room_at(card: Card, size: int, now: dt.datetime) -> Room | None:
    """When `size` bytes and a slot will be free if no other job starts; None: never, while others hold that much."""
    if size > card.capacity or card.max_jobs < 1 or card.stuck:
        return None
    staying = sorted(card.running, key=lambda j: (j.ends is None, j.ends or now, -j.reserved, j.job_id))
    gone, free, slots = list[Occupant](), card.capacity - card.taken, card.max_jobs - len(staying)
    while max(0, free) < size or slots < 1:
        one = staying[len(gone)]
        gone.append(one)
        free, slots = free + max(one.reserved, one.used), slots + 1
    ends = [job.ends for job in gone]
    at = None if any(end is None for end in ends) else max((end for end in ends if end is not None), default=now)
    return Room(
        at=at if at is None else max(at, now), after=tuple(gone), spare=max(0, free) - size, spare_slots=slots - 1
    )


def room_for(card: Card, job: Waiting, size: int, now: dt.datetime) -> Room | None:
    """When the card will have room for the job, and time for its checkpoint: no room outlasts its card's worker."""
    room = room_at(card, size, now)
    if room is None or card.left_s is None:
        return room
    return room if room.at is not None and lasts(card, job, (room.at - now).total_seconds()) else None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A card that is kept for a job: what else starts there must leave it its room."""

    node: str
    spare: int  # bytes that others may take without delaying it
    spare_slots: int

    def less(self, size: int) -> Kept:
        """What is still kept once a job has taken `size` bytes."""
        return Kept(node=self.node, spare=self.spare - size, spare_slots=self.spare_slots - 1)


@dataclass(frozen=True, kw_only=True)
class Reservation(Kept):
    """The card that is kept for a job, and the others that are kept with it if several are to share the job."""

    job: Waiting
    beside: tuple[Kept, ...] = ()

    @property
    def cards(self) -> tuple[Kept, ...]:
        """Every card that is kept."""
        return self, *self.beside

    def on(self, node: str) -> Kept | None:
        """What is kept of a card; None: nothing is."""
        return next((kept for kept in self.cards if kept.node == node), None)

    def without(self, node: str, size: int) -> Reservation:
        """What is still kept once a job has taken `size` bytes of a card."""
        own, *beside = (kept.less(size) if kept.node == node else kept for kept in self.cards)
        return replace(self, spare=own.spare, spare_slots=own.spare_slots, beside=tuple(beside))
