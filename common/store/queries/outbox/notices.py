"""Messages to people, written in the transaction of what happened; and about jobs that no known card could ever hold:
these after a while, unless a card that could comes, or the job changes."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, String, case, cast, delete, exists, func, select, text

from loractl.common.channels import LAB, names_in
from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Status
from loractl.common.job.sweep import SweepView
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import QueueKey
from loractl.common.placement.refusals import most_usable, out_of_reach, with_labels
from loractl.common.store.columns import part_of
from loractl.common.store.fleet import NODE_STALE_S, waiting_of
from loractl.common.store.tables import FREE, OF_PEOPLE, AttemptShare, Event, Job, Node, OutboxMessage
from loractl.common.store.transaction import Transaction
from loractl.common.text import clean_line, storable

from ..changes import SAID
from ..jobs import read_job
from ..lines import lines_of
from ..sweeps import read_sweeps

NEWS_S = 24 * 3600.0
"""A silence that is older is no news."""

_BY = tuple(f"{said} by " for said in SAID.values())

MOST_TEXT = 2000
"""Characters of a message: a job's own words may be long."""


@dataclass(frozen=True, kw_only=True)
class News:
    """Something that is reported once to each channel that it concerns."""

    event: str  # what makes it one: reported again under the same name it is the same message
    kind: str
    job_id: int | None
    user: str
    subject: str
    advice: str
    later_s: float = 0.0  # how long it may still be withdrawn


def tell_of_job(tx: Transaction, job: Job) -> None:
    """Report a job that has just ended or been held. A sweep's members are one report, when the last has ended."""
    if names := names_in(job.spec):  # apart: a message that fails must not keep a job from its end
        tx.apart(job.job_id, lambda: _tell_of_job(tx, job, names))


def tell_of_jobs(tx: Transaction, job_ids: Collection[int]) -> None:
    for job in tx.session.scalars(select(Job).where(Job.job_id.in_(job_ids)).order_by(Job.job_id)).all():
        tell_of_job(tx, job)


def tell_of_closure(tx: Transaction, target: str, reason: str, now: dt.datetime) -> None:
    """Report to the lab that a card or a box takes no more jobs."""
    event, advice = f"closed:{target}:{now.isoformat()}", f"{target} takes no more jobs until: loractl undrain {target}"
    _tell_lab(tx, event, "card.closed", f"{target}: closed, {reason}", advice)


def tell_of_silence(tx: Transaction, now: dt.datetime) -> None:
    """Report to the lab once each box that has fallen silent, or a card of it. One that stops in order has no row."""
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
        _tell_lab(tx, event, "box.silent", fallen[event], "Its jobs continue elsewhere if a card fits.")


def tell_of_cancelled_sweeps(tx: Transaction, since: dt.datetime) -> None:
    """Report sweeps whose last member a person has cancelled since then.

    The person's login may write no messages: a worker finds it in the rows, a moment later.
    """
    # by the time first: SQLite would look at all that was ever cancelled
    ended = select(Job.job_id, Job.sweep_id, Job.status).where(Job.ended_at >= since)
    lately = ended.cte("lately").prefix_with("MATERIALIZED")
    gone = select(func.max(lately.c.job_id)).where(lately.c.status == Status.CANCELLED)
    last = gone.where(lately.c.sweep_id.is_not(None)).group_by(lately.c.sweep_id)
    tell_of_jobs(tx, tx.session.scalars(last).all())


def tell_of_changes(tx: Transaction, since: dt.datetime) -> None:
    """Report to a job's channels that somebody else has changed it since then: no person's login writes messages."""
    changed = (
        select(Event.event_id, Event.job_id, Event.text, Event.at).where(Event.at >= since, text(OF_PEOPLE)).subquery()
    )
    users = select(changed, Job.user).join(Job, Job.job_id == changed.c.job_id).order_by(changed.c.at)
    for event_id, job_id, told, _, user in tx.session.execute(users).all():
        by = next((told.removeprefix(start) for start in _BY if told.startswith(start)), None)
        if by is None or re.match(rf"{re.escape(user)}(:|$)", by):
            continue  # loractl's own deed, as where no member of a sweep is the best; or the owner's
        job = tx.session.get_one(Job, job_id)
        if names := names_in(job.spec):
            then = f"It {job.status.in_words}."
            _post(tx, names, f"changed:{event_id}", "job.changed", job, f"{job.name}: {told}", then)


