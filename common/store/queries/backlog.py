"""The backlog: in which line a waiting job is, which could start now, and which this version can't read."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Mapping

from sqlalchemy import or_, select
from sqlalchemy import text as sql

from loractl import __version__
from loractl.common.job.method import Method, Need, Ways, permitted_methods, within
from loractl.common.job.status import Reason, Status
from loractl.common.placement.cards import TimeLeft
from loractl.common.placement.gangs import gang_of
from loractl.common.placement.lines import QueueKey, own_key, queue_key, vram_class

from ..fleet import OLDER, waiting_of
from ..guard import become
from ..tables import FREE, WAITS, Event, Job, ready_at
from ..transaction import SKIP_LOCKED, Transaction
from .cards.nodes import read_cards
from .followers import has_left
from .lines import MOST_BEYOND, lines_of


def line_up(job: Job, requires: Mapping[str, str], now: dt.datetime) -> None:
    """Write the columns by which the claim finds a waiting job, from its needs, methods and patience."""
    patient = job.lora_until is not None and job.lora_until > now
    methods = (Method.LORA,) if patient else tuple(Method(name) for name in job.methods)
    need, ways, own = Need(lora=job.vram_lora, qlora=job.vram_qlora), Ways.read(job.gangs), job.job_id
    job.vram_needed = ways.bound(methods, need)
    job.vram_class = vram_class(job.vram_needed)
    job.queue_key = queue_key(job.priority, methods, need, ways, requires, job.user, own if job.attempt else None)


def open_methods(job: Job, now: dt.datetime) -> None:
    """Permit all methods of the job file to a job that gave way, and was to go on from its checkpoint by one alone."""
    if not job.stops:
        return
    wanted, limit = job.spec["method"], (job.spec.get("resources") or {}).get("max_vram")
    permitted = permitted_methods(Method(wanted) if isinstance(wanted, str) else [Method(one) for one in wanted])
    need = Need(lora=job.vram_lora, qlora=job.vram_qlora)
    job.methods = [one.value for one in within(permitted, need, limit) or permitted]
    line_up(job, node_labels(job), now)


def node_labels(job: Job) -> dict[str, str]:
    """Labels that the job's node must have."""
    return (job.spec.get("resources") or {}).get("node_labels") or {}


def end_patience(tx: Transaction) -> list[tuple[int, int]]:
    """Permit QLoRA to jobs that waited long enough for LoRA, and for no other job; returns (job_id, vram_class)."""
    if not tx.is_alone():
        return []
    now = tx.now()
    over = select(Job).where(WAITS, Job.lora_until.is_not(None), Job.lora_until <= now, Job.awaits.is_(None))
    first = over.order_by(Job.lora_until, Job.job_id).limit(100).with_for_update(**SKIP_LOCKED)
    changed = []
    for job in tx.session.scalars(first):
        job.lora_until = None
        tx.session.flush()  # also where the rest can't be done: such a row is looked at once
        if tx.apart(job.job_id, lambda job=job: _end_patience(tx, job, now)):  # type: ignore[misc]
            changed.append((job.job_id, job.vram_class))
    return changed


def _end_patience(tx: Transaction, job: Job, now: dt.datetime) -> None:
    line_up(job, node_labels(job), now)
    tx.tell(job.job_id, None, "patience", "waited long enough for LoRA: QLoRA will do now")


def waiting_classes(tx: Transaction, classes: Iterable[int]) -> set[int]:
    """The given VRAM classes that have a job to claim now."""
    sizes, ready = list(classes), select(Job.vram_class).where(ready_at(tx.now())).order_by(Job.vram_class).limit(1)
    if not sizes:
        return set()
    # A range in order: asked for one that is equal, PostgreSQL walks over all rows and expects to meet it soon.
    first = (ready.where(Job.vram_class >= size, Job.vram_class <= size).scalar_subquery() for size in sizes)
    return set(tx.session.execute(select(*first)).one()) - {None}


