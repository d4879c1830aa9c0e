"""Attempts on several cards: what they have of each, which node is whose, and when a card that goes ends them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Select, bindparam, case, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from loractl.common.job.status import Status
from loractl.common.placement.gangs import GangShare
from loractl.common.placement.rule import Placement

from ...fleet import OCCUPANT
from ...tables import AttemptShare, Job, Node
from ...transaction import SKIP_LOCKED, Transaction

_NOW = (
    (AttemptShare.job_id == Job.job_id)
    & (AttemptShare.attempt == Job.attempt)
    & (Job.status == Status.RUNNING)
    & (AttemptShare.rank > 0)
)
"""What a running job has of its cards besides the first, which is in the job's own row."""


LATE_SHARE = 0.5
"""A job that needs another card as well does not count on a node that was silent for this share of a lease."""


_SHARE = (AttemptShare.job_id == Job.job_id) & (AttemptShare.attempt == Job.attempt)
_IS_BESIDE = AttemptShare.rank > 0  # what it has of its first card is in the job's own row

ON_NODE = case((_IS_BESIDE, AttemptShare.node), else_=Job.node)
"""The card of a row of `occupants`."""


def occupants(*more: InstrumentedAttribute[Any]) -> Select[Any]:
    """What runs: a row for each card of a job, of one or of several (`rank`), with these columns of the job as well."""
    size = case((_IS_BESIDE, AttemptShare.bytes), else_=Job.vram_reserved)
    columns = (ON_NODE.label("node"), size.label("vram_reserved"), AttemptShare.rank)
    return select(*OCCUPANT, *columns, *more).outerjoin(AttemptShare, _SHARE).where(Job.status == Status.RUNNING)


def running_on(node: str) -> Select[Any]:
    """The jobs that run on a node as one of several."""
    return select(Job.job_id).join(AttemptShare, _NOW).where(AttemptShare.node == node)


def of_job(job_id: int) -> Select[AttemptShare]:
    """What a job's attempts have of several cards, by attempt and rank."""
    mine = select(AttemptShare).where(AttemptShare.job_id == job_id)
    return mine.order_by(AttemptShare.attempt, AttemptShare.rank)


def read_beside(session: Session, job_ids: Iterable[int]) -> dict[int, list[AttemptShare]]:
    """What each of these running jobs has of cards besides its first, by rank."""
    mine = select(AttemptShare).join(Job, _NOW).where(Job.job_id.in_(list(job_ids)))
    found: dict[int, list[AttemptShare]] = {}
    for share in session.scalars(mine.order_by(AttemptShare.job_id, AttemptShare.rank)):
        found.setdefault(share.job_id, []).append(share)
    return found


def silent(session: Session, since: dt.datetime, limit: int) -> list[tuple[int, str]]:
    """Running jobs and a card of each, not their first, whose node was not seen since then.

    Locks the rows of these nodes: one that reports now is seen, or waits for what ends its jobs.
    """
    query = select(Job.job_id, Node.node.label("seen"), AttemptShare.node).join(AttemptShare, _NOW)
    gone = query.outerjoin(Node, Node.node == AttemptShare.node)
    gone = gone.where(Node.seen_at.is_(None) | (Node.seen_at < since)).order_by(Job.job_id).limit(limit)
    rows = session.execute(gone).all()
    still = select(Node.node).where(Node.node.in_({row.node for row in rows}), Node.seen_at < since)
    locked = set(session.scalars(still.with_for_update(**SKIP_LOCKED))) if rows else set()
    return [(row.job_id, row.node) for row in rows if row.seen is None or row.node in locked]


def is_late(node: Node, now: dt.datetime, lease_s: float) -> bool:
    """Whether a card's node has been silent for a while: a job on several cards that has this one would soon be ended
    as lost."""
    return node.seen_at < now - dt.timedelta(seconds=lease_s * LATE_SHARE)


_OF_BOX = select(Node).where(Node.host == bindparam("host")).order_by(Node.node)
_CARD, _BOX = (
    select(aliased(Node, locked.with_for_update().subquery()))
    for locked in (select(Node).where(Node.node == bindparam("node")), _OF_BOX)
)


def lock(tx: Transaction, node: str, *, gangs: bool) -> tuple[Node, dt.datetime] | None:
    """Lock the node's row; where several cards may be given out the rows of its whole box, always in one order.
    Returns it with the time under the lock: PostgreSQL locks the rows of a subquery before it computes what is around.
    """
    rows = tx.timed(_BOX if gangs else _CARD, {"node": node, "host": node.rpartition(":")[0]})
    return next(((row, max(at for _, at in rows)) for row, _ in rows if row.node == node), None)


def write(tx: Transaction, placed: Placement, attempt: int) -> None:
    """Write what an attempt has of each of several cards."""
    shares = placed.shares if placed.beside else ()
    tx.session.add_all(
        AttemptShare(job_id=placed.job.job_id, attempt=attempt, rank=rank, node=share.node, bytes=share.bytes)
        for rank, share in enumerate(shares)
    )


def own_first(placed: Placement, node: str) -> tuple[GangShare, ...]:
    """The shares in the order of ranks: the node that claims has the first."""
    return tuple(sorted(placed.shares, key=lambda share: (share.node != node, share.node)))
