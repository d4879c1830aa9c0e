"""The nodes: what they say of their devices, which are drained and why, and the whole fleet at one moment."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from sqlalchemy import ColumnElement, Row, Select, Table, and_, bindparam, delete, exists, or_, select
from sqlalchemy.orm import Session

from loractl.common.errors import CardTaken, NameTaken, UsageError, WrongState
from loractl.common.job.method import Method
from loractl.common.job.status import OUTCOMES, Blamed, Reason, Status
from loractl.common.placement.cards import Card
from loractl.common.placement.closure import REMEMBERED_S, CardFailure, closure
from loractl.common.placement.shares import Allowance, charge, decayed, within_need
from loractl.common.units import duration

from ...columns import UtcDateTime, storable_row
from ...fleet import NODE_STALE_S, card_of
from ...records import BoxIdentity, NodeState
from ...tables import Attempt, CardContention, DrainOrder, Job, LabFailure, Node, Quota, Use, peak_of
from ...transaction import NewRow, Transaction
from ..lab_settings import BY_SHARE, ORDER_SET
from ..outbox.notices import tell_of_closure
from ..usage import read_allowances
from .shares import ON_NODE, is_late, occupants, running_on

# Made once: SQLAlchemy takes longer to make such a statement than to run it.
_USES, _DRAINS = select(Use, Quota), select(DrainOrder)
_USES = _USES.outerjoin(Quota, Quota.user == Use.user)
_OWN = (Attempt.job_id == Job.job_id) & (Attempt.attempt == Job.attempt)
_MEASURED = (Attempt.roomy, Attempt.device_kind, Attempt.vram_process, Attempt.vram_peak)
_HOLDS = or_(DrainOrder.until.is_(None), DrainOrder.until > bindparam("now", type_=UtcDateTime()))
_IS_DRAINED = exists().where(DrainOrder.target.in_((Node.node, Node.host)), _HOLDS)
_NODES = select(Node, _IS_DRAINED, CardContention.contention, ORDER_SET)
_NODES = _NODES.outerjoin(CardContention, CardContention.device_name == Node.device_name)
_HELD = occupants(Job.method, Job.vram_lora, Job.vram_qlora, *_MEASURED).outerjoin(Attempt, _OWN)


_ON_CARD = occupants().where(bindparam("node") == ON_NODE)
_SEEN_AT = select(Node.seen_at).where(Node.node == bindparam("node"))


def identity(node: NodeState | Node) -> BoxIdentity:
    """Which box, and which start of it, a row or a node is of."""
    return BoxIdentity(instance=node.instance, machine=node.machine, boot=node.boot)


def see(tx: Transaction, state: NodeState) -> Card:
    """Write a device's row, last seen now. Returns the card with what runs on it. Raises NameTaken, CardTaken."""
    now = tx.now()
    stale, before = now - dt.timedelta(seconds=NODE_STALE_S), tx.session.scalar(_SEEN_AT, {"node": state.node})
    is_back = before is None or before < stale  # it was frozen, or its database away
    if is_back and (other := server_of(tx, state)) is not None:
        raise CardTaken(state.node, other.node)
    running = tx.session.execute(_ON_CARD, {"node": state.node}).all()
    card = card_of(Node(**vars(state), seen_at=now), running, now, drained_targets(tx.session, now))
    seen = {**vars(state), "seen_at": now, "free": card.free}
    row = storable_row(cast(Table, Node.__table__), seen)  # a sensor says what it likes
    if state.instance is None:
        tx.put(Node, "node", row)
    elif not tx.put(Node, "node", row, _may_be_taken, stale=stale):
        raise NameTaken(state.node)
    return card


def server_of(tx: Transaction, state: NodeState) -> Node | None:
    """A live node of another name that serves the same card: each would promise the memory that the other has promised.
    Simulated cards and processors have no number that is theirs alone."""
    if not state.gpu.startswith(("GPU-", "MIG-")):
        return None
    tx.wait_for(f"card {state.gpu}")  # of two that arrive at once the second finds the first
    same = select(Node).where(Node.gpu == state.gpu, Node.node != state.node)
    live = same.where(Node.seen_at >= tx.now() - dt.timedelta(seconds=NODE_STALE_S))
    return tx.session.scalars(live.order_by(Node.seen_at.desc()).limit(1)).first()


def _may_be_taken(new: NewRow) -> ColumnElement[bool]:
    """Of a node's row: the same start of the same box wrote it, or nobody serves it any more, or an older version."""
    own = and_(*(getattr(Node, key).is_not_distinct_from(new[key]) for key in ("instance", "machine", "boot")))
    return or_(own, Node.seen_at < bindparam("stale", type_=UtcDateTime()), Node.instance.is_(None))


def forget(tx: Transaction, node: str, box: BoxIdentity | None = None) -> None:
    """Remove the row of a node that has stopped in order, unless another box has its name."""
    row = tx.session.get(Node, node)
    if row is not None and (box is None or identity(row) == box):
        tx.session.delete(row)


