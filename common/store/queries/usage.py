"""Use of the cards, summed by hour as attempts end, and held against quotas."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason
from loractl.common.placement.card_hours import AHEAD, begin_of, by_hour, card_share
from loractl.common.placement.gangs import GangShare
from loractl.common.placement.shares import Allowance
from loractl.common.units import GIB

from ..tables import Attempt, Event, Job, LabelSet, Node, Quota, Usage, Use
from ..transaction import SKIP_LOCKED, Transaction

_WAITS_FROM = ("queued", "requeued", "released", "retry", "patience")
"""Events after which a job waits for a card."""


def record(tx: Transaction, job: Job, parts: Sequence[GangShare], start: dt.datetime, now: dt.datetime) -> float:
    """Add up what an attempt had that ends now, by hour and card; returns its card hours. The job's row is as its
    end has left it, but for its start and its steps."""
    totals = read_totals(tx.session, [part.node for part in parts])
    labels = {str(key): str(value) for key, value in job.labels.items()}
    key, lost = label_set(labels), _lost(tx, job)
    if key:
        tx.add_new(LabelSet, [{"label_set": key, "labels": labels}])
    rows: dict[tuple[dt.datetime, str], dict[str, float]] = defaultdict(lambda: dict.fromkeys(SUMS, 0.0))
    for number, part in enumerate(parts):
        share = card_share(part.bytes, totals.get(part.node))
        for hour, hours in by_hour(start, now):
            row = rows[hour, part.node]
            row["card_hours"] += hours * share
            row["gib_hours"] += hours * part.bytes / GIB
            row["lost_hours"] += hours * share * lost
        if number == 0:
            rows[begin_of(start), part.node]["waited_hours"] += _waited(tx, job.job_id, start) / 3600
            rows[begin_of(now), part.node]["jobs"] += int(job.status.is_terminal)
    for (hour, node), sums in sorted(rows.items()):  # in one order: several attempts may end at once
        tx.add_up(Usage, {"hour": hour, "user": job.user, "node": node, "label_set": key}, sums)
    used = sum(row["card_hours"] for row in rows.values())
    quota = tx.session.get(Quota, job.user, with_for_update=True)
    if quota is not None:
        quota.used += used
    return used


SUMS = ("card_hours", "gib_hours", "lost_hours", "waited_hours", "jobs")


def label_set(labels: Mapping[str, str]) -> str:
    """The short name of these labels; "" for none."""
    pairs = sorted(labels.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16] if pairs else ""


def read_totals(session: Session, nodes: Iterable[str]) -> dict[str, int]:
    """Bytes of the cards that are known."""
    known = session.execute(select(Node.node, Node.total).where(Node.node.in_(set(nodes))))
    return {row.node: row.total for row in known}


def _lost(tx: Transaction, job: Job) -> float:
    """The part of an attempt's steps that nothing keeps: those after its last stored checkpoint."""
    if job.reason is Reason.OK:
        return 0.0
    own = tx.session.get(Attempt, (job.job_id, job.attempt))
    began = 0 if own is None else own.resumed_from_step or 0
    done = (job.step or 0) - began
    kept = max(0, ((job.checkpoint or {}).get("step") or 0) - began)
    return 1.0 if done <= 0 else min(1.0, max(0.0, (done - kept) / done))


def _waited(tx: Transaction, job_id: int, start: dt.datetime) -> float:
    """Seconds that the attempt's job waited before it, since it was last free to start."""
    said = select(func.max(Event.at)).where(Event.job_id == job_id, Event.kind.in_(_WAITS_FROM), Event.at <= start)
    since = tx.session.scalar(said)
    return 0.0 if since is None else max(0.0, (start - since).total_seconds())


# --- quotas ---


def set_quota(tx: Transaction, user: str, card_hours: float, window_s: int, *, soft: bool) -> None:
    """Allow a user `card_hours` within any period of `window_s`, from now on."""
    row = {
        "user": user, "card_hours": card_hours, "window_s": window_s, "soft": soft, "used": 0.0, "below_at": None,
    }  # fmt: skip
    tx.add_new(Use, [{"user": user, "gib_hours": 0.0, "at": tx.now()}])  # a claim reads a quota with it
    tx.put(Quota, "user", row)
    tx.session.flush()
    refresh_quotas(tx)


def remove_quota(tx: Transaction, user: str) -> bool:
    """Let a user have any number of card hours again; False when the user had no quota."""
    return bool(tx.session.execute(delete(Quota).where(Quota.user == user).returning(Quota.user)).first())


def refresh_quotas(tx: Transaction) -> None:
    """Add up again what has been had within each quota's time. For the node on the fleet's round."""
    now = tx.now()
    for quota in tx.session.scalars(select(Quota).order_by(Quota.user).with_for_update(**SKIP_LOCKED)).all():
        window = dt.timedelta(seconds=quota.window_s)
        within = (Usage.user == quota.user, Usage.hour > now - window, Usage.hour <= now + AHEAD)
        sums = select(Usage.hour, func.sum(Usage.card_hours)).where(*within).group_by(Usage.hour).order_by(Usage.hour)
        hours = tx.session.execute(sums).all()
        quota.used, quota.below_at = sum(had for _, had in hours), None
        left = quota.used
        for hour, had in hours:
            if left < quota.card_hours:
                break
            left, quota.below_at = left - had, hour + window


def read_allowances(
    session: Session, rows: Iterable[Quota], running: Iterable[tuple[str, str, float, float]]
) -> dict[str, Allowance]:
    """What users with a quota may have, and have had. `running`: user, card, bytes and hours so far of what runs."""
    quotas = {quota.user: quota for quota in rows}
    mine = [one for one in running if one[0] in quotas]
    totals = read_totals(session, [node for _, node, _, _ in mine]) if mine else {}
    so_far = dict.fromkeys(quotas, 0.0)
    for user, node, size, hours in mine:
        so_far[user] += hours * card_share(size, totals.get(node))
    return {
        user: Allowance(
            user=user, card_hours=quota.card_hours, window_s=quota.window_s, soft=quota.soft,
            used=quota.used + so_far[user], below_at=None if so_far[user] >= quota.card_hours else quota.below_at,
        )
        for user, quota in quotas.items()
    }  # fmt: skip
