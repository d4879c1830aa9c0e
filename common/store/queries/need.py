"""A job's need as it changes after the submit: a better plan lowers it, running out of memory raises it, and a newer
version whose steps take other memory plans it again."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import Select, bindparam, func, select, update
from sqlalchemy import text as sql

from loractl.common.job.method import Method, Need, Roomy, RoomyForm, SharedNeed, Ways, within
from loractl.common.job.status import Reason, Status
from loractl.common.memory.correction import ENGINE, FACTOR_BOUNDS, GROWTH, Measured
from loractl.common.placement.gangs import gang_of
from loractl.common.units import GIB, gib

from ..columns import part_of
from ..fleet import waiting_of
from ..records import Claim
from ..shapes import MOST_BYTES
from ..tables import ON_SEVERAL_CARDS, WAITS, Attempt, AttemptShare, Job, Node, peak_of
from ..transaction import SKIP_LOCKED, Transaction
from .backlog import line_up, node_labels, open_methods
from .cards.nodes import read_cards
from .jobs import read_job, read_measured

if TYPE_CHECKING:
    from loractl.common.memory.fit import MemoryPlan

AT_ONCE = 100
"""Jobs that are planned again in one go."""

OUTSIDER_SHARE = 0.85
"""An attempt that ran out of memory below this share of its reservation lacked what another program had taken, or could
not be given what it asked for at once: it was, where the OUTSIDER_LIMIT-th in a row ends so."""

OUTSIDER_LIMIT = 3


def plan_again(
    tx: Transaction, claim: Claim, planned: Need, roomy: Roomy | None = None, running: int | None = None
) -> None:
    """Take a better plan for later attempts. What this one reserves beyond it goes back to the card.

    `roomy`: the better plan without recomputing; `running`: this attempt's own plan where it does not recompute. What a
    job on several cards plans is not what it needs of one.
    """
    if claim.shares:
        return
    job = read_job(tx, claim.job_id)
    old, new = job.planned, vars(planned)
    known = {"lora": job.vram_lora, "qlora": job.vram_qlora}
    for name, size in new.items():
        before = old.get(name)
        if size is not None:  # what was learned from measured peaks holds for the better plan too
            learned = known[name] / before if known[name] and before else 1.0
            known[name] = min(
                int(size * max(learned, FACTOR_BOUNDS[0])), MOST_BYTES
            )  # the row's figures are the submitter's word
    job.planned, job.vram_lora, job.vram_qlora = new, known["lora"], known["qlora"]
    if roomy is not None:
        job.roomy = _as_learned(Roomy.read(job.roomy), roomy).as_json()
    line_up(job, node_labels(job), tx.now())  # cards that are now large enough find it there once it waits again
    size, attempt = known[claim.method.value], tx.session.get(Attempt, (claim.job_id, claim.attempt))
    plan = new.get(claim.method.value)
    if running is not None and claim.vram_planned and claim.vram_reserved:
        size, plan = min(int(running * claim.vram_reserved / claim.vram_planned), MOST_BYTES), running
    elif attempt is not None and attempt.roomy:
        plan = attempt.vram_planned  # out of memory took the room back: its peak is still the larger size's
    if claim.vram_planned is not None or job.planned.get(claim.method.value) is not None:
        own = (Attempt.job_id == claim.job_id) & (Attempt.attempt == claim.attempt)
        tx.session.execute(update(Attempt).where(own).values(vram_planned=plan))
    if size is not None and job.vram_reserved is not None and size < job.vram_reserved:
        text = f"planned {gib(size)} GiB from the data's own lengths, {gib(job.vram_reserved)} were reserved"
        tx.tell(job.job_id, claim.attempt, "planned", text)
        job.vram_reserved = size


def _as_learned(before: Roomy, now: Roomy) -> Roomy:
    """The better plan, corrected as the one before was by what was learned from measured peaks."""

    def corrected(method: Method) -> tuple[RoomyForm, ...]:
        factor = next((form.bytes / form.planned for form in before.of(method)), 1.0)
        return tuple(
            replace(form, bytes=max(1, min(int(form.planned * factor), MOST_BYTES))) for form in now.of(method)
        )

    return Roomy(lora=corrected(Method.LORA), qlora=corrected(Method.QLORA))


LEAST_SHARE = 0.8
"""Of what a base alone was measured to take with a method: a job on it needs at least this much. Contexts differ."""


def _least_base() -> Select[int | None]:
    size = select(func.min(Attempt.base_bytes)).correlate(Job)
    size = size.where(Attempt.job_id == Job.job_id, Attempt.method == bindparam("method"))
    size = size.where(Attempt.device_kind == "nvml", ~ON_SEVERAL_CARDS)  # each has a part of the base
    ran = select(size.scalar_subquery().label("size")).where(sql("attempt > 0"), Job.base_model == bindparam("base"))
    some = ran.order_by(Job.job_id.desc()).limit(AT_ONCE).subquery()
    return select(func.min(some.c.size))


_LEAST_BASE = _least_base()  # once: a claim would take longer to make it than to run it


def raise_least(tx: Transaction, job: Job, method: Method, need: int) -> bool:
    """Raise a need that is below what its base alone is known to take, since a row's figures are the submitter's word.
    False: it is not, or nothing is known of the base. An attempt's peak says little: it grows with the rows."""
    base = tx.session.scalar(_LEAST_BASE, {"method": method.value, "base": job.base_model}) or 0
    if need >= (least := int(LEAST_SHARE * base)):
        return False
    setattr(job, f"vram_{method.value}", least)
    line_up(job, node_labels(job), tx.now())
    known = f"its base alone was measured to take {gib(base)} GiB with {method.value}"
    tx.tell(job.job_id, None, "planned", f"needs {gib(least)} GiB, not {gib(need)}: {known}")
    return True


