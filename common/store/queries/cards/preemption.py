"""Preemption: running jobs give way to a waiting one of higher priority when nothing else makes room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import func, or_, select, update

from loractl.common.job.status import Status
from loractl.common.placement.lines import Openings
from loractl.common.placement.preemption import give_way

from ...tables import Job
from ...transaction import Transaction
from ..lines import read_levels
from .decisions import decide
from .nodes import read_cards, read_charges
from .shares import late, running_on


def preempt(tx: Transaction, lease_s: float) -> tuple[int, ...]:
    if not tx.is_alone() or not _may_help(tx):
        return ()
    now = tx.now()
    silent = late(tx.session, now, lease_s)
    cards = [replace(card, silent=card.node in silent) for card in read_cards(tx.session, now)]
    decided = decide(tx.session, cards, read_charges(tx.session, now), now).decisions
    starting = {d.placed.job.job_id for d in decided if d.placed is not None}
    level = next(read_levels(tx.session, now), {})
    anything = Openings(gpu=2**62, processor=(0, 0), unknown=False, labels=frozenset(c.labels for c in cards if c.open))
    for job in (line.next(anything) for line in level.values()):
        way = give_way(job, cards) if job is not None and job.job_id not in starting else None
        if job is not None and way is not None:
            node, going = way
            return going if _ask(tx, job.job_id, job.priority, node, going) else ()
    return ()


def _may_help(tx: Transaction) -> bool:
    """Whether a running job is willing to give way, none is on the way out already, and one waits that is worth it."""
    willing = select(Job.priority, Job.preempted_by).where(Job.status == Status.RUNNING, Job.preemptible)
    running = tx.session.execute(willing).all()
    if not running or any(row.preempted_by is not None for row in running):
        return False
    highest = tx.session.scalar(select(func.max(Job.priority)).where(Job.status == Status.QUEUED))
    return highest is not None and highest > min(row.priority for row in running)


def _ask(tx: Transaction, job_id: int, priority: int, node: str, going: Sequence[int]) -> bool:
    """Ask those that run on the node to give way to the job. False when one of them is ending at this moment."""
    here = or_(*(or_(Job.node == one, Job.job_id.in_(running_on(one))) for one in node.split(" and ")))
    still = select(Job.job_id).where(Job.job_id.in_(going), Job.status == Status.RUNNING, here)
    locked = tx.session.scalars(still.order_by(Job.job_id).with_for_update(skip_locked=True)).all()
    if len(locked) < len(going):
        return False
    tx.session.execute(update(Job).where(Job.job_id.in_(going)).values(preempted_by=job_id))
    for going_id in going:
        tx.tell(going_id, None, "preempt", f"asked to give way to job {job_id} (priority {priority})")
    tx.tell(job_id, None, "preempt", f"takes the room of {_listed(going)} on {node}")
    return True


def _listed(job_ids: Sequence[int]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(map(str, job_ids))}"
