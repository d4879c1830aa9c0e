"""Packs as the rule sees them: who trains in an open host, and what a waiting job would be as one of them."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session, load_only

from loractl.common.job.adjustment import Adjustment, adjusted
from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.common.placement.cards import Card, WarmBase
from loractl.common.placement.hosts import Newcomer, base_key, open_bases, why_alone
from loractl.common.placement.lines import Waiting
from loractl.common.placement.pack_rule import PackedJob, PassLaw
from loractl.common.store.tables import TrainerHost

from ...tables import Attempt, Job

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec

BYTES_A_TOKEN = 1.0
"""Of rows whose tokens submit has not estimated: no token is shorter."""


_Rows = tuple[str, int, str, bool]
"""The rows that a job learns from, and what of its spec says how many of their tokens: their data, where they are cut
off, what becomes of those that are longer, and whether they are packed."""


@dataclass(kw_only=True)
class Packs:
    """The fleet's cards with the members of their open hosts, and how waiting jobs are asked for theirs."""

    session: Session
    cards: list[Card]
    row_tokens: dict[_Rows, float] = field(default_factory=dict)  # measured, of a row
    in_other_form: dict[int, JobSpec] = field(default_factory=dict)  # waiting jobs, as if their job files were these
    _known: dict[int, Newcomer | None] = field(default_factory=dict)
    _rows: dict[int, Job] = field(default_factory=dict)

    def read_rows(self, jobs: Sequence[Waiting]) -> None:
        """Read at once the rows of waiting jobs that will be asked for."""
        asked = (Job.spec, Job.data, Job.adjustment, Job.reason, Job.sweep_id)  # a row has sixty columns
        rows = self.session.scalars(
            select(Job).options(load_only(*asked)).where(Job.job_id.in_([job.job_id for job in jobs]))
        )
        self._rows |= {row.job_id: row for row in rows}

    def newcomer(self, job: Waiting) -> Newcomer | None:
        """What a waiting job would be as a member; None: it trains alone."""
        if job.job_id not in self._known:
            self._known[job.job_id] = self._read(job.job_id)
        return self._known[job.job_id]

    def _read(self, job_id: int) -> Newcomer | None:
        row = self._rows.get(job_id) or self.session.get(Job, job_id)
        spec = None if row is None else self.in_other_form.get(job_id) or runs_as(row)
        if row is None or spec is None:
            return None
        keys = {method: key for method in Method if (key := key_of(row, spec, method)) is not None}
        training, rows = spec.training, _data(row).get("rows") if spec.dataset.is_one_whole else None
        steps = training.max_steps
        if steps is None and isinstance(rows, int) and training.num_train_epochs is not None:
            steps = math.ceil(math.ceil(rows / training.effective_batch) * training.num_train_epochs)
        packed = PackedJob(
            tokens=tokens_of(spec, self.row_tokens.get(_rows(row, spec)), _data(row)),
            job_id=job_id,
            passes=None if steps is None else steps * training.gradient_accumulation_steps,
            sweep=_sweep(row),
            limit_seconds=spec.resources.time_limit,
        )
        return Newcomer(keys=keys, packed=packed, alone=_why_alone(row, spec) or "")


def key_of(row: Job, spec: JobSpec, method: Method) -> str | None:
    """The key of a waiting job's base; None: it has a trainer of its own."""
    return base_key(spec, method) if _why_alone(row, spec) is None else None


def _why_alone(row: Job, spec: JobSpec) -> str | None:
    """Why a waiting job trains in no host. One whose host was lost is tried alone."""
    if row.reason is Reason.HOST_LOST:
        return "it is tried alone, since the trainer that it shared was lost"
    why = why_alone(spec)
    return None if why is None else f"it trains alone ({why})"