def _tell_of_job(tx: Transaction, job: Job, names: Sequence[str]) -> None:
    if job.sweep_id is not None and not job.held:
        _tell_of_sweep(tx, job, job.sweep_id, names)
    elif job.held:
        # a hundred members that are held for one fault are one message
        event = f"job:{job.job_id}:{job.attempt}" if job.sweep_id is None else f"sweep:{job.sweep_id}"
        said = (job.message or "").removeprefix("held: ")
        _post(
            tx, names, f"{event}:held", "job.held", job, f"{job.name}: held, {said}", "loractl release lets it start."
        )
    elif job.status is Status.SUCCEEDED:
        _post(tx, names, _ended(job), "job.succeeded", job, f"{job.name}: {job.message}", "It has finished.")
    elif job.status is Status.FAILED:
        what = "" if job.reason is None else f" ({job.reason.value})"
        _post(tx, names, _ended(job), "job.failed", job, f"{job.name}: failed{what}, {job.message}", "It has ended.")


def _tell_of_sweep(tx: Transaction, job: Job, sweep_id: int, names: Sequence[str]) -> None:
    """Report the whole sweep if this was its last member. Two that end at once are looked at one after the other."""
    tx.wait_for(f"end of sweep {sweep_id}")
    tx.session.flush()
    going = (Job.sweep_id == sweep_id, Job.status.in_((Status.QUEUED, Status.RUNNING)))
    if tx.session.scalar(select(Job.job_id).where(*going).limit(1)) is not None:
        return
    attempts = tx.session.scalar(select(func.sum(Job.attempt)).where(Job.sweep_id == sweep_id))
    event = f"sweep:{sweep_id}:{attempts}:over"
    if tx.session.scalar(select(OutboxMessage.event).where(OutboxMessage.event == event).limit(1)) is None:
        (view,) = read_sweeps(tx, [sweep_id], settings=False)
        said, advice = _outcome(view), f"loractl compare --sweep {sweep_id}"
        news = News(event=event, kind="sweep.over", job_id=job.job_id, user=job.user, subject=said, advice=advice)
        write(tx, names, news)


def _outcome(view: SweepView) -> str:
    """How a sweep went, in a line."""
    well = sum(member.status is Status.SUCCEEDED for member in view.members)
    stopped = sum(member.reason is Reason.PRUNED for member in view.members)
    cancelled = sum(member.reason is Reason.CANCELLED for member in view.members)
    early = f", {stopped} stopped early" if stopped else ""
    early += f", {cancelled} cancelled" if cancelled else ""
    first = view.best
    best = f", best loss {first.final_loss:.4f} (job {first.job_id})" if first and first.final_loss is not None else ""
    return f"{view.name}: sweep {view.sweep_id} is over, {well} of {len(view.members)} succeeded{early}{best}"


def _ended(job: Job) -> str:
    return f"job:{job.job_id}:{job.attempt}:{job.status.value}"


def _post(tx: Transaction, names: Sequence[str], event: str, kind: str, job: Job, subject: str, then: str) -> None:
    last = (AttemptShare.job_id == job.job_id, AttemptShare.attempt == job.attempt)
    several = tx.session.scalars(select(AttemptShare.node).where(*last).order_by(AttemptShare.rank)).all()
    cards = several or [name for name in [job.node] if name is not None]
    where = f", last on {' and '.join(cards)}" if cards else ""
    advice = f"Job {job.job_id} of {job.user}{where}. {then} More: loractl status {job.job_id}"
    news = News(event=event, kind=kind, job_id=job.job_id, user=job.user, subject=subject, advice=advice)
    write(tx, names, news)


