"""The hosts of cards: written when a trainer stays with its base, joined and sent off by claims, gone at its end."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import ColumnElement, select, update

from loractl.common.job.method import Method
from loractl.common.job.status import Status
from loractl.common.placement.cards import WarmBase
from loractl.common.placement.hosts import Seat, may_wait
from loractl.common.placement.pack_rule import MeasuredPass, PassLaw
from loractl.common.store.tables import TrainerHost

from ...records import Claim, NewHost
from ...tables import INSIDE, Attempt, Job, Node
from ...transaction import Transaction
from .nodes import forget_hosts, read_cards


def keep(tx: Transaction, claim: Claim, new: NewHost) -> bool:
    """Write that a trainer stays with its base, while its attempt runs or is inside; False: its lease is lost, or
    the base has no room on the card. Once the attempt has ended and is out of it, it waits for a job.
    """
    return _write(tx, claim, new, is_open=False)


def open_to_others(tx: Transaction, claim: Claim, new: NewHost) -> bool:
    """Write that others may train alongside an attempt, in its trainer, from now on; `new.bytes`: of the loaded base.

    False: its lease is lost, or the base has no room on the card.
    """
    if not _write(tx, claim, new, is_open=True):
        return False
    tx.session.execute(update(Attempt).where(*_of(claim)).values(host=new.host, base_bytes=new.bytes))
    return True


def _write(tx: Transaction, claim: Claim, new: NewHost, *, is_open: bool) -> bool:
    """Write the host's row, if its base has room, while the claim's attempt runs, or is on its way out as the last."""
    own = (Job.job_id == claim.job_id, Job.token == claim.token, Job.status == Status.RUNNING, Job.node == new.node)
    # The job's row first, so that its lease can't end in between. If somebody else has it locked, we wait here, and not
    # while we hold the node's row, which the node needs for its heartbeat.
    runs = tx.session.scalar(select(Job.job_id).where(*own).with_for_update(key_share=True)) is not None
    tx.session.scalars(select(Node).where(Node.node == new.node).with_for_update()).first()
    now, member = tx.now(), {"job_id": claim.job_id, "attempt": claim.attempt}
    if not runs and (is_open or not _is_inside(tx, claim, new.host)):
        return False
    if is_busy(tx, new.host, claim.token):
        return True  # the row says what holds while they are in it
    opened = tx.session.get(TrainerHost, new.host) is not None
    what = {"base_model": claim.spec.base_model, "method": claim.method.value, "open": is_open}
    tx.put(TrainerHost, "host", {**vars(new), **what, **member, "leaving": False, "since": now})
    card = next((card for card in read_cards(tx.session, now) if card.node == new.node), None)
    if card is not None and may_wait(card):
        return True
    if opened:  # its bytes are held until the node has ended it
        tx.change(update(TrainerHost).where(TrainerHost.host == new.host).values(leaving=True, open=False))
    else:
        forget(tx, [new.host])
    return False


def _is_inside(tx: Transaction, claim: Claim, host: str) -> bool:
    """Whether the claim's attempt has ended and is not out of the host yet."""
    there = (*_of(claim), Attempt.host == host, Attempt.inside)
    return tx.session.scalar(select(Attempt.job_id).where(*there).with_for_update()) is not None


def is_busy(tx: Transaction, host: str, but: str = "") -> bool:
    """Whether attempts are in the host, running or on their way out; `but`: the token of one that does not count."""
    there = (INSIDE, Attempt.host == host, Attempt.token != but)
    return tx.session.scalars(select(Attempt.job_id).where(*there).limit(1)).first() is not None


def spoil(tx: Transaction, host: str, node: str, why: str) -> None:
    """Let no job join the host any more, which ends with its last one; `why`: in words; the first reason stays."""
    tx.session.scalars(select(Node).where(Node.node == node).with_for_update()).first()  # no claim joins it meanwhile
    still = (TrainerHost.host == host, TrainerHost.spoilt.is_(None))
    tx.session.execute(update(TrainerHost).where(*still).values(spoilt=why))