def tokens_of(spec: JobSpec, row_tokens: float | None, data: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch: measured on the same rows, else as submit has estimated them, else what their bytes
    hold at most; never more than max_length permits.

    `data`: what is known of the rows where they are stored.
    """
    length, rows, size = spec.dataset.max_length, data.get("rows"), data.get("bytes")
    tokens = data.get("tokens", size / BYTES_A_TOKEN if isinstance(size, int) else None)
    if row_tokens is None and isinstance(rows, int) and isinstance(tokens, (int, float)) and rows > 0:
        row_tokens = tokens / rows
    if row_tokens is not None and not spec.training.packing:
        length = min(length, max(1, round(row_tokens)))
    return spec.training.per_device_train_batch_size * length


def runs_as(row: Job) -> JobSpec | None:
    """The job's spec as it runs; None: this version can't read it."""
    from pydantic import ValidationError

    from loractl.common.job.spec import JobSpec

    try:
        return adjusted(JobSpec.model_validate(row.spec), Adjustment(**(row.adjustment or {})))
    except (ValidationError, TypeError):
        return None


def read_packs(session: Session, cards: Sequence[Card], now: dt.datetime) -> Packs:
    """The cards with what the rule must know of those that train in their open hosts. A host with a member that this
    version can't read takes no more."""
    bases = [base for card in cards for base in open_bases(card)]
    packs = Packs(session=session, cards=list(cards))
    if not bases:
        return packs
    marks = [base.host for base in bases]
    kept = session.execute(select(TrainerHost.host, TrainerHost.law).where(TrainerHost.host.in_(marks))).all()
    laws = {row.host: row.law for row in kept}
    there = (Attempt.host.in_(marks), Attempt.ended_at.is_(None))
    columns = select(Attempt.host, Job, Attempt.promised_at).join(Attempt, Attempt.job_id == Job.job_id)
    inside: dict[str, list[_Inside]] = {}
    for mark, job, promised in session.execute(columns.where(*there).order_by(Job.job_id)):
        inside.setdefault(mark or "", []).append((job, promised))
    known = {
        base.host: _known(base, laws.get(base.host), inside.get(base.host, []), now, packs.row_tokens) for base in bases
    }
    packs.cards = [replace(c, hosts=tuple(known.get(base.host, base) for base in c.hosts)) for c in cards]
    return packs


_Inside = tuple[Job, dt.datetime | None]
"""A job that trains in a host, and when it would end as of the first join that slows it down."""


def _known(
    base: WarmBase,
    kept: dict[str, Any] | None,
    inside: Sequence[_Inside],
    now: dt.datetime,
    row_tokens: dict[_Rows, float],
) -> WarmBase:
    """The base with its law and members; what a row of their data has, as measured, goes into `row_tokens`."""
    law = PassLaw.from_json(kept, quantised=base.method is Method.QLORA)
    read = [(row, spec, promised) for row, promised in inside if (spec := runs_as(row)) is not None]
    if len(read) < len(inside):
        return replace(base, open=False)
    micro_batch = law.micro_batch
    batches = [spec.training.per_device_train_batch_size for _, spec, _ in read]
    tokens = None if micro_batch is None or not batches else micro_batch * len(batches) / sum(batches)
    if tokens is not None and len(names := {_rows(row, spec) for row, spec, _ in read}) == 1:  # else it is a mean
        row_tokens[names.pop()] = tokens
    members = tuple(_member(row, spec, promised, tokens, now) for row, spec, promised in read)
    return replace(base, law=law, members=members)


def _member(
    row: Job, spec: JobSpec, promised: dt.datetime | None, row_tokens: float | None, now: dt.datetime
) -> PackedJob:
    limit, began = spec.resources.time_limit, row.started_at or now
    return PackedJob(
        tokens=tokens_of(spec, row_tokens, _data(row)),
        job_id=row.job_id,
        sweep=_sweep(row),
        left_seconds=row.eta_seconds,
        limit_seconds=None if limit is None else limit - (now - began).total_seconds(),
        promised_seconds=row.eta_seconds if promised is None else (promised - now).total_seconds(),
    )


def _sweep(row: Job) -> str | None:
    return None if row.sweep_id is None else str(row.sweep_id)


def _data(row: Job) -> Mapping[str, Any]:
    """What is known of its training rows, where they are stored."""
    found: Mapping[str, Any] = row.data.get("path") or {}
    return found


def _rows(row: Job, spec: JobSpec) -> _Rows:
    data, training = spec.dataset, spec.training
    rows = str(_data(row).get("sha256") or data.path)
    if not data.is_one_whole:
        rows += f" {data.split} {data.more}"
    return rows, data.max_length, data.on_overflow.value, training.packing
