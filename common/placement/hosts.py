"""Hosts: trainers that keep a loaded base. Which job may have which base, which may train alongside those that run
there, and what of the card it takes.

Pure functions of values, like all of the placement. The caller passes `Newcomers`: what the rule must know of a waiting
job for a join is in its spec, which is read only for the few jobs that have a host on their base.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loractl.common.job.method import Method

from .cards import Card, WarmBase, room_for
from .lines import JoinOpening, Waiting, waited
from .pack_rule import CONTENTION, JoinVerdict, PackedJob, PassLaw, Sharing, join_verdict

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


REPRODUCES = "reproduces"
"""The label of a job that runs another one again."""

KEEP_WARM_S = 600.0
"""How long a base stays after its last job, unless the box's owner says otherwise."""


OTHER_KEY = "their base has another revision, training.dtype, attn_implementation or exact"
"""Why jobs on one base and method have different keys, for people: what `base_key` reads besides those two."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """How a job comes on to a card: into the host that has its base, and past the bases that go for it."""

    host: WarmBase | None
    leaving: tuple[WarmBase, ...]


def base_key(spec: JobSpec, method: Method) -> str | None:
    """What decides, on one card, how the job's base is loaded; None: it gets a trainer of its own, which ends with it.

    The weights' own identity is compared where they are stored, when a job joins.
    """
    if why_alone(spec) is not None:
        return None
    training = spec.training
    how = [spec.base_model, spec.revision, method.value, training.dtype, training.attn_implementation, training.exact]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]


def why_alone(spec: JobSpec) -> str | None:
    """Why a job shares its trainer with no other job, not even one after the other; None if it may."""
    if REPRODUCES in spec.labels:
        return "it is compared with another run bit by bit"
    if spec.resources.exclusive:
        return "resources.exclusive"
    if spec.kind.alone is not None:
        return spec.kind.alone
    if spec.lora.modules_to_save:
        return "lora.modules_to_save changes the base itself"
    if spec.lora.init_lora_weights == "loftq":
        return "lora.init_lora_weights: loftq reads the base's files again"
    if spec.training.torch_compile:
        return "training.torch_compile starts its own processes"
    if spec.training.report_to:
        return f"{spec.training.report_to[0]} starts its own threads or processes"
    if spec.evaluation.lm_eval:
        return "lm_eval runs its own code"
    return None


def seat(card: Card, key: str | None, reserved: int) -> Seat:
    """The host that a job with this base joins, and the bases that go, if `reserved` bytes are reserved for it.

    The newest host of its base takes it. Of the others the oldest go, until all that stays has room next to the job,
    and the card has no more trainers than it may have.
    """
    waiting = sorted(card.waiting_bases, key=lambda base: (base.since, base.host))
    host = next((base for base in reversed(waiting) if base.key == key), None)
    others = [base for base in waiting if base is not host]
    own = reserved if host is None else max(reserved, host.bytes)
    going = _going(card, others, card.taken + own, card.trainers + 1)
    return Seat(host=host, leaving=going)


def joined(card: Card, base: WarmBase, own: int) -> Seat:
    """The seat of a job that trains alongside others on their base, with `own` bytes reserved for it."""
    waiting = sorted(card.waiting_bases, key=lambda other: (other.since, other.host))
    return Seat(host=base, leaving=_going(card, waiting, card.taken + own, card.trainers))


def beyond(card: Card) -> tuple[WarmBase, ...]:
    """The idle bases that must go, the oldest first, since what others hold of the card has grown."""
    waiting = sorted(card.waiting_bases, key=lambda base: (base.since, base.host))
    return _going(card, waiting, card.taken, card.trainers)


def may_wait(card: Card) -> bool:
    """Whether the bases that wait for a job have room on the card, and its jobs too; else the newest does not stay."""
    return card.taken <= card.capacity and not beyond(card)


def _going(card: Card, waiting: Sequence[WarmBase], taken: int, trainers: int) -> tuple[WarmBase, ...]:
    staying = list(waiting)
    while staying and (
        taken + sum(base.bytes for base in staying) > card.capacity or trainers + len(staying) > max(1, card.max_jobs)
    ):
        staying.pop(0)
    return tuple(waiting[: len(waiting) - len(staying)])


PACK_MEMBERS = 8
"""Jobs that train in one host at most: more of them gain little in a pass, and its death ends all of them."""

LEAST_PART = 10
"""A job's own part is at least its whole need divided by this: a base may measure more than was planned."""


SOONER = 0.9
"""A job waits for another card rather than join a host if it would end there in this share of the time: expected ends
are not certain. It waits at most as long as it would have been in the host."""


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """What the rule knows of a waiting job that may train alongside others."""

    keys: Mapping[Method, str]  # of its base, see hosts.base_key; none: it trains alone
    packed: PackedJob
    alone: str = ""  # why it does


Newcomers = Callable[[Waiting], Newcomer | None]
"""None: the job trains alone."""


@dataclass(frozen=True, kw_only=True)
class Join:
    """A job's way into a running host."""

    node: str
    base: WarmBase
    own: int  # bytes that it takes besides those in it
    packed: PackedJob
    verdict: JoinVerdict


@dataclass(frozen=True, kw_only=True)
class RefusedJoin:
    """A running host with a job's base, and why the job does not train there."""

    node: str
    base: WarmBase
    why: str


@dataclass(frozen=True, kw_only=True)
class DeclinedJoin:
    """A join that a job declines, since it ends sooner by waiting for another card."""

    job_id: int
    refused: RefusedJoin
    card: str  # the one that it waits for
    ends: float  # seconds until it would have ended there