def replan_outdated(read: Callable[[], Transaction], write: Callable[[], Transaction]) -> list[int]:
    """Plan waiting jobs whose plans are of an older engine, if their bases are on this machine; returns the jobs."""
    with read() as tx:
        here = list(itertools.islice(_plannable(tx), AT_ONCE))
        jobs = tx.session.scalars(select(Job).where(Job.job_id.in_(here)).order_by(Job.job_id)).all() if here else []
    plans = [(job.job_id, *found) for job in jobs if (found := _plan(job, read)) is not None]
    done: list[int] = []
    with write() as tx:
        for job_id, plan, ways in plans:
            tx.apart(job_id, partial(_take_plan, tx, job_id, plan, ways, done))
    return done


_OLD_BASES = sql(
    "WITH RECURSIVE bases(b) AS ("
    " SELECT min(base_model) FROM jobs WHERE status = 'queued'"
    " UNION ALL"
    " SELECT (SELECT min(base_model) FROM jobs WHERE status = 'queued' AND base_model > bases.b) FROM bases"
    " WHERE bases.b IS NOT NULL"
    ") SELECT b FROM bases WHERE"
    " EXISTS (SELECT 1 FROM jobs WHERE status = 'queued' AND base_model = bases.b AND engine < :engine)"
)
"""The bases of waiting jobs whose plans are of an older engine, each by a step or two in an index."""


def _plannable(tx: Transaction) -> Iterator[int]:
    """Jobs whose bases are on this machine. Of each base the oldest plans are looked at, and no more than are planned
    in one go: others come once these have been planned, or have started."""
    from loractl.common.memory.config import read_shape

    revision = part_of(Job.spec, "revision")
    old = select(Job.job_id, revision.label("revision")).where(WAITS, Job.engine < ENGINE)
    for base in tx.session.scalars(_OLD_BASES, {"engine": ENGINE}).all():
        some = tx.session.execute(old.where(Job.base_model == base).order_by(Job.engine, Job.job_id).limit(AT_ONCE))
        rows = some.all()
        here = {name for name in {row.revision for row in rows} if read_shape(base, name) is not None}
        yield from (row.job_id for row in rows if row.revision in here)


def _plan(job: Job, read: Callable[[], Transaction]) -> tuple[MemoryPlan, Ways] | None:
    """The job's plan as submit would make it; None for a row that this version can't read."""
    from pydantic import ValidationError

    from loractl.common.job.spec import JobSpec
    from loractl.common.memory.fit import memory_plan, plan_ways
    from loractl.common.memory.step import Stack

    try:
        spec = JobSpec.model_validate(job.spec)
    except ValidationError:
        return None
    with read() as tx:
        kinds = set(tx.session.scalars(select(Node.kind).distinct()))

    def measured(key: str, family: str | None) -> list[Measured]:
        with read() as tx:
            return read_measured(tx, key, family)

    plan = memory_plan(spec, job.data, Stack(on_gpu=kinds != {"cpu"}), measured)  # as submit does it
    return plan, plan_ways(spec, [Method(name) for name in job.methods], plan.planned, plan.need)


def _take_plan(tx: Transaction, job_id: int, plan: MemoryPlan, ways: Ways, done: list[int]) -> None:
    """Write the plan if the job still waits for one. One that has run keeps what its rows' own lengths have taught."""
    job = tx.session.get(Job, job_id, populate_existing=True, with_for_update=SKIP_LOCKED)
    if job is None or job.status is not Status.QUEUED or job.engine >= ENGINE:
        return
    before, pick = Need(lora=job.vram_lora, qlora=job.vram_qlora), _lesser if job.attempt else _newer
    job.vram_lora, job.vram_qlora = pick(before.lora, plan.need.lora), pick(before.qlora, plan.need.qlora)
    job.planned = {name: pick(job.planned.get(name), size) for name, size in vars(plan.planned).items()}
    job.need_key, job.family, job.engine = plan.need_key, plan.family, ENGINE
    job.gangs, job.roomy = ways.as_json(), plan.roomy.as_json()
    line_up(job, node_labels(job), tx.now())
    now = Need(lora=job.vram_lora, qlora=job.vram_qlora)
    if told := [f"{name} {gib(size)} GiB" for name, size in vars(now).items() if size and size != vars(before)[name]]:
        tx.tell(job_id, None, "planned", f"planned again for this version's steps: {', '.join(told)}")
    done.append(job_id)


