"""What was had of the cards since some hour, with what runs now."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import func, select

from loractl.common.job.status import Status
from loractl.common.placement.shares import Allowance
from loractl.common.units import GIB

from ..records import PastUse
from ..tables import Job, LabelSet, Usage
from ..transaction import Transaction
from .cards.nodes import read_allowed, read_held
from .usage import SUMS, begin_of, by_hour, card_share, read_totals


def read_allowances(tx: Transaction) -> dict[str, Allowance]:
    """What users with a quota may have, and have had."""
    return read_allowed(tx.session, tx.now())


def read_card_hours(tx: Transaction) -> dict[str, float]:
    """The card hours of all ended attempts ever, by user."""
    sums = select(Usage.user, func.sum(Usage.card_hours).label("hours")).group_by(Usage.user)
    return {row.user: row.hours for row in tx.session.execute(sums)}


def read_spent(tx: Transaction, since: dt.datetime) -> list[PastUse]:
    """The sums of the hours from this one on, and what runs now, so far."""
    first, now = begin_of(since), tx.now()
    rows = tx.session.execute(
        select(Usage, LabelSet.labels)
        .outerjoin(LabelSet, LabelSet.label_set == Usage.label_set)
        .where(Usage.hour >= first)
        .order_by(Usage.hour)
    )
    names = ("hour", "user", "node", *SUMS)
    found = [PastUse(**{name: getattr(row, name) for name in names}, labels=labels or {}) for row, labels in rows]
    held = read_held(tx.session, now)
    totals = read_totals(tx.session, [one.node for one in held])
    running = tx.session.execute(select(Job.job_id, Job.labels).where(Job.status == Status.RUNNING))
    labels = {row.job_id: row.labels for row in running}
    for one in held:
        for hour, hours in by_hour(one.since, now):
            if hour >= first:
                found.append(
                    PastUse(
                        hour=hour, user=one.user, node=one.node, labels=labels.get(one.job_id) or {},
                        card_hours=hours * card_share(one.bytes, totals.get(one.node)),
                        gib_hours=hours * one.bytes / GIB,
                    )
                )  # fmt: skip
    return found
