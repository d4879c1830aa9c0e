"""Sweeps as the database has them: what their members have reached, and which of them is stopped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, Select, select, text
from sqlalchemy.orm import Session

from loractl.common.errors import SweepNotFound
from loractl.common.job.status import Reason, Status
from loractl.common.job.sweep import Member, RungPoint, SweepView, judge, metric_of, setting, unlike
from loractl.common.units import LAST_NUMBER

from ..columns import part_of
from ..records import HELD_OUT_LOSS, Claim, Page
from ..tables import FINAL, Attempt, AttemptShare, Job, MetricPoint, Sweep
from ..transaction import Transaction


def read_verdict(tx: Transaction, claim: Claim, points: Sequence[RungPoint]) -> str | None:
    """Why a member that has just reached these rungs is stopped; None when it continues.

    Two members that reach a rung at the same moment are compared one after the other; SQLite does that by itself.
    """
    if not points:
        return None
    tx.wait_for(f"rungs of sweep {claim.sweep_id}")
    for point in points:
        there = _newest(tx.session, [claim.sweep_id], [point.metric])
        verdict = judge(point.loss, [other.value for (job_id, _), other in there.items() if job_id != claim.job_id])
        if not verdict.goes_on:
            best = "the best" if verdict.kept == 1 else f"one of the best {verdict.kept}"
            where = f"at {point.rung * 100:g} % of its steps (step {point.step})"
            return (
                f"stopped {where}: held-out loss {point.loss:.4f} is not {best} of {verdict.reached} there; "
                f"{verdict.bar:.4f} or less would have continued"
            )
    return None


def read_rungs(session: Session, job: Job) -> tuple[float, ...]:
    """The rungs at which a member's next attempt may be stopped.

    None for a member that was stopped before: a person has queued it again to see its end.
    """
    if job.sweep_id is None:
        return ()
    pruned = select(Attempt.attempt).where(Attempt.job_id == job.job_id, Attempt.reason == Reason.PRUNED).limit(1)
    if session.scalar(pruned) is not None:
        return ()
    return tuple(session.scalar(select(Sweep.rungs).where(Sweep.sweep_id == job.sweep_id)) or ())


def read_sweeps(tx: Transaction, sweep_ids: Collection[int], *, settings: bool = True) -> list[SweepView]:
    """Those of the sweeps that exist, with all their members, by number.

    Without `settings` those of the members are empty: a spec costs more than all else that is read of a job.
    """
    session = tx.session
    sweep_ids = [number for number in sweep_ids if 0 < number <= LAST_NUMBER]
    rows = session.scalars(select(Sweep).where(Sweep.sweep_id.in_(sweep_ids)).order_by(Sweep.sweep_id)).all()
    names = {metric_of(rung) for row in rows for rung in row.rungs or ()}
    points, cards = _newest(session, sweep_ids, [*names, HELD_OUT_LOSS]), _cards(session, sweep_ids)
    views = []
    for row in rows:
        asked = row.settings
        varied = asked.get("varied") or {}
        first = select(part_of(Job.spec, "task_type")).where(Job.sweep_id == row.sweep_id).order_by(Job.job_id).limit(1)
        columns, keys = (_OF_MEMBER, varied) if settings else (_WITHOUT_SPEC, ())
        # a sweep at a time: a member is small, but its row has the whole spec
        mine = session.execute(select(*columns).where(Job.sweep_id == row.sweep_id).order_by(Job.job_id))
        views.append(
            SweepView(
                sweep_id=row.sweep_id,
                name=row.name,
                user=row.user,
                varied=varied,
                created_at=row.created_at,
                rungs=tuple(row.rungs or ()),
                trials=asked.get("trials"),
                seed=asked.get("seed"),
                members=[_member(job, keys, row.rungs or (), points, cards.get(job.job_id, ())) for job in mine],
                unlike=unlike(varied, session.scalar(first)),
            )
        )
    return views


def read_sweep(tx: Transaction, sweep_id: int) -> SweepView:
    """One sweep with its members. Raises SweepNotFound."""
    for view in read_sweeps(tx, [sweep_id]):
        return view
    raise SweepNotFound(sweep_id)


def read_head(tx: Transaction, sweep_id: int) -> Sweep:
    """A sweep's own row, without its members. Raises SweepNotFound."""
    for row in tx.session.scalars(select(Sweep).where(Sweep.sweep_id == sweep_id)):
        return row
    raise SweepNotFound(sweep_id)


def newest_sweeps(page: Page) -> Select[Sweep]:
    """The page's sweeps, the newest first, and one more where there is one."""
    query = select(Sweep).order_by(Sweep.sweep_id.desc()).limit(page.limit + 1)
    return query if page.after is None else query.where(Sweep.sweep_id < page.after)


_OF_MEMBER = (
    Job.job_id, Job.name, Job.spec, Job.status, Job.reason, Job.stage, Job.held, Job.awaits,
    Job.step, Job.total_steps, Job.node, Job.message, Job.report_uri,
)  # fmt: skip

_WITHOUT_SPEC = tuple(column for column in _OF_MEMBER if column is not Job.spec)


def _member(
    job: Row[Any],
    varied: Collection[str],
    rungs: Collection[float],
    points: Mapping[tuple[int, str], Row[Any]],
    cards: tuple[str, ...],
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
        cards=cards,
        message=job.message,
        rungs=tuple(RungPoint(rung=rung, step=p.step, loss=p.value) for rung, p in reached if p is not None),
        final_loss=final.value if final is not None and job.status is Status.SUCCEEDED else None,
        has_result=job.report_uri is not None,
    )


def _cards(session: Session, sweep_ids: Collection[int]) -> dict[int, tuple[str, ...]]:
    """The cards of each member that runs, by rank."""
    running = (Job.sweep_id.in_(sweep_ids), Job.status == Status.RUNNING, Job.node.is_not(None))
    now = (AttemptShare.job_id == Job.job_id) & (AttemptShare.attempt == Job.attempt) & (AttemptShare.rank > 0)
    rows = session.execute(
        select(Job.job_id, Job.node, AttemptShare.node).outerjoin(AttemptShare, now).where(*running)
        .order_by(Job.job_id, AttemptShare.rank)
    )  # fmt: skip
    cards: dict[int, list[str]] = {}
    for job_id, first, other in rows:
        cards.setdefault(job_id, [first or ""]).extend([] if other is None else [other])
    return {job_id: tuple(names) for job_id, names in cards.items()}


def _newest(
    session: Session, sweep_ids: Collection[int | None], names: Collection[str]
) -> dict[tuple[int, str], Row[Any]]:
    """By (job_id, name) the last point of the newest attempt that has one: a resumed attempt measures again.

    Only for what a member has once or a few times: a job has hundreds of other points, and FINAL is their index.
    """
    columns = (MetricPoint.job_id, MetricPoint.name, MetricPoint.step, MetricPoint.value)
    members = select(Job.job_id).where(Job.sweep_id.in_(sweep_ids))
    points = select(*columns).where(MetricPoint.job_id.in_(members), text(FINAL), MetricPoint.name.in_(names))
    ordered: Iterator[Row[Any]] = iter(session.execute(points.order_by(MetricPoint.attempt, MetricPoint.step)))
    return {(point.job_id, point.name): point for point in ordered}
