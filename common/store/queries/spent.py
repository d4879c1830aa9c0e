"""Use of the cards since some hour, with what runs now."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loractl.common.job.status import Status
from loractl.common.placement.card_hours import HOUR, PastCardHours, begin_of, by_hour, card_share
from loractl.common.placement.shares import Allowance, charge, decayed
from loractl.common.units import GIB

from ..records import PastUse
from ..tables import Job, LabelSet, Quota, Usage, Use
from ..transaction import Transaction
from .cards.nodes import read_allowed, read_held
from .usage import SUMS, read_totals

DETAILS = ("hour", "user", "node", "label_set")
"""What the sums are kept by."""


def read_allowances(tx: Transaction) -> dict[str, Allowance]:
    """What users with a quota may have, and have had."""
    return read_allowed(tx.session, tx.now())


def read_card_hours(tx: Transaction) -> dict[str, float]:
    """The card hours of all ended attempts ever, by user."""
    sums = select(Usage.user, func.sum(Usage.card_hours).label("hours")).group_by(Usage.user)
    return {row.user: row.hours for row in tx.session.execute(sums)}


def read_past(tx: Transaction) -> dict[str, PastCardHours]:
    """What users with a quota have had by now, for a replay from here on."""
    session, now = tx.session, tx.now()
    quotas = {quota.user: quota for quota in session.scalars(select(Quota))}
    if not quotas:
        return {}
    held = [one for one in read_held(session, now) if one.user in quotas]
    totals = read_totals(session, [one.node for one in held])
    uses = {use.user: use for use in session.scalars(select(Use).where(Use.user.in_(quotas)))}
    ended = _ended_by_hour(
        session, now - dt.timedelta(seconds=max(quota.window_s for quota in quotas.values())), quotas
    )
    found = {}
    for user in quotas:
        mine, use, running = [one for one in held if one.user == user], uses.get(user), defaultdict[int, float](float)
        for one in mine:
            running[one.job_id] += (now - one.since) / HOUR * card_share(one.bytes, totals.get(one.node))
        before = 0.0 if use is None else decayed(use.gib_hours, (now - use.at).total_seconds())
        counts = charge(before, [(one.bytes, (now - one.since).total_seconds()) for one in mine])
        found[user] = PastCardHours(charge=counts, ended=ended[user], running=running)
    return found


def _ended_by_hour(session: Session, since: dt.datetime, users: Collection[str]) -> dict[str, dict[dt.datetime, float]]:
    """Card hours of ended attempts after that moment."""
    found: dict[str, dict[dt.datetime, float]] = defaultdict(dict)
    sums = select(Usage.user, Usage.hour, func.sum(Usage.card_hours).label("hours")).group_by(Usage.user, Usage.hour)
    for row in session.execute(sums.where(Usage.user.in_(users), Usage.hour > since)):
        found[row.user][row.hour] = row.hours
    return found


def read_spent(tx: Transaction, since: dt.datetime, by: Sequence[str] = DETAILS) -> list[PastUse]:
    """The sums of the hours from this one on, by these of DETAILS alone; and of what runs now, so far."""
    first, now = begin_of(since), tx.now()
    apart, sums = [getattr(Usage, name) for name in by], [func.sum(getattr(Usage, name)).label(name) for name in SUMS]
    rows = tx.session.execute(select(*apart, *sums).where(Usage.hour >= first).group_by(*apart).order_by(*apart))
    sets = {one.label_set: one.labels for one in tx.session.scalars(select(LabelSet))} if "label_set" in by else {}
    found = []
    for row in rows.mappings():
        values = dict(row)
        labels = sets.get(values.pop("label_set", ""), {})
        found.append(PastUse(**values, labels=labels))
    held = read_held(tx.session, now)
    totals = read_totals(tx.session, [one.node for one in held])
    running = tx.session.execute(select(Job.job_id, Job.labels).where(Job.status == Status.RUNNING))
    given = {row.job_id: row.labels for row in running}
    for one in held:
        for hour, hours in by_hour(one.since, now):
            if hour >= first:
                found.append(
                    PastUse(
                        hour=hour, user=one.user, node=one.node, labels=given.get(one.job_id) or {},
                        card_hours=hours * card_share(one.bytes, totals.get(one.node)),
                        gib_hours=hours * one.bytes / GIB,
                    )
                )  # fmt: skip
    return found
