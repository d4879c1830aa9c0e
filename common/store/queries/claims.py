"""The claim: the placement rule's answer for one card becomes an attempt with a token, a lease and its memory."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from loractl.common.job.adjustment import Adjustment, adjusted, in_its_room
from loractl.common.job.method import Method, Need, Roomy, RoomyForm, permitted_methods
from loractl.common.job.status import Stage, Status
from loractl.common.memory.correction import ENGINE
from loractl.common.placement.cards import Card, could_start, least_limit
from loractl.common.placement.gangs import may_share
from loractl.common.placement.lines import Queue, Without, own_key
from loractl.common.placement.roomy import is_wanted, with_room
from loractl.common.placement.rule import Placement
from loractl.common.units import gib

from ..fleet import is_ready
from ..guard import become, begun
from ..records import Claim, Left, StoredCheckpoint
from ..tables import Attempt, Event, Job, Node, sweep_of
from ..transaction import Transaction
from .backlog import set_aside
from .cards.decisions import decide
from .cards.nodes import FleetState, read_fleet
from .cards.shares import lock, own_first, write
from .changes import answer_wishes
from .durations import predicted
from .followers import begin_from_best
from .lines import StoredQueue, lock_alike
from .need import raise_least
from .outbox.notices import tell_of_job
from .sweeps import read_rungs

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec

_TRIES = 8
"""Of the rule, in a claim."""

_MOST_LOCKED = 3
"""Lines of locked rows that a claim goes without. With more, it goes without all jobs of a user: nobody's rows keep a
card from the jobs of others."""


def claim(
    tx: Transaction,
    node: str,
    outside: int | None = None,
    used: Mapping[str, int] | None = None,
    distrusted: frozenset[str] = frozenset(),
    gangs: bool = False,
) -> Claim | Left | None:
    # Two slots of one card must not both reserve the same bytes.
    """Take the job that the placement rule gives this card: a token, a lease and a part of its memory.

    `outside`, `used`: what the device shows at this moment (bytes held by others; bytes by job), when that is newer
    than the node's row. `distrusted`: nodes that did not take what was left to them; the rule goes without them.
    `gangs`: the node can start a job on several cards.
    Left: the rule gives every job that fits here to other cards; without nodes, look again at once. None: nothing
    fits.
    """
    locked = lock(tx, node, gangs=gangs)
    if locked is None:
        return None
    row, now = locked  # under the lock: a start is later than the end that made room for it
    fleet = read_fleet(tx.session, now, tx.lease_s if gangs else None)
    mine = next(card for card in fleet.cards if card.node == node)
    mine = replace(mine, silent=False, gangs=gangs and mine.gangs)
    if outside is not None:
        mine = _as_measured(mine, outside, used or {})
    cards = [mine if card.node == node else replace(card, stuck=card.node in distrusted) for card in fleet.cards]
    if not mine.room:
        return None
    taken: Claim | Left | None
    queue, met_odd, left = Without(StoredQueue(tx.session, now)), False, set[str]()
    for tried in range(_TRIES):
        given = _given(queue, mine, cards, fleet, now, left)
        if given is None:
            taken = Left(nodes=frozenset(left)) if left else None
            break
        found = _take(tx, given, queue, cards, row, now)
        if not isinstance(found, _Obstacle):
            taken = found
            break
        met_odd = met_odd or found is _Obstacle.ODD
        if found is _Obstacle.ODD or tried >= _MOST_LOCKED:
            queue.users.add(given.job.user)
        else:
            queue.lines.add(given.job.line)
    else:
        taken = Left(nodes=frozenset())
    if met_odd and not isinstance(taken, Claim):
        taken = Left(nodes=frozenset())  # others of those users may fit
    return taken


def _as_measured(card: Card, outside: int, used: Mapping[str, int]) -> Card:
    """The card as its device shows it at this moment."""
    live = tuple(replace(job, used=used.get(str(job.job_id), job.used)) for job in card.running)
    return replace(card, outside=max(card.outside, outside), running=live)


def _given(
    queue: Queue, mine: Card, cards: Sequence[Card], fleet: FleetState, now: dt.datetime, left: set[str]
) -> Placement | None:
    """What the rule gives this card. `left` gets the cards to which it gives jobs that would fit here, too: they may
    not take them, and so count also where what this card was given is locked."""
    for decision in decide(queue, cards, fleet, now):
        placed = decision.placed
        if placed is None:
            continue
        if any(share.node == mine.node for share in placed.shares):
            first, *others = own_first(placed, mine.node)
            return replace(placed, node=first.node, reserved=first.bytes, beside=tuple(others))
        if could_start(placed.job, mine, cards) or _could_share(placed, mine):
            left.add(placed.node)
    return None


def _could_share(placed: Placement, mine: Card) -> bool:
    """Whether the card had room for a share of a job that others get, so that the job may have woken it alone."""
    return bool(placed.beside) and may_share(mine, placed.job) and any(one.bytes <= mine.room for one in placed.shares)


class _Obstacle(enum.Enum):
    """Why a claim goes on with another job in the same transaction."""

    LOCKED = enum.auto()  # somebody keeps all that is left of its line locked
    ODD = enum.auto()  # it can't start as it is


def _take(
    tx: Transaction, placed: Placement, queue: Queue, cards: Sequence[Card], node: Node, now: dt.datetime
) -> Claim | Left | _Obstacle:
    locked = lock_alike(tx, placed.job, now)
    if locked is None:
        return _Obstacle.LOCKED
    job, now = locked
    placed = replace(placed, job=replace(placed.job, job_id=job.job_id))
    if not is_ready(job, now) or job.queue_key != placed.job.key:
        return Left(nodes=frozenset())  # another node's claim was faster, or a person held it or edited what it needs
    if job.cancel_requested:  # it was given back while it was cancelled
        answer_wishes(tx)
        return Left(nodes=frozenset())
    if _at_limit(tx, job.user, cards):
        return Left(nodes=frozenset())
    if (sweep_id := sweep_of(job.spec)) is not None and job.ancestor is None:
        tx.apart(job.job_id, lambda: begin_from_best(tx, job, sweep_id))  # a person has released it without a choice
        if job.held:
            return _Obstacle.ODD
    spec = _read(job)
    if isinstance(spec, str):
        set_aside(tx, job, spec, node.host, now)
        tell_of_job(tx, job)
        return _Obstacle.ODD
    if placed.method not in permitted_methods(spec.method):  # others may write a row's methods, nobody its spec
        what = f"the method {placed.method.value} of its row, which its job file does not permit"
        set_aside(tx, job, what, node.host, now)
        tell_of_job(tx, job)
        return _Obstacle.ODD
    if node.kind == "nvml" and not placed.beside and raise_least(tx, job, placed.method, placed.reserved):
        return _Obstacle.ODD
    placed = _in_its_room(tx, placed, job, spec, queue, cards, node)
    return _start(tx, job, spec, _begin(tx, job, placed, node, now), placed)


def _in_its_room(
    tx: Transaction, placed: Placement, job: Job, spec: JobSpec, queue: Queue, cards: Sequence[Card], node: Node
) -> Placement:
    """The placement with the room that nobody else wants, see placement/roomy.py.

    Changes after out-of-memory stay in a job: it has shown that plans are too low for it. A simulated card gives
    its own micro-batches alone: a processor trains there, and would round differently.
    """
    changed = Adjustment.read(job.adjustment)
    if not (changed.gradient_checkpointing is spec.training.gradient_checkpointing is None):
        return placed
    if changed.micro_batch is not None and not (job.stops and not _changes(tx, job.job_id)):
        return placed
    most, rows = spec.resources.max_vram, spec.training.per_device_train_batch_size
    whole = Roomy.read(job.roomy).that(
        lambda form: (
            form.micro_batch == rows or (node.kind == "nvml" and spec.training.effective_batch % form.micro_batch == 0)
        )
    )
    planned = Need(lora=job.planned.get("lora"), qlora=job.planned.get("qlora"))
    forms = whole.with_half(Need(lora=job.vram_lora, qlora=job.vram_qlora), planned, rows)
    forms = forms.that(lambda form: most is None or form.bytes <= most)
    if changed.micro_batch is not None:  # it gave way, and goes on in the same
        forms = forms.that(lambda form: form.micro_batch == changed.micro_batch)
    card = next(card for card in cards if card.node == placed.node)
    return with_room(placed, card, forms.of(placed.method), lambda free: is_wanted(queue, free, job.job_id))


def _at_limit(tx: Transaction, user: str, cards: Sequence[Card]) -> bool:
    """Whether the user runs as many jobs as allowed by now: this claim may not have seen another card's."""
    limit = least_limit(cards)
    if limit is None:
        return False
    tx.wait_for(f"user {user}")
    running = select(func.count()).where(Job.status == Status.RUNNING, Job.user == user)
    return (tx.session.scalar(running) or 0) >= limit