def forget_silent(tx: Transaction, target: str) -> list[str]:
    """Remove the rows of a box, or of one of its cards, that no worker serves any more; returns their names.

    Raises UsageError for a target without a row, WrongState for a card that was seen lately or has a job.
    """
    rows = tx.session.scalars(select(Node).where(or_(Node.node == target, Node.host == target)).order_by(Node.node))
    if not (gone := list(rows)):
        raise UsageError(f"no worker has reported {target}", "loractl gpus lists the cards")
    for row in gone:
        if (silent_s := (tx.now() - row.seen_at).total_seconds()) <= NODE_STALE_S:
            raise WrongState(
                f"the worker of {row.node} was seen {duration(silent_s)} ago",
                f"a box is forgotten {duration(NODE_STALE_S)} after its worker has ended; loractl drain closes it",
            )
        running = select(Job.job_id).where(
            Job.status == Status.RUNNING, or_(Job.node == row.node, Job.job_id.in_(running_on(row.node)))
        )
        if (job_id := tx.session.scalar(running.limit(1))) is not None:
            raise WrongState(
                f"job {job_id} still counts as running on {row.node}", "any worker ends it as lost within a minute"
            )
        forget(tx, row.node)
    return [row.node for row in gone]


def read_tokens(tx: Transaction, node: str) -> set[str]:
    """The tokens of the attempts that run on a node."""
    here = or_(Job.node == node, Job.job_id.in_(running_on(node)))
    running = select(Job.token).where(Job.status == Status.RUNNING, here)
    return {token for token in tx.session.scalars(running) if token is not None}


def drain(
    tx: Transaction, target: str, user: str, reason: str, *, until: dt.datetime | None = None, at_once: bool = False
) -> None:
    """Keep new jobs from a host or a card (host:index)."""
    order = {"target": target, "user": user, "reason": reason, "until": until, "now": at_once}
    tx.put(DrainOrder, "target", order)


def end_drain(tx: Transaction, target: str) -> bool:
    """Let jobs on to a drained host or card again; False when it was not drained."""
    _forget_failures(tx, target)
    row = tx.session.get(DrainOrder, target)
    if row is not None:
        tx.session.delete(row)
    return row is not None


@dataclass(frozen=True, kw_only=True)
class FleetState:
    """Every card, and the GiB hours that count against each user who had or has one."""

    cards: list[Card]
    charges: dict[str, float]
    by_share: bool = False  # in the order of before


def read_fleet(session: Session, now: dt.datetime, lease_s: float | None = None) -> FleetState:
    """`lease_s`: cards whose nodes are late for it are silent; None: nobody asks."""
    running = _read_running(session)
    nodes, uses = session.execute(_NODES, {"now": now}).all(), session.execute(_USES).all()
    return FleetState(
        cards=_cards(nodes, now, running, lease_s),
        charges=_charges(session, uses, now, running),
        by_share=any(order == BY_SHARE for *_, order in nodes),
    )


def read_cards(session: Session, now: dt.datetime) -> list[Card]:
    """Every card that a node has reported, with what runs there; closed when it is offline or drained."""
    return _cards(session.execute(_NODES, {"now": now}).all(), now, _read_running(session))


def read_charges(session: Session, now: dt.datetime) -> dict[str, float]:
    """GiB hours that count against each user who had or has a card."""
    return _charges(session, session.execute(_USES).all(), now, _read_running(session))


def _read_running(session: Session) -> Sequence[Any]:
    """What runs in the fleet. A claim needs it for the cards and for the charges, and reads it once."""
    return session.execute(_HELD).all()


def _cards(
    nodes: Iterable[Row[Node, bool, float | None, str]],
    now: dt.datetime,
    running: Sequence[Any],
    lease_s: float | None = None,
) -> list[Card]:
    """`nodes`: rows of _NODES."""
    on: dict[str, list[Any]] = {}
    for row in running:
        on.setdefault(row.node or "", []).append(row)
    cards = []
    for node, drained, contention, _ in nodes:
        card = card_of(node, on.get(node.node, []), now, [node.node] if drained else ())
        late = lease_s is not None and is_late(node, now, lease_s)
        cards.append(replace(card, silent=late, contention=contention))
    return cards


def read_drains(tx: Transaction) -> dict[str, DrainOrder]:
    """Host or card -> the person's order that holds for it now."""
    return drained_targets(tx.session, tx.now())


def nodes(host: str | None = None) -> Select[Node]:
    """All nodes, or those of a box."""
    every = select(Node).order_by(Node.node)
    return every if host is None else every.where(Node.host == host)


def serves_beside(tx: Transaction, node: str) -> bool:
    """Whether a job on several cards that began on another node runs on this node's card."""
    return tx.session.scalars(running_on(node).limit(1)).first() is not None


def drained_targets(session: Session, now: dt.datetime) -> dict[str, DrainOrder]:
    """Host or card -> the person's order that keeps it empty now."""
    orders = session.scalars(_DRAINS)
    return {order.target: order for order in orders if order.until is None or order.until > now}


