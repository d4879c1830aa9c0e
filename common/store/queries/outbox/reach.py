"""Jobs that no known card could ever hold: reported after a while unless one that could comes, or the job changes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterator
from dataclasses import replace

from sqlalchemy import ColumnElement, String, case, cast, delete, exists, select, text

from loractl.common.channels import names_in
from loractl.common.job.method import Method
from loractl.common.job.status import Status
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import QueueKey
from loractl.common.placement.refusals import most_usable, out_of_reach, with_labels
from loractl.common.store.columns import part_of
from loractl.common.store.fleet import waiting_of
from loractl.common.store.tables import FREE, Job, OutboxMessage
from loractl.common.store.transaction import Transaction

from ..jobs import read_job
from ..lines import lines_of
from .notices import News, write

GRACE_S = 600.0
"""A box that is restarted, or a job that its owner edits at once, is no news."""


KIND = "job.never"


_AT_ONCE = 50


_LIMIT = "its resources.max_vram is less than it needs with any method"


_LINES = text(f'{lines_of(FREE)} SELECT "user", queue_key FROM lines').bindparams(most=2**31)  # noqa: S608  no input


def tell_of_jobs_out_of_reach(tx: Transaction, cards: Collection[Card], now: dt.datetime) -> None:
    """Report waiting jobs that none of these cards could ever hold, and withdraw what does not hold any more."""
    _withdraw(tx, cards, now)
    for job_id in _found(tx, cards):
        tx.apart(job_id, lambda job_id=job_id: _tell(tx, job_id, cards, now))  # type: ignore[misc]


def _withdraw(tx: Transaction, cards: Collection[Card], now: dt.datetime) -> None:
    """Remove what was not sent yet and is no longer so."""
    early = (OutboxMessage.kind == KIND, OutboxMessage.settled_at.is_(None), OutboxMessage.tries == 0)

    def look(event: str, job_id: int) -> None:
        if _why(read_job(tx, job_id), cards, now) is None:
            tx.session.execute(delete(OutboxMessage).where(*early, OutboxMessage.event == event))

    for event, job_id in tx.session.execute(select(OutboxMessage.event, OutboxMessage.job_id).where(*early)).all():
        assert job_id is not None, "it is told of a job"
        tx.apart(job_id, lambda event=event, job_id=job_id: look(event, job_id))  # type: ignore[misc]


def _found(tx: Transaction, cards: Collection[Card]) -> Iterator[int]:
    """Waiting jobs that name a channel and may be out of reach, the oldest of each line first."""
    for user, key in tx.session.execute(_LINES).all() if cards else ():
        condition = _beyond(key, cards)
        if condition is None:
            continue
        untold = ~exists().where(OutboxMessage.event == _event())
        named = part_of(Job.spec, "notify").like('["%')
        mine = (text(FREE), Job.user == user, Job.queue_key == key, named, untold, condition)
        yield from tx.session.scalars(select(Job.job_id).where(*mine).order_by(Job.job_id).limit(_AT_ONCE)).all()


def _beyond(key: str, cards: Collection[Card]) -> ColumnElement[bool] | None:
    """Which jobs under a key may be out of reach; None: none of them."""
    parsed = QueueKey.parse(key)
    if parsed.bound == 0:  # a need that is not known, or no method that its own limit admits
        return cast(Job.methods, String) == "[]"
    labelled = with_labels(cards, parsed.requires)
    if not labelled:
        return Job.job_id > 0
    most = most_usable(labelled)
    return None if most is None or parsed.bound <= most else Job.job_id > 0


def _tell(tx: Transaction, job_id: int, cards: Collection[Card], now: dt.datetime) -> None:
    job = read_job(tx, job_id)
    why, names = _why(job, cards, now), names_in(job.spec)
    if why is None or not names:
        return
    news = News(
        event=f"job:{job.job_id}:never" if job.sweep_id is None else f"sweep:{job.sweep_id}:never",
        kind=KIND,
        job_id=job.job_id,
        user=job.user,
        subject=f"{job.name}: can never run, {why}",
        advice=f"Job {job.job_id} of {job.user} waits for a card that the lab does not have: loractl why {job.job_id}",
        later_s=GRACE_S,
    )
    write(tx, names, news)


def _why(job: Job, cards: Collection[Card], now: dt.datetime) -> str | None:
    """Why a job can never run as things are; None: it may, or waits no more."""
    if job.status is not Status.QUEUED or job.held or job.awaits is not None:
        return None
    me = replace(waiting_of(vars(job), now), methods=tuple(Method(name) for name in job.methods))
    return out_of_reach(me, cards) if me.methods else _LIMIT


def _event() -> ColumnElement[str]:
    """What `_tell` names the event: a hundred members of a sweep are one message."""
    of_job, of_sweep = cast(Job.job_id, String), cast(Job.sweep_id, String)
    return case((Job.sweep_id.is_(None), "job:" + of_job + ":never"), else_="sweep:" + of_sweep + ":never")