def leave(tx: Transaction, claim: Claim) -> None:
    """An attempt that has ended is out of its host: its tensors, threads and files are gone."""
    tx.session.execute(update(Attempt).where(*_of(claim)).values(inside=False))


def note_passes(tx: Transaction, host: str, passes: Sequence[MeasuredPass]) -> None:
    """Teach the law of a host's passes; one that has gone learns nothing."""
    row = tx.session.get(TrainerHost, host, with_for_update=True)
    if row is None:
        return
    law = PassLaw.from_json(row.law, quantised=row.method is Method.QLORA)
    for measured in passes:
        law = law.learn(measured)
    row.law = law.as_json()


def _of(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return Attempt.job_id == claim.job_id, Attempt.attempt == claim.attempt, Attempt.token == claim.token


def take_seat(tx: Transaction, seat: Seat, job_id: int, attempt: int) -> bool:
    """Write a job's seat, in its claim. False: the host that it was to join is gone."""
    if seat.host is not None:
        free = (TrainerHost.host == seat.host.host, ~TrainerHost.leaving)
        joined = {"job_id": job_id, "attempt": attempt, "since": tx.now(), "open": False}
        if not tx.change(update(TrainerHost).where(*free).values(**joined)):
            return False
    _send_off(tx, seat)
    return True


def take_place(tx: Transaction, seat: Seat, base: WarmBase) -> bool:
    """Write a job's place alongside others in a running host, in its claim. False: nothing joins that host any more.

    From now on the others' expected ends count as promised.
    """
    still = (TrainerHost.host == base.host, TrainerHost.open, ~TrainerHost.leaving, TrainerHost.spoilt.is_(None))
    if tx.session.scalar(select(TrainerHost.host).where(*still).with_for_update()) is None:
        return False
    now, runs = tx.now(), (Attempt.host == base.host, Attempt.ended_at.is_(None))
    tx.session.execute(update(Attempt).where(*runs).values(shared=True))
    ends = select(Attempt, Job.eta_seconds).join(Job, Job.job_id == Attempt.job_id)
    for member, eta_s in tx.session.execute(ends.where(*runs, Attempt.promised_at.is_(None))):
        member.promised_at = None if eta_s is None else now + dt.timedelta(seconds=eta_s)
    _send_off(tx, seat)
    return True


def beside(tx: Transaction, host: str, job_id: int) -> str:
    """The jobs that a job trains alongside in a host, for its history."""
    there = (Attempt.host == host, Attempt.ended_at.is_(None), Attempt.job_id != job_id)
    others = tx.session.scalars(select(Attempt.job_id).where(*there).order_by(Attempt.job_id)).all()
    named = f"job{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
    return f"with {named} on one base" if others else "on a base that others had"


def _send_off(tx: Transaction, seat: Seat) -> None:
    if seat.leaving:
        going = TrainerHost.host.in_([base.host for base in seat.leaving])
        tx.change(update(TrainerHost).where(going).values(leaving=True))


def send_off(tx: Transaction, host: str, node: str) -> bool:
    """Let no job join the host any more; False when one is in it. Its bytes stay held until it is forgotten."""
    tx.session.scalars(select(Node).where(Node.node == node).with_for_update()).first()  # no claim joins it meanwhile
    row = tx.session.get(TrainerHost, host, populate_existing=True)
    if row is None:
        return True
    inside = (Job.job_id == row.job_id, Job.attempt == row.attempt, Job.status == Status.RUNNING)
    busy = tx.session.scalar(select(Job.job_id).where(*inside)) is not None
    if not row.leaving and (busy or is_busy(tx, host)):
        return False
    row.leaving = True
    return True


def forget(tx: Transaction, hosts: Iterable[str]) -> None:
    """The hosts' processes have ended, and the card has their room again."""
    forget_hosts(tx, TrainerHost.host.in_(list(hosts)))


def of_node(tx: Transaction, node: str) -> Collection[TrainerHost]:
    """The hosts of a card."""
    return tx.session.scalars(select(TrainerHost).where(TrainerHost.node == node)).all()