def note_failure(tx: Transaction, job: Job, node: str, reason: Reason, message: str, now: dt.datetime) -> None:
    """Write down that the lab failed a job on this node, and drain it where it fails the jobs of others too."""
    row = {"job_id": job.job_id, "attempt": job.attempt, "node": node, "reason": reason, "at": now, "message": message}
    tx.session.add(LabFailure(**row, user=job.user, sweep_id=job.sweep_id))
    tx.session.flush()
    _close(tx, job, node, now)


def note_success(tx: Transaction, nodes: Sequence[str]) -> None:
    """An attempt on these cards of a box has ended well: what failed before on them, and what the box shares, works."""
    shared = [reason for reason, meaning in OUTCOMES.items() if meaning.blames is Blamed.BOX]
    box = nodes[0].rpartition(":")[0] + ":"
    of_box = LabFailure.node.startswith(box, autoescape=True) & LabFailure.reason.in_(shared)
    tx.session.execute(delete(LabFailure).where(or_(LabFailure.node.in_(nodes), of_box)))


def read_failures(session: Session, now: dt.datetime) -> list[CardFailure]:
    """Those of a day, of cards that have ended no attempt well since."""
    recent = select(LabFailure).where(LabFailure.at > now - dt.timedelta(seconds=REMEMBERED_S))
    names = ("node", "reason", "user", "job_id", "sweep_id", "at", "message")
    return [
        CardFailure(**{name: getattr(row, name) for name in names})
        for row in session.scalars(recent.order_by(LabFailure.at, LabFailure.job_id))
    ]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a running job holds of one of its cards, in bytes."""

    job_id: int
    user: str
    node: str
    bytes: int
    since: dt.datetime


def read_held(session: Session, now: dt.datetime) -> list[Held]:
    """What all running jobs hold."""
    return list(_held(_read_running(session), now))


def _held(running: Sequence[Any], now: dt.datetime) -> Iterator[Held]:
    for row in running:
        size = row.vram_reserved or 0
        if row.rank is None:  # what is measured of several cards is of all of them
            size = max(size, peak_of(row))
            if row.roomy:
                size = within_need(size, row.vram_qlora if row.method == Method.QLORA.value else row.vram_lora)
        since = row.started_at or now
        yield Held(job_id=row.job_id, user=row.user, node=row.node or "", bytes=size, since=since)


def _charges(
    session: Session, uses: Sequence[Row[Use, Quota | None]], now: dt.datetime, running: Sequence[Any]
) -> dict[str, float]:
    past = {use.user: decayed(use.gib_hours, (now - use.at).total_seconds()) for use, _ in uses}
    now_held: dict[str, list[tuple[int, float]]] = {}
    held = list(_held(running, now))
    for one in held:
        now_held.setdefault(one.user, []).append((one.bytes, (now - one.since).total_seconds()))
    charges = {user: charge(past.get(user, 0.0), now_held.get(user, ())) for user in past.keys() | now_held.keys()}
    if not (quotas := [quota for _, quota in uses if quota is not None]):
        return charges
    allowed = _allowed(session, quotas, held, now)
    return charges | {user: allowance.on(charges.get(user, 0.0)) for user, allowance in allowed.items()}


def _allowed(session: Session, quotas: Iterable[Quota], held: Iterable[Held], now: dt.datetime) -> dict[str, Allowance]:
    running = ((one.user, one.node, float(one.bytes), (now - one.since).total_seconds() / 3600) for one in held)
    return read_allowances(session, quotas, running)


def read_allowed(session: Session, now: dt.datetime) -> dict[str, Allowance]:
    """What users with a quota may have, and have had."""
    quotas = session.scalars(select(Quota)).all()
    return _allowed(session, quotas, read_held(session, now), now) if quotas else {}


def _close(tx: Transaction, job: Job, node: str, now: dt.datetime) -> None:
    """Drain what the failures blame, as a person would, unless it is the last that takes jobs."""
    if closure(node, read_failures(tx.session, now)) is None:
        return
    if not tx.is_alone("closing"):  # else two could each leave the other's card as the last one
        return  # the next failure will do
    found = closure(node, read_failures(tx.session, now))
    cards, drained = read_cards(tx.session, now), drained_targets(tx.session, now)
    if found is None or found.target in drained or found.target.rpartition(":")[0] in drained:
        return
    bad = [card for card in cards if found.target in (card.node, card.host)]
    if not _leaves_one(bad, cards):
        return
    drain(tx, found.target, "loractl", found.reason)
    _forget_failures(tx, found.target)
    tell_of_closure(tx, found.target, found.reason, now)
    tx.tell(job.job_id, job.attempt, "closed", f"{found.target} takes no more jobs: {found.reason}")


def _leaves_one(bad: list[Card], cards: list[Card]) -> bool:
    """Whether a card stays open without them; a processor does not count in place of GPUs."""
    only_gpus = any(not card.processor for card in bad)
    return any(card.open and card not in bad and not (only_gpus and card.processor) for card in cards)


def _forget_failures(tx: Transaction, target: str) -> None:
    """Count the failures of a card or a box from here on."""
    of_box = LabFailure.node.startswith(f"{target}:", autoescape=True)
    tx.session.execute(delete(LabFailure).where(or_(LabFailure.node == target, of_box)))