def own_part(need: int, base: int) -> int:
    """Bytes that a job takes alongside others on a base of `base` bytes, if it needs `need` with a base of its own."""
    return max(need - base, need // LEAST_PART)


def open_bases(card: Card) -> list[WarmBase]:
    """Bases of the card with jobs that others may join, as far as members are counted."""
    return [base for base in _with_jobs(card) if base.spoilt is None and len(card.inside(base)) < PACK_MEMBERS]


def spoilt_bases(card: Card) -> list[WarmBase]:
    """Bases of the card with jobs that others could join if their process were not spoilt."""
    return [base for base in _with_jobs(card) if base.spoilt is not None]


def _with_jobs(card: Card) -> list[WarmBase]:
    if not card.takes_jobs:
        return []
    return [base for base in card.hosts if base.open and not base.leaving and card.inside(base)]


def join_openings(cards: Iterable[Card]) -> tuple[JoinOpening, ...]:
    """Bounds on the jobs that may join a host of these cards."""
    return tuple(
        JoinOpening(base_model=base.base_model, bytes=card.free + base.bytes, labels=card.labels)
        for card in cards
        if card.free
        for base in open_bases(card)
    )


def may_join(card: Card, job: Waiting) -> bool:
    """Whether the job may fit into a running host of the card that has its base; whether that pays is not asked."""
    return any(opening.admits(job) for opening in join_openings([card]))


def best_join(cards: Iterable[Card], job: Waiting, method: Method, newcomers: Newcomers) -> Join | None:
    """The join in which the job is fastest: it spreads over hosts that gain alike. The caller leaves out cards that the
    job may not have, or that are kept for others."""
    found = [one for one in looked_at(cards, job, method, newcomers) if isinstance(one, Join)]
    verdicts = [join.verdict for join in found]
    seconds = all(verdict.seconds is not None for verdict in verdicts)  # else shares of each card's own speed

    def rank(join: Join) -> tuple[float, str, str]:
        verdict = join.verdict
        pace = verdict.seconds if seconds and verdict.seconds is not None else verdict.slowdown
        return pace, join.node, join.base.host

    return min(found, key=rank, default=None)


def sooner_elsewhere(
    join: Join,
    job: Waiting,
    size: int,
    model: str,
    others: Iterable[Card],
    busy_until: Mapping[str, float],
    now: dt.datetime,
) -> DeclinedJoin | None:
    """The card that the job should wait for; None: it should join.

    A pack is hardly faster than its members one by one, so a card that nobody uses is worth more. `model`: of the
    host's card, since other models have other speeds. `others`: cards that the job may have. `busy_until`: seconds
    until the jobs that already wait for a card have ended there.
    """
    ends, alone = join.verdict.ends, join.verdict.alone
    if ends is None or alone is None or waited(job, now) > ends:
        return None
    found: list[tuple[float, str]] = []
    for card in others:
        if card.node == join.node or card.model != model or not card.takes_jobs:
            continue
        room = room_for(card, job, size, now)
        if room is None or room.at is None or room.at <= now or len(room.after) < len(card.running):
            continue  # its end is not known, or overdue, or the card will be shared
        free = max((room.at - now).total_seconds(), busy_until.get(card.node, 0.0))
        found.append((free + alone, card.node))
    if not found or (best := min(found))[0] > SOONER * ends:
        return None
    seconds, node = best
    why = f"it would end sooner on {node}, once that is free"
    refused = RefusedJoin(node=join.node, base=join.base, why=why)
    return DeclinedJoin(job_id=job.job_id, refused=refused, card=node, ends=seconds)


def looked_at(
    cards: Iterable[Card], job: Waiting, method: Method, newcomers: Newcomers
) -> Iterator[Join | RefusedJoin]:
    """Each running host that has the job's base: the join, or why it is refused."""
    size = job.need.of(method)
    options = [
        (card, base)
        for card in cards
        for base in (*open_bases(card), *spoilt_bases(card))
        if (base.base_model, base.method) == (job.base_model, method)
    ]
    newcomer = newcomers(job) if options and size is not None else None
    if newcomer is None or size is None:
        return
    for card, base in options:
        if base.key == newcomer.keys.get(method):
            yield _look(card, base, size, newcomer.packed, job.job_id)
        else:
            yield RefusedJoin(node=card.node, base=base, why=newcomer.alone or OTHER_KEY)


def _look(card: Card, base: WarmBase, need: int, packed: PackedJob, job_id: int) -> Join | RefusedJoin:
    if base.spoilt is not None:
        return RefusedJoin(node=card.node, base=base, why=f"their trainer takes no more jobs: {base.spoilt}")
    if any(one.job_id == job_id for one in base.leavers):
        return RefusedJoin(node=card.node, base=base, why="its last attempt has not left their trainer yet")
    if len(base.members) < len(card.inside(base)):  # one has just ended, or came when the host was full
        return RefusedJoin(node=card.node, base=base, why="not all jobs in that trainer are known yet")
    own = own_part(need, base.bytes)
    if own > card.free:
        return RefusedJoin(node=card.node, base=base, why="its own part does not fit next to them")
    law = base.law or PassLaw.start(quantised=base.method is Method.QLORA)
    apart = None
    if card.slots > 0 and need <= card.free:  # it would start there in a process of its own
        contention = CONTENTION if card.contention is None else card.contention
        apart = Sharing(contention=contention, others=card.trainers - 1)
    if not law.is_measured:
        packed = replace(packed, passes=None)  # how long they take is not known
    verdict = join_verdict(law, base.members, packed, apart=apart)
    if not verdict.pays:
        return RefusedJoin(node=card.node, base=base, why=verdict.why)
    return Join(node=card.node, base=base, own=own, packed=packed, verdict=verdict)