def _tell_lab(tx: Transaction, event: str, kind: str, subject: str, advice: str) -> None:
    write(tx, [LAB], News(event=event, kind=kind, job_id=None, user="", subject=subject, advice=advice))


def write(tx: Transaction, names: Iterable[str], news: News) -> None:
    """A message for each of the channels that has none of this event yet."""
    subject, advice = (storable(clean_line(text))[:MOST_TEXT] for text in (news.subject, news.advice))
    now = tx.now()
    same = {"event": news.event, "kind": news.kind, "job_id": news.job_id, "user": news.user, "at": now, "tries": 0}
    same |= {"subject": subject, "text": advice, "due_at": now + dt.timedelta(seconds=news.later_s)}
    rows = [{**same, "message_id": f"msg_{uuid.uuid4().hex}", "channel": name} for name in dict.fromkeys(names)]
    tx.add_new(OutboxMessage, rows)


GRACE_S = 600.0
"""A box that is restarted, or a job that its owner edits at once, is no news."""


KIND = "job.never"


_AT_ONCE = 50


_LIMIT = "its resources.max_vram is less than it needs with any method"


_LINES = text(f'{lines_of(FREE)} SELECT "user", queue_key FROM lines').bindparams(most=2**31)  # noqa: S608  no input


def tell_of_jobs_out_of_reach(tx: Transaction, cards: Collection[Card], now: dt.datetime) -> None:
    """Report waiting jobs that none of these cards could ever hold, and withdraw what does not hold any more."""
    _withdraw(tx, cards, now)
    for job_id in _may_be_beyond(tx, cards):
        tx.apart(job_id, lambda job_id=job_id: _tell_never(tx, job_id, cards, now))  # type: ignore[misc]


def _withdraw(tx: Transaction, cards: Collection[Card], now: dt.datetime) -> None:
    """Remove what was not sent yet and is no longer so."""
    early = (OutboxMessage.kind == KIND, OutboxMessage.settled_at.is_(None), OutboxMessage.tries == 0)

    def look(event: str, job_id: int) -> None:
        if _why_never(read_job(tx, job_id), cards, now) is None:
            tx.session.execute(delete(OutboxMessage).where(*early, OutboxMessage.event == event))

    for event, job_id in tx.session.execute(select(OutboxMessage.event, OutboxMessage.job_id).where(*early)).all():
        assert job_id is not None, "it is told of a job"
        tx.apart(job_id, lambda event=event, job_id=job_id: look(event, job_id))  # type: ignore[misc]


def _may_be_beyond(tx: Transaction, cards: Collection[Card]) -> Iterator[int]:
    """Waiting jobs that name a channel and may be out of reach, the oldest of each line first."""
    for user, key in tx.session.execute(_LINES).all() if cards else ():
        condition = _beyond(key, cards)
        if condition is None:
            continue
        untold = ~exists().where(OutboxMessage.event == _event_of_never())
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


def _tell_never(tx: Transaction, job_id: int, cards: Collection[Card], now: dt.datetime) -> None:
    job = read_job(tx, job_id)
    why, names = _why_never(job, cards, now), names_in(job.spec)
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


def _why_never(job: Job, cards: Collection[Card], now: dt.datetime) -> str | None:
    """Why a job can never run as things are; None: it may, or waits no more."""
    if job.status is not Status.QUEUED or job.held or job.awaits is not None:
        return None
    me = replace(waiting_of(vars(job), now), methods=tuple(Method(name) for name in job.methods))
    return out_of_reach(me, cards) if me.methods else _LIMIT


def _event_of_never() -> ColumnElement[str]:
    """What `_tell_never` names the event: a hundred members of a sweep are one message."""
    of_job, of_sweep = cast(Job.job_id, String), cast(Job.sweep_id, String)
    return case((Job.sweep_id.is_(None), "job:" + of_job + ":never"), else_="sweep:" + of_sweep + ":never")
