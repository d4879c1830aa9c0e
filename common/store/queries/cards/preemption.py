"""Preemption: running jobs stop for a waiting one when nothing else makes room for it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, or_, select, update

from loractl.common.job.status import Status
from loractl.common.placement.preemption import first_stop

from ...tables import WAITS, Job
from ...transaction import SKIP_LOCKED, Transaction
from ..lines import StoredQueue
from .nodes import read_fleet
from .shares import running_on


def preempt(tx: Transaction) -> tuple[int, ...]:
    """Ask running jobs to give way to one of higher priority when nothing else helps; returns the jobs asked."""
    if not tx.is_alone() or not _may_help(tx):
        return ()
    now = tx.now()
    fleet = read_fleet(tx.session, now, tx.lease_s)
    queue = StoredQueue(tx.session, now)
    found = first_stop(queue, fleet.cards, fleet.charges, now, by_share=fleet.by_share)
    if found is None or not _ask(tx, found.job.job_id, found.job.priority, found.node, found.going):
        return ()
    return found.going


def _may_help(tx: Transaction) -> bool:
    """Whether a running job of lower priority than a waiting one may be stopped. None is on the way out already."""
    willing = select(Job.priority, Job.preempted_by).where(Job.status == Status.RUNNING, Job.preemptible)
    running = tx.session.execute(willing).all()
    if not running or any(row.preempted_by is not None for row in running):
        return False
    highest = tx.session.scalar(select(func.max(Job.priority)).where(WAITS))
    return highest is not None and highest > min(row.priority for row in running)


def _ask(tx: Transaction, job_id: int, priority: int, node: str, going: Sequence[int]) -> bool:
    """Ask those that run on the node to give way to the job. False when one of them is ending at this moment."""
    here = or_(*(or_(Job.node == one, Job.job_id.in_(running_on(one))) for one in node.split(" and ")))
    still = select(Job.job_id).where(Job.job_id.in_(going), Job.status == Status.RUNNING, here)
    locked = tx.session.scalars(still.order_by(Job.job_id).with_for_update(**SKIP_LOCKED)).all()
    if len(locked) < len(going):
        return False
    tx.session.execute(update(Job).where(Job.job_id.in_(going)).values(preempted_by=job_id))
    for going_id in going:
        tx.tell(going_id, None, "preempt", f"asked to give way to job {job_id} (priority {priority})")
    tx.tell(job_id, None, "preempt", f"takes the room of {_listed(going)} on {node}")
    return True


def _listed(job_ids: Sequence[int]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(map(str, job_ids))}"