_FIRST_UNHELD = sql(
    f"{lines_of(FREE)}"  # noqa: S608  no input
    " SELECT jobs.queue_key, jobs.checkpoint_s FROM lines JOIN jobs ON jobs.job_id = lines.job_id WHERE gangs IS NULL"
).bindparams(most=MOST_BEYOND)


def has_unfinished(
    tx: Transaction, largest: int | None, labels: Mapping[str, str], time_left: TimeLeft | None = None
) -> bool:
    """Whether a job runs, or waits, is not held, and would fit into `largest` bytes of a box with these labels.
    None: the box takes no jobs. A job that the fleet's round is to release counts, whatever it needs.

    `time_left`: of a worker that stops by itself. It waits neither for jobs that run elsewhere nor for those for which
    that is too short.
    """
    running = select(Job.job_id).where(Job.status == Status.RUNNING).limit(1)
    if time_left is not None:
        running = running.where(Job.node.startswith(f"{time_left.host}:", autoescape=True))
    runs = tx.session.scalar(running) is not None
    if runs or largest is None:
        return runs
    for row in tx.session.execute(_FIRST_UNHELD):
        key = QueueKey.parse(row.queue_key)
        in_time = time_left is None or time_left.suffices(row.checkpoint_s)
        if in_time and key.bound <= largest and key.requires <= labels.items():
            return True
    return _gang_waits(tx, largest, labels, time_left) or has_left(tx)


def _gang_waits(tx: Transaction, largest: int, labels: Mapping[str, str], time_left: TimeLeft | None) -> bool:
    """Whether a job waits that several cards may share, and that one card or several could hold."""
    fits = or_(Job.vram_needed.is_(None), Job.vram_needed <= largest)
    now = tx.now()
    jobs = tx.session.scalars(select(Job).where(sql(FREE), sql("gangs IS NOT NULL"), fits)).all()
    cards = read_cards(tx.session, now) if jobs else []
    forms = (form for job in jobs if (form := waiting_of(vars(job), now)).requires <= labels.items())
    if time_left is not None:
        forms = (form for form in forms if time_left.suffices(form.checkpoint_s))
    return any(
        (form.alone and (form.least is None or form.least <= largest)) or gang_of(form, cards) is not None
        for form in forms
    )


NEWER_WORKER_DELAY_S = 60.0
"""How long before a job that only a newer worker can read is looked at again."""

NEWER_WORKER_AVOIDS_S = 600.0
"""How long it then keeps off this one's box, if another could hold it: the rule might prefer this box each time."""


def set_aside(tx: Transaction, job: Job, what: str, host: str, now: dt.datetime) -> None:
    """End a locked, waiting job as bad_spec. If a newer client wrote it, leave it to a newer worker.

    `what`: what can't be read of it; `host`: the box whose worker can't.
    """
    what = f"this worker's loractl does not understand {what}"
    if job.version is not None and _release(job.version) > _release(__version__):
        job.not_before = now + dt.timedelta(seconds=NEWER_WORKER_DELAY_S)
        until = now + dt.timedelta(seconds=NEWER_WORKER_AVOIDS_S)
        job.avoids = {**(job.avoids or {}), host: {"reason": OLDER, "until": until.isoformat()}}
        job.queue_key = own_key(job.queue_key, job.job_id)  # in a line with others nobody reads what it avoids
        job.message = f"written by loractl {job.version}, a worker with {__version__} can't read it"
        _tell_once(tx, job.job_id, f"{what}; left to a worker with {job.version}")
        return
    become(job, Status.FAILED)
    job.reason, job.message, job.ended_at, job.held = Reason.BAD_SPEC, what, now, False
    tx.tell(job.job_id, None, job.status.value, what)


def _tell_once(tx: Transaction, job_id: int, text: str) -> None:
    """A worker looks at such a job every minute: one line for each that has another reason is enough."""
    said = select(Event.event_id).where(Event.job_id == job_id, Event.kind == "version", Event.text == text).limit(1)
    if tx.session.scalar(said) is None:
        tx.tell(job_id, None, "version", text)


def _release(version: str) -> tuple[int, ...]:
    """0.2.1 as (0, 2, 1), without what follows the numbers."""
    numbers = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
