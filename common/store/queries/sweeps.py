"""Sweeps as the database has them: what is submitted together, what its members have reached, and who is stopped."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loractl.common.job.halving import judge, rung_step
from loractl.common.job.status import Reason, Stage, Status

from ..records import HELD_OUT_LOSS, Claim, Progress
from ..tables import Attempt, Job, MetricPoint, Sweep

_SWEEP_LOCK = 0x5EE9
"""Any constant: with a sweep's number it names a lock in PostgreSQL."""


@dataclass(frozen=True, kw_only=True)
class NewSweep:
    """What is written of a sweep beside its members."""

    name: str
    user: str
    varied: Mapping[str, str]  # the values of each key, as they were given
    rungs: tuple[float, ...] | None = None  # None: no loser is stopped
    trials: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class RungPoint:
    """A member's evaluation at a rung."""

    rung: float
    step: int
    loss: float

    @property
    def metric(self) -> str:
        return metric_of(self.rung)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One job of a sweep, as far as the sweep is concerned."""

    job_id: int
    name: str
    settings: Mapping[str, Any]  # of the varied keys
    status: Status
    reason: Reason | None = None
    stage: Stage | None = None
    held: bool = False
    step: int | None = None
    total_steps: int | None = None
    node: str | None = None
    message: str | None = None
    rungs: tuple[RungPoint, ...] = ()  # ascending
    final_loss: float | None = None  # of the tuned model, once the member has succeeded
    has_result: bool = False  # adapter and report are stored, and not removed since

    @property
    def pruned(self) -> bool:
        return self.status is Status.CANCELLED and self.reason is Reason.PRUNED

    @property
    def loss(self) -> float | None:
        """The held-out loss that is known last."""
        return self.final_loss if self.final_loss is not None else self.rungs[-1].loss if self.rungs else None


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """A sweep at one moment."""

    sweep_id: int
    name: str
    user: str
    varied: Mapping[str, str]
    created_at: dt.datetime
    rungs: tuple[float, ...] = ()
    trials: int | None = None
    seed: int | None = None
    members: Sequence[Member] = field(default_factory=tuple)

    @property
    def ended(self) -> bool:
        return all(member.status.is_terminal for member in self.members)

    @property
    def best(self) -> Member | None:
        """Of the members that have succeeded the one with the least final loss.

        Before any has: the one with the least loss at the furthest rung that was reached. None before the first.
        """
        done = [(m.final_loss, m.job_id, m) for m in self.members if m.final_loss is not None]
        if done:
            return min(done)[-1]
        furthest = max((m.rungs[-1].rung for m in self.members if m.rungs), default=None)
        there = [(p.loss, m.job_id, m) for m in self.members for p in m.rungs if p.rung == furthest]
        return min(there)[-1] if there else None

    @property
    def saved_steps(self) -> tuple[int, int]:
        """(steps that stopped members did not take, steps of all members whose number is known)."""
        saved = sum((m.total_steps or 0) - (m.step or 0) for m in self.members if m.pruned)
        return saved, sum(m.total_steps or 0 for m in self.members)


def rung_points(claim: Claim, progress: Progress) -> list[RungPoint]:
    """The evaluations of a heartbeat that stand at a rung.

    They are stored as metrics of their own: who compares or shows them later need not know how many steps there were.
    """
    every, total = claim.spec.training.eval_steps, progress.total_steps
    if every is None or total is None:
        return []
    losses = {step: loss for step, name, loss in progress.metrics if name == "eval_loss" and math.isfinite(loss)}
    steps = [(rung, rung_step(rung, every, total)) for rung in claim.rungs]
    return [RungPoint(rung=rung, step=step, loss=losses[step]) for rung, step in steps if step in losses]


def read_verdict(session: Session, claim: Claim, points: Sequence[RungPoint]) -> str | None:
    """Why a member that has just reached these rungs is stopped; None when it goes on.

    Of two members that reach a rung at the same moment one comes after the other: in SQLite by itself.
    """
    if not points:
        return None
    if session.get_bind().dialect.name == "postgresql":  # a worker's role may not lock the row, which it can't change
        session.execute(select(func.pg_advisory_xact_lock(_SWEEP_LOCK, claim.sweep_id)))
    for point in points:
        there = _newest(session, [claim.sweep_id], [point.metric])
        verdict = judge(point.loss, [found.value for (job_id, _), found in there.items() if job_id != claim.job_id])
        if not verdict.goes_on:
            best = "the best" if verdict.kept == 1 else f"one of the best {verdict.kept}"
            where = f"at {point.rung * 100:g} % of its steps (step {point.step})"
            return (
                f"stopped {where}: held-out loss {point.loss:.4f} is not {best} of {verdict.reached} there; "
                f"{verdict.bar:.4f} or less would have gone on"
            )
    return None


def read_rungs(session: Session, job: Job) -> tuple[float, ...]:
    """The rungs at which a member's next attempt may be stopped. None for one that was stopped before, and that a
    person wants to see at its end all the same."""
    if job.sweep_id is None:
        return ()
    pruned = select(Attempt.attempt).where(Attempt.job_id == job.job_id, Attempt.reason == Reason.PRUNED).limit(1)
    if session.scalar(pruned) is not None:
        return ()
    return tuple(session.scalar(select(Sweep.rungs).where(Sweep.sweep_id == job.sweep_id)) or ())


def read_sweeps(session: Session, sweep_ids: Collection[int]) -> list[SweepView]:
    """Those of the sweeps that exist, with all their members, by number."""
    rows = session.scalars(select(Sweep).where(Sweep.sweep_id.in_(sweep_ids)).order_by(Sweep.sweep_id)).all()
    jobs = session.scalars(select(Job).where(Job.sweep_id.in_(sweep_ids)).order_by(Job.job_id)).all()
    names = {metric_of(rung) for row in rows for rung in row.rungs or ()}
    points = _newest(session, sweep_ids, [*names, HELD_OUT_LOSS])
    views = []
    for row in rows:
        varied = row.settings["varied"]
        mine = [job for job in jobs if job.sweep_id == row.sweep_id]
        views.append(
            SweepView(
                sweep_id=row.sweep_id,
                name=row.name,
                user=row.user,
                varied=varied,
                created_at=row.created_at,
                rungs=tuple(row.rungs or ()),
                trials=row.settings.get("trials"),
                seed=row.settings.get("seed"),
                members=[_member(job, varied, row.rungs or (), points) for job in mine],
            )
        )
    return views


def _member(
    job: Job, varied: Collection[str], rungs: Collection[float], points: Mapping[tuple[int, str], MetricPoint]
) -> Member:
    reached = [(rung, points.get((job.job_id, metric_of(rung)))) for rung in sorted(rungs)]
    final = points.get((job.job_id, HELD_OUT_LOSS))
    return Member(
        job_id=job.job_id,
        name=job.name,
        settings={key: setting(job.spec, key) for key in varied},
        status=job.status,
        reason=job.reason,
        stage=job.stage,
        held=job.held,
        step=job.step,
        total_steps=job.total_steps,
        node=job.node,
        message=job.message,
        rungs=tuple(RungPoint(rung=rung, step=p.step, loss=p.value) for rung, p in reached if p is not None),
        final_loss=final.value if final is not None and job.status is Status.SUCCEEDED else None,
        has_result=job.report_uri is not None,
    )


def setting(spec: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in a spec."""
    place: Any = spec
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _newest(
    session: Session, sweep_ids: Collection[int | None], names: Collection[str]
) -> dict[tuple[int, str], MetricPoint]:
    """By (job_id, name) the last point of the newest attempt that has one: a resumed attempt measures again."""
    found = select(MetricPoint).join(Job, Job.job_id == MetricPoint.job_id)
    found = found.where(Job.sweep_id.in_(sweep_ids), MetricPoint.name.in_(names))
    ordered: Iterator[MetricPoint] = iter(session.scalars(found.order_by(MetricPoint.attempt, MetricPoint.step)))
    return {(point.job_id, point.name): point for point in ordered}


def metric_of(rung: float) -> str:
    """The name under which the loss at a rung is stored, like rung_0.25."""
    return f"rung_{rung:g}"
