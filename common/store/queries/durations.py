"""How long jobs took, and what that says of those that wait."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import bindparam, select, union, update
from sqlalchemy import text as sql

from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Status
from loractl.common.placement.duration import (
    Extent,
    Forecast,
    TimedRun,
    TimeMeasured,
    Undone,
    fastest,
    forecast,
)

from ..tables import ON_SEVERAL_CARDS, WAITS, Attempt, Job, Node
from ..transaction import SKIP_LOCKED, Transaction

READ = 50
"""The most jobs of a base, and of a user, and the most attempts of all, that a prediction is made of."""

REFRESHED = 100
"""The most waiting jobs that are predicted again as an attempt on their base ends."""

SURPRISING = 1.25
"""An attempt that took so many times what was predicted, or what was predicted so many times as long as it took, lets
the waiting jobs of its base be predicted again. Of what is nearer, the next submit and each start make use alone."""

MEASURED = 1000
"""The most attempts by which predictions are judged, the newest."""


def read_timed(tx: Transaction, base_model: str, user: str) -> list[TimedRun]:
    """Attempts whose time was measured, the newest first: of the newest jobs on the base and of the user, and the
    newest of all."""
    job_ids = select(Job.job_id).order_by(Job.job_id.desc()).limit(READ)
    of_base = job_ids.where(sql("attempt > 0"), Job.base_model == base_model).subquery()
    of_user = job_ids.where(Job.user == user).subquery()
    newest = select(Attempt.job_id).order_by(Attempt.started_at.desc()).limit(READ).subquery()
    chosen = union(*(select(part.c.job_id) for part in (of_base, of_user, newest))).subquery()
    columns = (
        Job.user, Job.base_model, Job.need_key, Job.extent, Attempt.method, Attempt.device_name, Attempt.prepared_s,
        Attempt.trained_s, Attempt.trained_steps, Attempt.started_at, Attempt.ended_at, Attempt.reason,
        Attempt.resumed_from_step,
    )  # fmt: skip
    query = select(*columns).join(Attempt, Attempt.job_id == Job.job_id).join(chosen, chosen.c.job_id == Job.job_id)
    query = query.where(Attempt.ended_at.is_not(None), ~ON_SEVERAL_CARDS).order_by(Attempt.started_at.desc())
    return [
        TimedRun(
            user=row.user,
            base_model=row.base_model,
            method=row.method,
            need_key=row.need_key,
            device=row.device_name or "unknown",
            extent=Extent.read(row.extent),
            prepared_s=row.prepared_s,
            trained_s=row.trained_s,
            steps=row.trained_steps,
            seconds=_between(row.started_at, row.ended_at) if row.reason is Reason.OK else None,
            resumed=bool(row.resumed_from_step),
        )
        for row in tx.session.execute(query)
    ]


def _between(start: dt.datetime, end: dt.datetime) -> float:
    return (end - start).total_seconds()


def read_devices(tx: Transaction) -> list[str]:
    """The models of the fleet's cards."""
    return sorted(tx.session.scalars(select(Node.device_name).distinct()))


class Forecasts:
    """Predictions of one transaction. What was measured is read once for each base and user."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._devices: list[str] | None = None
        self._runs: dict[tuple[str, str], list[TimedRun]] = {}

    def of(self, job: Job, method: str, device: str) -> Forecast:
        """For an attempt on a card of this model."""
        return forecast(undone(job, method), device, self._of(job))

    def left_s(self, job: Job) -> float:
        """Seconds that are left of the job on the card on which it is fastest, by the method that it prefers."""
        if self._devices is None:
            self._devices = read_devices(self._tx)
        return fastest(undone(job, _preferred(job)), self._devices, self._of(job)).seconds

    def _of(self, job: Job) -> Sequence[TimedRun]:
        key = job.base_model, job.user
        if key not in self._runs:
            self._runs[key] = read_timed(self._tx, *key)
        return self._runs[key]


def _preferred(job: Job) -> str:
    return str(next(iter(job.methods), Method.LORA))


def undone(job: Job, method: str) -> Undone:
    """What is left of a job, from its row."""
    return Undone(
        user=job.user,
        base_model=job.base_model,
        method=method,
        need_key=job.need_key,
        extent=Extent.read(job.extent),
        step=(job.checkpoint or {}).get("step") or 0,
        steps=job.total_steps,
    )


def predict_again(tx: Transaction, job: Job) -> None:
    """As an attempt ends: what is left of its job, and of others that wait on its base if its length was a surprise."""
    tx.session.flush()  # the attempt's end is part of what was measured
    forecasts = Forecasts(tx)
    if job.status is not Status.SUCCEEDED:
        job.work_left_s = forecasts.left_s(job)
    if not _surprises(tx, job):
        return
    first = select(Job).where(WAITS, Job.base_model == job.base_model, Job.job_id != job.job_id).order_by(Job.job_id)
    rows = tx.session.scalars(first.limit(REFRESHED).with_for_update(**SKIP_LOCKED)).all()
    told = [{"number": row.job_id, "seconds": forecasts.left_s(row)} for row in rows]
    if told:
        number, seconds = bindparam("number"), bindparam("seconds")
        change = update(Job.__table__).where(Job.__table__.c.job_id == number).values(work_left_s=seconds)
        tx.session.connection().execute(change, told)


def _surprises(tx: Transaction, job: Job) -> bool:
    """Whether the attempt that has just ended trained, and its prediction was far off or there was none."""
    row = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    if row is None or row.ended_at is None or not row.trained_steps:
        return False
    if row.seconds_predicted is None:
        return True
    took = _between(row.started_at, row.ended_at)
    return row.reason is Reason.OK and not 1 / SURPRISING < took / max(row.seconds_predicted, 1e-3) < SURPRISING


def read_predicted(tx: Transaction, limit: int = MEASURED) -> list[TimeMeasured]:
    """Attempts that came to a good end and had a prediction, the newest first."""
    columns = (
        Attempt.device_name, Attempt.predicted_by, Attempt.seconds_predicted, Attempt.started_at, Attempt.ended_at,
    )  # fmt: skip
    query = select(*columns).where(Attempt.reason == Reason.OK, Attempt.predicted_by.is_not(None))
    return [
        TimeMeasured(
            device_name=row.device_name or "unknown",
            basis=row.predicted_by,
            predicted_s=row.seconds_predicted,
            took_s=_between(row.started_at, row.ended_at),
        )
        for row in tx.session.execute(query.order_by(Attempt.started_at.desc()).limit(limit))
    ]
