"""How long jobs took, and what that says of those that wait."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import CompoundSelect, bindparam, select, union_all
from sqlalchemy import text as sql

from loractl.common.job.status import Reason, Status
from loractl.common.placement.duration import (
    Basis,
    Extent,
    Speeds,
    TimedRun,
    TimeMeasured,
    Undone,
    forecast,
    measured_contention,
    shortest,
    slowed,
)

from ..columns import word
from ..tables import ON_SEVERAL_CARDS, WAITS, Attempt, CardContention, Job, Node
from ..transaction import SKIP_LOCKED, Transaction

READ = 50
"""The most attempts on a base, and the most of all, that a prediction is made of."""

RECENT = dt.timedelta(days=90)
"""Attempts on other bases say for this long how fast a card is."""

REFRESHED = 100
"""The most waiting jobs that are predicted again as an attempt on their base ends."""

SURPRISING = 1.25
"""If a prediction was off by this factor, either way, the waiting jobs on that base are predicted again. A smaller
error only affects jobs that are submitted later."""

MEASURED = 1000
"""The most attempts by which predictions are judged, the newest."""


def _timed() -> CompoundSelect[Any]:
    columns = (
        Job.user, Job.base_model, Job.need_key, Job.extent, Attempt.job_id, Attempt.attempt, Attempt.method,
        Attempt.device_name, Attempt.prepared_s, Attempt.trained_s, Attempt.trained_steps, Attempt.started_at,
        Attempt.ended_at, Attempt.reason, Attempt.resumed_from_step, Attempt.roomy, Attempt.neighbours,
        CardContention.contention,
    )  # fmt: skip
    ended = select(*columns).join(Attempt, Attempt.job_id == Job.job_id)
    ended = ended.outerjoin(CardContention, CardContention.device_name == Attempt.device_name)
    ended = ended.where(Attempt.ended_at.is_not(None), ~ON_SEVERAL_CARDS).limit(READ)
    parts = (  # each by an index, and none reads more than it gives
        ended.where(sql("jobs.attempt > 0"), Job.base_model == bindparam("base_model")).order_by(Job.job_id.desc()),
        ended.where(Attempt.ended_at > bindparam("since")).order_by(Attempt.ended_at.desc()),
    )
    return union_all(*(select(part.subquery()) for part in parts))


# Made once: SQLAlchemy takes longer to make such a statement than to run it.
_TIMED = _timed()
_DEVICES = select(Node.device_name).distinct()


def read_timed(tx: Transaction, base_model: str, now: dt.datetime) -> list[TimedRun]:
    """Attempts whose time was measured, the newest first: those of the newest jobs on the base, and the newest of
    all."""
    asked = {"base_model": base_model, "since": now - RECENT}
    rows = {(row.job_id, row.attempt): row for row in tx.session.execute(_TIMED, asked)}
    newest = sorted(rows.values(), key=lambda row: row.ended_at, reverse=True)
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
            seconds=took if row.reason is Reason.OK and took > 0 else None,
            resumed=bool(row.resumed_from_step),
            roomy=row.roomy,
            neighbours=row.neighbours,
            contention=row.contention,
        )
        for row in newest
        for took in [_between(row.started_at, row.ended_at)]
    ]


def _between(start: dt.datetime, end: dt.datetime) -> float:
    """Not above 0 if the clock has gone back meanwhile: then it is no measurement."""
    return (end - start).total_seconds()


def read_devices(tx: Transaction) -> list[str]:
    """The models of the fleet's cards."""
    return sorted(tx.session.scalars(_DEVICES))


class Forecasts:
    """Predictions of one transaction. What was measured is read once for each base."""

    def __init__(self, tx: Transaction, now: dt.datetime) -> None:
        self._tx, self._now = tx, now
        self._devices: list[str] | None = None
        self._runs: dict[str, tuple[list[TimedRun], Speeds]] = {}

    def write(self, job: Job) -> None:
        """Say in the job's row how long what is left of it takes on each model of card that the fleet has, or had
        when something was measured there, if no worker runs now."""
        if self._devices is None:
            self._devices = read_devices(self._tx)
        if job.base_model not in self._runs:
            self._runs[job.base_model] = read_timed(self._tx, job.base_model, self._now), {}
        runs, known = self._runs[job.base_model]
        devices = self._devices or sorted({run.device for run in runs})
        found = {
            (method, device): forecast(undone(job, method), device, runs, known)
            for method in job.methods
            for device in devices
        }
        job.forecasts = [
            {"device": device, "method": str(method), "seconds": one.seconds, "basis": one.basis.value}
            for (method, device), one in found.items()
            if one.is_known
        ]
        job.work_left_s = shortest(one for (method, _), one in found.items() if method == job.methods[0]).seconds


