"""The backlog: in which line a waiting job is, and which could start now."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping

from sqlalchemy import or_, select
from sqlalchemy import text as sql

from loractl.common.job.method import Method, Need, Ways
from loractl.common.job.status import Status
from loractl.common.placement.cards import TimeLeft, time_unmeasured
from loractl.common.placement.gangs import gang_of
from loractl.common.placement.lines import QueueKey, queue_key, vram_class

from ..columns import MOST_SECONDS
from ..fleet import waiting_of
from ..tables import WAITS, Job, ready_at
from ..transaction import SKIP_LOCKED, Transaction
from .cards.nodes import read_cards
from .lines import EVERY_KEY


def line_up(job: Job, requires: Mapping[str, str], now: dt.datetime) -> None:
    """Write the columns by which the claim finds a waiting job, from its needs, methods and patience."""
    patient = job.lora_until is not None and job.lora_until > now
    methods = (Method.LORA,) if patient else tuple(Method(name) for name in job.methods)
    job.vram_needed = Ways.read(job.gangs).bound(methods, Need(lora=job.vram_lora, qlora=job.vram_qlora))
    job.vram_class = vram_class(job.vram_needed)
    job.queue_key = queue_key(job.priority, job.vram_needed, requires, job.user)


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


_OF_KEY = (
    "status = 'queued' AND queue_key = keys.k AND NOT held AND awaits IS NULL AND gangs IS NULL"
    " AND coalesce(checkpoint_s, :unmeasured) <= :left"
)
_FITTING = sql(
    f"{EVERY_KEY} SELECT k FROM keys WHERE"  # noqa: S608  no input
    f" coalesce((SELECT 1 FROM jobs WHERE {_OF_KEY} AND vram_needed <= :largest LIMIT 1),"
    f" (SELECT 1 FROM jobs WHERE {_OF_KEY} AND vram_needed IS NULL LIMIT 1)) = 1"
)
"""Keys of the lines that hold a waiting single-card job small enough for this many bytes."""


def has_unfinished(
    tx: Transaction, largest: int | None, labels: Mapping[str, str], time_left: TimeLeft | None = None
) -> bool:
    """Whether a job runs, or waits, is not held, and would fit into `largest` bytes of a box with these labels.
    None: the box takes no jobs.

    `time_left`: of a worker that stops by itself. It waits neither for jobs that run elsewhere nor for those for which
    that is too short.
    """
    running = select(Job.job_id).where(Job.status == Status.RUNNING).limit(1)
    if time_left is not None:
        running = running.where(Job.node.startswith(f"{time_left.host}:", autoescape=True))
    runs = tx.session.scalar(running) is not None
    if runs or largest is None:
        return runs
    time = {"left": MOST_SECONDS, "unmeasured": 0.0}
    if time_left is not None:
        time = {"left": time_left.seconds, "unmeasured": time_unmeasured(time_left.window_s)}
    keys = tx.session.scalars(_FITTING, {"largest": largest, **time}).all()
    fits = any(QueueKey.parse(key).requires <= labels.items() for key in keys)
    return fits or _gang_waits(tx, largest, labels, time_left)


def _gang_waits(tx: Transaction, largest: int, labels: Mapping[str, str], time_left: TimeLeft | None) -> bool:
    """Whether a job waits that several cards may share, and that one card or several could hold."""
    fits = or_(Job.vram_needed.is_(None), Job.vram_needed <= largest)
    now = tx.now()
    jobs = tx.session.scalars(select(Job).where(ready_at(now), sql("gangs IS NOT NULL"), fits)).all()
    cards = read_cards(tx.session, now) if jobs else []
    forms = (form for job in jobs if (form := waiting_of(vars(job), now)).requires <= labels.items())
    if time_left is not None:
        forms = (form for form in forms if time_left.suffices(form.checkpoint_s))
    return any(
        (form.alone and (form.least is None or form.least <= largest)) or gang_of(form, cards) is not None
        for form in forms
    )
