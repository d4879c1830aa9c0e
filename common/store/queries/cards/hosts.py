"""The hosts of cards: written when a trainer stays with its base, joined and sent off by claims, gone at its end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import ColumnElement, delete, or_, select, update

from loractl.common.job.method import Method
from loractl.common.job.status import Status
from loractl.common.placement.hosts import Seat, may_wait
from loractl.common.placement.pack_rule import MeasuredPass, PassLaw

from ...hosts import TrainerHost
from ...records import Claim, NewHost
from ...tables import Attempt, Job, Node
from ...transaction import Transaction
from .nodes import read_cards


def keep(tx: Transaction, claim: Claim, new: NewHost) -> bool:
    return _write(tx, claim, new, is_open=False)


def open_to_others(tx: Transaction, claim: Claim, new: NewHost) -> bool:
    if not _write(tx, claim, new, is_open=True):
        return False
    tx.session.execute(update(Attempt).where(*_of(claim)).values(host=new.host))
    return True


def _write(tx: Transaction, claim: Claim, new: NewHost, *, is_open: bool) -> bool:
    """Write the host's row while the claim's attempt runs, if its base has room."""
    tx.session.scalars(select(Node).where(Node.node == new.node).with_for_update()).first()
    now, member = tx.now(), {"job_id": claim.job_id, "attempt": claim.attempt}
    own = (Job.job_id == claim.job_id, Job.token == claim.token, Job.status == Status.RUNNING, Job.node == new.node)
    if tx.session.scalar(select(Job.job_id).where(*own)) is None:
        return False
    if others_inside(tx, new.host, claim):
        return True  # the row says what holds while they are in it
    what = {"base_model": claim.spec.base_model, "method": claim.method.value, "open": is_open}
    tx.put(TrainerHost, "host", {**vars(new), **what, **member, "leaving": False, "since": now})
    card = next((card for card in read_cards(tx.session, now) if card.node == new.node), None)
    if card is None or not may_wait(card):
        forget(tx, [new.host])
        return False
    return True


def others_inside(tx: Transaction, host: str, claim: Claim) -> bool:
    """Whether other attempts than the claim's are in the host, running or on their way out."""
    running = (Attempt.job_id == Job.job_id) & (Attempt.attempt == Job.attempt) & (Job.status == Status.RUNNING)
    inside = select(Attempt.job_id).join(Job, Attempt.job_id == Job.job_id)
    inside = inside.where(Attempt.host == host, Attempt.token != claim.token, or_(running, Attempt.inside))
    return tx.session.scalars(inside.limit(1)).first() is not None


def leave(tx: Transaction, claim: Claim) -> None:
    tx.session.execute(update(Attempt).where(*_of(claim)).values(inside=False))


def note_passes(tx: Transaction, host: str, passes: Sequence[MeasuredPass]) -> None:
    row = tx.session.get(TrainerHost, host, with_for_update=True)
    if row is None:
        return
    law = PassLaw.from_json(row.law, quantised=Method(row.method) is Method.QLORA)
    for measured in passes:
        law = law.learn(measured)
    row.law = law.as_json()


def _of(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt, Attempt.token == claim.token


def take_seat(tx: Transaction, seat: Seat, job_id: int, attempt: int) -> bool:
    """Write a job's seat, in its claim. False: the host that it was to join has gone meanwhile."""
    if seat.host is not None:
        free = (TrainerHost.host == seat.host.host, ~TrainerHost.leaving)
        joined = {"job_id": job_id, "attempt": attempt, "since": tx.now()}
        if not tx.change(update(TrainerHost).where(*free).values(**joined)):
            return False
    if seat.leaving:
        going = TrainerHost.host.in_([base.host for base in seat.leaving])
        tx.change(update(TrainerHost).where(going).values(leaving=True))
    return True


def send_off(tx: Transaction, host: str, node: str) -> bool:
    tx.session.scalars(select(Node).where(Node.node == node).with_for_update()).first()  # no claim joins it meanwhile
    row = tx.session.get(TrainerHost, host, populate_existing=True)
    if row is None:
        return True
    inside = (Job.job_id == row.job_id, Job.attempt == row.attempt, Job.status == Status.RUNNING)
    if not row.leaving and tx.session.scalar(select(Job.job_id).where(*inside)) is not None:
        return False
    row.leaving = True
    return True


def forget(tx: Transaction, hosts: Iterable[str]) -> None:
    tx.session.execute(delete(TrainerHost).where(TrainerHost.host.in_(list(hosts))))


def of_node(tx: Transaction, node: str) -> Collection[TrainerHost]:
    return tx.session.scalars(select(TrainerHost).where(TrainerHost.node == node)).all()