def _newer(before: int | None, now: int | None) -> int | None:
    return now


def _lesser(before: int | None, now: int | None) -> int | None:
    return min((size for size in (before, now) if size is not None), default=None)


def need_more(tx: Transaction, job: Job, card: str, gave: int, message: str, now: dt.datetime) -> tuple[bool, str]:
    """After out-of-memory on a card: raise what the job needs beyond the `gave` bytes that it had there. False when no
    card has more.

    Returns the given message with the consequence added.
    """
    attempt = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    method = Method(job.method or Method.LORA.value)
    assert attempt is not None
    peak = peak_of(attempt)
    shares = select(AttemptShare).where(AttemptShare.job_id == job.job_id, AttemptShare.attempt == job.attempt)
    cards = len(tx.session.scalars(shares).all())
    planned = 0 if cards else Need(lora=job.vram_lora, qlora=job.vram_qlora).of(method) or 0
    if planned <= gave and _may_lack_what_others_took(tx, attempt, gave):
        had = f"it held {gib(peak)} of its {gib(gave)} GiB"
        return True, f"{message}; {had}, so another program seems to have taken memory of {card}"
    open_methods(job, now)
    if cards:
        return _each_needs_more(tx, job, cards, gave, message, now)
    largest = _largest(tx)
    node = tx.session.get(Node, job.node)
    # A plan says nothing about a processor's RAM, so the method is not tried again.
    more = largest + 1 if node is not None and node.kind == "cpu" else int(gave * GROWTH)
    needs = {Method.LORA: job.vram_lora, Method.QLORA: job.vram_qlora}
    needs[method] = max(needs[method] or 0, more, int(peak * 1.05))
    job.vram_lora, job.vram_qlora = needs[Method.LORA], needs[Method.QLORA]
    limit = min(largest, job.spec.get("resources", {}).get("max_vram") or largest)
    need = Need(lora=job.vram_lora, qlora=job.vram_qlora)
    if not within([Method(name) for name in job.methods], need, limit):
        why = "no card of the fleet has more" if limit == largest else "its resources.max_vram allows no more"
        return False, f"{message}; {method.value} had {gib(gave)} GiB, and {why}"
    job.lora_until = None
    job.adjustment = None  # more memory, or another method: the job's own batch may fit
    line_up(job, node_labels(job), now)
    return True, f"{message}; it waits for {gib(job.vram_needed)} GiB now"


def _may_lack_what_others_took(tx: Transaction, attempt: Attempt, gave: int) -> bool:
    before = select(Attempt).where(Attempt.job_id == attempt.job_id, Attempt.attempt < attempt.attempt)
    last = tx.session.scalars(before.order_by(Attempt.attempt.desc()).limit(OUTSIDER_LIMIT - 1)).all()
    same = [one for one in last if one.reason is Reason.OUT_OF_MEMORY and _held_less(one, one.vram_reserved or 0)]
    return _held_less(attempt, gave) and len(same) < OUTSIDER_LIMIT - 1


def _held_less(attempt: Attempt, gave: int) -> bool:
    return attempt.device_kind == "nvml" and 0 < peak_of(attempt) < OUTSIDER_SHARE * gave


def _each_needs_more(
    tx: Transaction, job: Job, cards: int, gave: int, message: str, now: dt.datetime
) -> tuple[bool, str]:
    """Raise the need of a job on several cards, where each card gave `gave` bytes; by at least a GiB, since a need of
    one byte would never grow."""
    method, ways = Method(job.method or Method.LORA.value), Ways.read(job.gangs)
    more = max(int(gave * GROWTH), gave + GIB)

    def raised(way: SharedNeed) -> SharedNeed:
        size = way.need.of(method)
        if way.cards != cards or size is None or size > gave:
            return way
        need = Need(**{**vars(way.need), method.value: more})
        return replace(way, need=need)

    job.gangs = replace(ways, gangs=tuple(raised(way) for way in ways.gangs)).as_json()
    job.adjustment = None
    line_up(job, node_labels(job), now)
    form = waiting_of(vars(job), now)
    some = [replace(card, open=True) for card in read_cards(tx.session, now)]
    alone = form.alone and form.least is not None and form.least <= _largest(tx)
    if not alone and gang_of(form, some) is None:
        return False, f"{message}; each of {cards} cards had {gib(gave)} GiB, and no box has cards with more"
    return True, f"{message}; it waits for {gib(more)} GiB of each of {cards} cards now"


def _largest(tx: Transaction) -> int:
    """Bytes of the fleet's largest card; of its largest processor where it has no card."""
    nodes = tx.session.scalars(select(Node)).all()
    gpus = [node for node in nodes if node.kind != "cpu"]
    return max((node.usable for node in gpus or nodes), default=0)