def _read(job: Job) -> JobSpec | str:
    """The row's spec; or what of it this version can't read, in words."""
    from pydantic import ValidationError

    from loractl.common.job.ancestor import settled_on
    from loractl.common.job.spec import JobSpec

    try:
        spec = JobSpec.model_validate(job.spec)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the spec'}: {first['msg']}"
    if not isinstance(spec.lora.init_from, str | None):  # its sweep has ended
        if job.ancestor is None:
            return "lora.init_from: the sweep has no best member"
        spec = settled_on(spec, job.ancestor)
    return spec


def _begin(tx: Transaction, job: Job, placed: Placement, node: Node, now: dt.datetime) -> Attempt:
    """Write the attempt, in its own row and in the job's."""
    alone = not placed.beside  # no prediction is of several cards
    seconds, basis = (predicted(job, node.device_name, placed.method.value) if alone else None) or (None, None)
    attempt = Attempt(
        job_id=job.job_id,
        attempt=job.attempt + 1,
        token=uuid.uuid4().hex,
        node=node.node,
        gpu=node.gpu,
        device_name=node.device_name,
        device_kind=node.kind,
        method=placed.method.value,
        engine=ENGINE,
        # Plans are for GPUs: on a processor no plan is noted.
        vram_planned=None if node.kind == "cpu" or placed.beside else _planned(job, placed),
        vram_reserved=placed.reserved,
        roomy=placed.form is not None,
        seconds_predicted=seconds,
        predicted_by=basis,
        started_at=now,
    )
    become(job, Status.RUNNING)
    same = ("attempt", "token", "node", "gpu", "method", "vram_reserved", "started_at")
    columns = {**begun(), **{name: getattr(attempt, name) for name in same}}
    columns |= {
        "eta_seconds": attempt.seconds_predicted,
        "stage": Stage.PREPARING,
        "lease_expires_at": now + dt.timedelta(seconds=tx.lease_s),
        "queue_key": own_key(job.queue_key, job.job_id),
    }
    for name, value in columns.items():
        setattr(job, name, value)
    tx.session.add(attempt)
    write(tx, placed, attempt.attempt)
    return attempt


