"""Preemption: running jobs give way to a waiting one of higher priority when nothing else makes room for it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update

from loractl.common.job.status import Status
from loractl.common.placement.lines import Openings
from loractl.common.placement.preemption import give_way
from loractl.common.placement.rule import place

from ..tables import Job
from ..transaction import Transaction
from .lines import read_levels, read_oldest
from .nodes import read_cards, read_charges


def preempt(tx: Transaction) -> tuple[int, ...]:
    now = tx.now()
    willing = select(Job.preempted_by).where(Job.status == Status.RUNNING, Job.preemptible)
    asked = tx.session.scalars(willing.with_for_update()).all()
    if not asked or any(by is not None for by in asked):
        return ()  # no job is willing, or one is on the way out already
    cards, charges = read_cards(tx.session, now), read_charges(tx.session, now)
    decisions = list(place(read_levels(tx.session, now), cards, charges, now, read_oldest(tx.session, now)))
    starting = {d.placed.job.job_id for d in decisions if d.placed is not None}
    level = next(read_levels(tx.session, now), {})
    anything = Openings(gpu=2**62, processor=(0, 0), unknown=False, labels=frozenset(c.labels for c in cards if c.open))
    for job in (line.next(anything) for line in level.values()):
        way = give_way(job, cards) if job is not None and job.job_id not in starting else None
        if job is not None and way is not None:
            node, going = way
            _ask(tx, job.job_id, job.priority, node, going)
            return going
    return ()


def _ask(tx: Transaction, job_id: int, priority: int, node: str, going: Sequence[int]) -> None:
    """Ask those that run on the node to give way to the job."""
    tx.session.execute(update(Job).where(Job.job_id.in_(going)).values(preempted_by=job_id))
    for going_id in going:
        tx.tell(going_id, None, "preempt", f"asked to give way to job {job_id} (priority {priority})")
    tx.tell(job_id, None, "preempt", f"takes the room of {_listed(going)} on {node}")


def _listed(job_ids: Sequence[int]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(map(str, job_ids))}"
