"""What is told to people: messages are written in the transaction of what happened."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import func, select

from loractl.common.channel.channels import LAB, names_in
from loractl.common.job.status import Reason, Status
from loractl.common.text import clean_line, storable

from ...fleet import NODE_STALE_S
from ...outbox import OutboxMessage
from ...tables import Job, Node
from ...transaction import Transaction
from ..sweeps import read_sweeps

NEWS_S = 24 * 3600.0
"""A silence that is older is no news."""

MOST_TEXT = 2000
"""Characters of a message: a job's own words may be long."""

_SWEEP_OVER_LOCK = 0x5EEA
"""Any constant: with a sweep's number it names a lock in PostgreSQL."""


def tell_of_job(tx: Transaction, job: Job) -> None:
    """Tell of a job that has just ended or been held. A sweep's members are told of as one, when the last has ended."""
    if names := names_in(job.spec):  # apart: what can't be told must not keep a job from its end
        tx.apart(job.job_id, lambda: _tell_of_job(tx, job, names))


def tell_of_jobs(tx: Transaction, job_ids: Collection[int]) -> None:
    for job in tx.session.scalars(select(Job).where(Job.job_id.in_(job_ids)).order_by(Job.job_id)).all():
        tell_of_job(tx, job)


def tell_of_closure(tx: Transaction, target: str, reason: str, now: dt.datetime) -> None:
    """Tell the lab that a card or a box takes no more jobs."""
    subject = f"{target}: closed, {reason}"
    advice = f"{target} takes no more jobs until: loractl undrain {target}"
    write(tx, [LAB], f"closed:{target}:{now.isoformat()}", "card.closed", None, "", (subject, advice))


def tell_of_silence(tx: Transaction, now: dt.datetime) -> None:
    """Tell the lab once of each box that has fallen silent, or of a card of it. One that stops in order has no row."""
    hosts: dict[str, list[tuple[str, dt.datetime]]] = {}
    for node, host, seen_at in tx.session.execute(select(Node.node, Node.host, Node.seen_at).order_by(Node.node)):
        hosts.setdefault(host, []).append((node, seen_at))
    fallen: dict[str, str] = {}  # subject by event
    for host, cards in hosts.items():
        silent = [(node, seen) for node, seen in cards if NODE_STALE_S < (now - seen).total_seconds() < NEWS_S]
        whole = silent and len(silent) == len(cards)
        for name, seen in [(host, max(seen for _, seen in silent))] if whole else silent:
            fallen[f"silent:{name}:{seen.isoformat()}"] = f"{name}: silent since {seen:%Y-%m-%d %H:%M} UTC"
    known = set(tx.session.scalars(select(OutboxMessage.event).where(OutboxMessage.event.in_(fallen))))
    for event in fallen.keys() - known:
        advice = "Its jobs go on elsewhere where a card fits."
        write(tx, [LAB], event, "box.silent", None, "", (fallen[event], advice))


def _tell_of_job(tx: Transaction, job: Job, names: Sequence[str]) -> None:
    if job.sweep_id is not None and not job.held:
        _tell_of_sweep(tx, job, job.sweep_id, names)
    elif job.held:
        # a hundred members that are held for one fault are one message
        event = f"job:{job.job_id}:{job.attempt}" if job.sweep_id is None else f"sweep:{job.sweep_id}"
        said = (job.message or "").removeprefix("held: ")
        _post(tx, names, f"{event}:held", "job.held", job, f"{job.name}: held, {said}", "loractl retry releases it.")
    elif job.status is Status.SUCCEEDED:
        _post(tx, names, _ended(job), "job.succeeded", job, f"{job.name}: {job.message}", "It has finished.")
    elif job.status is Status.FAILED:
        what = "" if job.reason is None else f" ({job.reason.value})"
        _post(tx, names, _ended(job), "job.failed", job, f"{job.name}: failed{what}, {job.message}", "It has ended.")


def _tell_of_sweep(tx: Transaction, job: Job, sweep_id: int, names: Sequence[str]) -> None:
    """Tell of the whole sweep if this was its last member. Two that end at once are looked at one after the other."""
    if tx.session.get_bind().dialect.name == "postgresql":
        tx.session.execute(select(func.pg_advisory_xact_lock(_SWEEP_OVER_LOCK, sweep_id)))
    tx.session.flush()
    going = (Job.sweep_id == sweep_id, Job.status.in_((Status.QUEUED, Status.RUNNING)))
    if tx.session.scalar(select(Job.job_id).where(*going).limit(1)) is not None:
        return
    (view,) = read_sweeps(tx.session, [sweep_id])
    ended = [member.status for member in view.members]
    well = ended.count(Status.SUCCEEDED)
    stopped = sum(member.reason is Reason.PRUNED for member in view.members)
    losses = [(member.final_loss, member.job_id) for member in view.members if member.final_loss is not None]
    best = f", best loss {min(losses)[0]:.4f} (job {min(losses)[1]})" if losses else ""
    early = f", {stopped} stopped early" if stopped else ""
    subject = f"{view.name}: sweep {sweep_id} is over, {well} of {len(ended)} succeeded{early}{best}"
    newest = tx.session.scalar(select(func.sum(Job.attempt)).where(Job.sweep_id == sweep_id))
    advice = f"loractl compare --sweep {sweep_id}"
    write(tx, names, f"sweep:{sweep_id}:{newest}:over", "sweep.over", job.job_id, job.user, (subject, advice))


def _ended(job: Job) -> str:
    return f"job:{job.job_id}:{job.attempt}:{job.status.value}"


def _post(tx: Transaction, names: Sequence[str], event: str, kind: str, job: Job, subject: str, then: str) -> None:
    where = "" if job.node is None else f", last on {job.node}"
    advice = f"Job {job.job_id} of {job.user}{where}. {then} More: loractl show {job.job_id}"
    write(tx, names, event, kind, job.job_id, job.user, (subject, advice))


def write(
    tx: Transaction, names: Iterable[str], event: str, kind: str, job_id: int | None, user: str, said: tuple[str, str]
) -> None:
    subject, advice = (storable(clean_line(text))[:MOST_TEXT] for text in said)
    now = tx.now()
    same = {"event": event, "kind": kind, "job_id": job_id, "user": user, "subject": subject, "text": advice}
    rows = [
        {**same, "message_id": f"msg_{uuid.uuid4().hex}", "channel": name, "at": now, "due_at": now, "tries": 0}
        for name in dict.fromkeys(names)
    ]
    tx.add_new(OutboxMessage, rows)
