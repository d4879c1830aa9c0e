"""The hosts of cards: written when a trainer stays with its base, joined and sent off by claims, gone at its end."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import delete, select, update

from loractl.common.job.status import Status
from loractl.common.placement.hosts import Seat, may_wait

from ...hosts import TrainerHost
from ...records import Claim, NewHost
from ...tables import Job, Node
from ...transaction import Transaction
from .nodes import read_cards


def keep(tx: Transaction, claim: Claim, new: NewHost) -> bool:
    tx.session.scalars(select(Node).where(Node.node == new.node).with_for_update()).first()
    now, member = tx.now(), {"job_id": claim.job_id, "attempt": claim.attempt}
    own = (Job.job_id == claim.job_id, Job.token == claim.token, Job.status == Status.RUNNING, Job.node == new.node)
    if tx.session.scalar(select(Job.job_id).where(*own)) is None:
        return False
    what = {"base_model": claim.spec.base_model, "method": claim.method.value}
    tx.put(TrainerHost, "host", {**vars(new), **what, **member, "leaving": False, "since": now})
    card = next((card for card in read_cards(tx.session, now) if card.node == new.node), None)
    if card is None or not may_wait(card):
        forget(tx, [new.host])
        return False
    return True


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