def predicted(job: Job, device: str, method: str) -> tuple[float, Basis] | None:
    """The seconds that its row predicts for a card of this model, and what that rests on; None: nothing is known."""
    for one in job.forecasts or ():
        if (one["device"], one["method"]) == (device, method):
            return one["seconds"], word(Basis, one["basis"])
    return None


def undone(job: Job, method: str) -> Undone:
    """What is left of a job, from its row."""
    return Undone(
        user=job.user,
        base_model=job.base_model,
        method=str(method),
        need_key=job.need_key,
        extent=Extent.read(job.extent),
        step=(job.checkpoint or {}).get("step") or 0,
        steps=job.total_steps,
    )


def predict_again(tx: Transaction, job: Job, now: dt.datetime) -> None:
    """As an attempt ends: what is left of its job, and of others that wait on its base if its length was a surprise."""
    tx.session.flush()  # the attempt's end is part of what was measured
    _measure_contention(tx, job, now)
    forecasts = Forecasts(tx, now)
    if job.status is not Status.SUCCEEDED:
        forecasts.write(job)
    if not _surprises(tx, job):
        return
    first = select(Job).where(WAITS, Job.base_model == job.base_model, Job.job_id != job.job_id).order_by(Job.job_id)
    for row in tx.session.scalars(first.limit(REFRESHED).with_for_update(**SKIP_LOCKED)):
        before = row.work_left_s
        forecasts.write(row)
        if row.reason is Reason.PREEMPTED:  # it gave way by what was left then
            row.work_left_s = max(before, row.work_left_s)


def _measure_contention(tx: Transaction, job: Job, now: dt.datetime) -> None:
    """As an attempt that shared its card comes to a good end: one row a transaction, or two could wait for each
    other."""
    row = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    if row is None or row.reason is not Reason.OK or not row.neighbours or row.device_name is None:
        return
    found = measured_contention(read_timed(tx, job.base_model, now), row.device_name)
    if found is not None:
        tx.put(CardContention, "device_name", {"device_name": row.device_name, "contention": found})


def _surprises(tx: Transaction, job: Job) -> bool:
    """Whether the attempt that has just ended trained, and its prediction was far off or there was none."""
    row = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    if row is None or row.ended_at is None or not row.trained_steps:
        return False
    if row.seconds_predicted is None:
        return True
    contention = tx.session.scalar(
        select(CardContention.contention).where(CardContention.device_name == row.device_name)
    )
    took = _between(row.started_at, row.ended_at) / slowed(row.neighbours, contention)
    as_predicted = 1 / SURPRISING < took / max(row.seconds_predicted, 1e-3) < SURPRISING
    return row.reason is Reason.OK and took > 0 and not as_predicted


def read_predicted(tx: Transaction, limit: int = MEASURED) -> list[TimeMeasured]:
    """Attempts that came to a good end and had a prediction, the newest first."""
    columns = (
        Attempt.device_name, Attempt.predicted_by, Attempt.seconds_predicted, Attempt.started_at, Attempt.ended_at,
        Attempt.neighbours, CardContention.contention,
    )  # fmt: skip
    query = select(*columns).outerjoin(CardContention, CardContention.device_name == Attempt.device_name)
    query = query.where(Attempt.reason == Reason.OK, Attempt.predicted_by.is_not(None))
    query = query.where(Attempt.ended_at > Attempt.started_at)
    return [
        TimeMeasured(
            device_name=row.device_name or "unknown",
            basis=row.predicted_by,
            predicted_s=row.seconds_predicted,
            took_s=_between(row.started_at, row.ended_at) / slowed(row.neighbours, row.contention),
        )
        for row in tx.session.execute(query.order_by(Attempt.started_at.desc()).limit(limit))
    ]