def _planned(job: Job, placed: Placement) -> int | None:
    return job.planned.get(placed.method.value) if placed.form is None else placed.form.planned


def _start(tx: Transaction, job: Job, spec: JobSpec, attempt: Attempt, placed: Placement) -> Claim:
    """Write the attempt to the history, and give it what it needs to know."""
    method = Method(attempt.method)
    why = _why_method(spec.method, method, Need(lora=job.vram_lora, qlora=job.vram_qlora))
    cards = " and ".join(share.node for share in placed.shares)
    how = f", {placed.parallel.value} over {len(placed.shares)} cards" if placed.beside else ""
    adjustment, room = Adjustment.read(job.adjustment), ""
    if placed.form is not None:
        adjustment = in_its_room(spec, adjustment, placed.form)
        room = (
            f", {_in_words(spec, adjustment, placed.form, Need(lora=job.vram_lora, qlora=job.vram_qlora).of(method))}"
        )
    text = f"attempt {attempt.attempt} started on {cards} with {method.value}{why}{how}{room}"
    tx.tell(job.job_id, attempt.attempt, "started", text, attempt.started_at)
    return Claim(
        job_id=job.job_id,
        attempt=attempt.attempt,
        token=attempt.token,
        user=job.user,
        spec=spec,
        data=job.data,
        submitted_at=job.submitted_at,
        method=method,
        vram_planned=attempt.vram_planned,
        vram_reserved=attempt.vram_reserved,
        seconds_predicted=attempt.seconds_predicted,
        method_why=why.strip(" ()"),
        adjustment=adjustment,
        changes=_changes(tx, job.job_id) if attempt.attempt > 1 else (),
        checkpoint=StoredCheckpoint.read(job.checkpoint),
        result_host=job.result_host,
        sweep_id=job.sweep_id,
        rungs=read_rungs(tx.session, job),
        shares=placed.shares if placed.beside else (),
        parallel=placed.parallel,
    )


def _in_words(spec: JobSpec, adjustment: Adjustment, form: RoomyForm, need: int | None) -> str:
    """How an attempt trains that has the room to recompute less, for the history."""
    pieces, asked = adjusted(spec, adjustment).training, spec.training
    how = ""
    if form.micro_batch != asked.per_device_train_batch_size:
        rows = f"{form.micro_batch} row{'s' * (form.micro_batch > 1)} at once"
        how = f" in {rows}, accumulating {pieces.gradient_accumulation_steps} (same effective batch)"
    less = "recomputing every second block alone" if form.half else "without recomputing"
    return f"{less}{how}: {gib(form.bytes)} GiB instead of {gib(need)}, which no other job wants now"


def _why_method(wanted: Method | Sequence[Method], taken: Method, need: Need) -> str:
    """Why this of several methods was taken, for the history."""
    preferred, *others = permitted_methods(wanted)
    if not others:
        return ""
    name = "auto" if wanted is Method.AUTO else "of several"
    if taken is not preferred:
        return f" ({name}: {preferred.value} does not fit)"
    known = need.of(taken) is not None
    return f" ({name}: it fits)" if known else f" ({name}: {taken.value} unless a plan says that it does not fit)"


def _changes(tx: Transaction, job_id: int) -> tuple[str, ...]:
    """What out-of-memory has changed in a job so far, in the history's words."""
    told = select(Event.text).where(Event.job_id == job_id, Event.kind == "memory")
    return tuple(tx.session.scalars(told.order_by(Event.event_id)))
