"""When waiting jobs are expected to start, and which others go first: a replay of the rule in which running jobs end as
measured, and those that start as predicted.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loractl.common.job.method import Method
from loractl.common.placement.cards import Card, Occupant, takes
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.placement.gangs import may_share
from loractl.common.placement.lines import Waiting
from loractl.common.store.fleet import FleetView, waiting_of
from loractl.common.text import numbers, when_they_end

if TYPE_CHECKING:
    from loractl.common.placement.card_hours import PastCardHours, QuotaMeter
    from loractl.common.placement.replay import ReplayedRun
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job

MOST_STARTS = 10
"""Starts that are replayed: of a job that is not among them, only that is said."""

LISTED_JOBS = 50
"""The most jobs ahead of one that are counted."""

After = Callable[[Waiting], Waiting | None]
"""Gives the next of a job's line, see `Queue`."""


@dataclass(frozen=True, kw_only=True)
class ExpectedStart:
    """When and where a job is expected to start."""

    at: dt.datetime
    spread_s: float  # half width: that of the measured ends that it rests on
    nodes: tuple[str, ...]  # all its cards
    measured: tuple[int, ...] = ()  # the jobs that leave these cards before, as their steps say
    predicted: tuple[int, ...] = ()  # and those whose length is only predicted

    @property
    def after(self) -> tuple[int, ...]:
        """The jobs that must end first."""
        return *self.measured, *self.predicted

    def as_json(self) -> dict[str, Any]:
        """`at` as ISO 8601, `spread_s`, `measured` and `predicted`: the jobs whose ends it rests on, and `node`: with
        several cards, the first, and all of them in `nodes`."""
        lists = {"nodes": list(self.nodes), "measured": list(self.measured), "predicted": list(self.predicted)}
        return {"at": self.at.isoformat(), "spread_s": self.spread_s, "node": self.nodes[0], **lists}


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a replay says."""

    starts: Mapping[int, ExpectedStart] = field(default_factory=dict)
    stopped: bool = False  # after MOST_STARTS starts: others may start later


def read_outlook(store: Store, view: FleetView, wanted: Collection[int], ready: Sequence[Waiting]) -> Outlook:
    """See outlook. A job behind the first LISTED_JOBS is not waited for. Past use is read only if somebody has a
    quota."""
    if len(ready) > LISTED_JOBS:
        wanted = {*wanted} & {job.job_id for job in ready}
    if not wanted:
        return Outlook()
    read: dict[int, Waiting] = {}

    def after(job: Waiting) -> Waiting | None:
        if job.job_id not in read:
            some = store.jobs.behind(job)
            read.update(zip([job.job_id, *(one.job_id for one in some)], some, strict=False))
        return read.get(job.job_id)

    past = store.usage.past() if view.allowed else {}
    return outlook(view, wanted, after, past, _asking(store, view))


def _asking(store: Store, view: FleetView) -> Collection[int]:
    """The waiting jobs to which longer ones may yield: they yield themselves. Read only where something could."""
    if not view.giving_way.is_on or not any(one.yields for card in view.cards.values() for one in card.running):
        return ()
    first = sorted(view.firsts, key=view.turn)[:LISTED_JOBS]
    return {number for number, row in store.jobs.numbered([job.job_id for job in first]).items() if row.yields}


def outlook(
    view: FleetView,
    wanted: Collection[int],
    after: After,
    past: Mapping[str, PastCardHours] | None = None,
    asking: Collection[int] = (),
) -> Outlook:
    """When jobs start, until all wanted ones have, as far as that depends only on quotas, on running jobs with a known
    end, and on jobs whose length is predicted.

    `after`: the next of a job's line. `past`: what users with a quota have had; without it, jobs of a user who is
    beyond a hard one get no time. `asking`: waiting jobs to which longer ones may yield.
    """
    runs = _replayed(view, after, past or {}, {*wanted}, {*asking})
    starts = {job_id: _expected(view, runs, run) for job_id, run in runs.items()}
    return Outlook(starts=starts, stopped=len(runs) >= MOST_STARTS + len(view.placed))


def _expected(view: FleetView, runs: Mapping[int, ReplayedRun], run: ReplayedRun) -> ExpectedStart:
    """What a run rests on: the jobs that leave its cards before."""
    nodes = {run.node, *run.beside}

    def over(ends: dt.datetime | None) -> bool:
        return ends is not None and ends <= run.started

    gone = {job.job_id for node in nodes for job in view.cards[node].running if over(job.ends)}
    measured = {job_id for job_id in gone if (row := view.running.get(job_id)) is not None and row.step}
    here = {number for number, one in runs.items() if over(one.ended) and not nodes.isdisjoint((one.node, *one.beside))}
    spreads = (view.running[job_id].eta_spread_seconds or 0.0 for job_id in measured)
    return ExpectedStart(
        at=run.started,
        spread_s=max(spreads, default=0.0),
        nodes=(run.node, *run.beside),
        measured=tuple(sorted(measured)),
        predicted=tuple(sorted(gone - measured | here)),
    )


def _replayed(
    view: FleetView, after: After, past: Mapping[str, PastCardHours], wanted: set[int], asking: set[int]
) -> Mapping[int, ReplayedRun]:
    """The run of each job that starts in a replay."""
    from loractl.common.placement.preemption import left_s
    from loractl.common.placement.replay import PlacementRule, Remaining, ReplayedJob, replay

    def again(occupant: Occupant) -> ReplayedJob:
        """What waits of a running job once it gives way."""
        assert occupant.yields is not None
        left, stops, stop_s = left_s(occupant, view.now), occupant.yields.stops, occupant.yields.cost_s
        waits = replace(waiting_of(vars(view.running[occupant.job_id]), view.now), left_s=left)
        return ReplayedJob(waiting=waits, seconds=left, yields=True, stops=stops, stop_s=stop_s)

    def enough(runs: Mapping[int, ReplayedRun]) -> bool:
        return len(runs) >= MOST_STARTS + len(decided) or wanted <= runs.keys()

    cards, decided = list(view.cards.values()), list(view.placed.values())
    waiting = Remaining(view.firsts, after, view.placed)
    running = [job for card in cards for job in card.running]
    charges = {**view.charges, **{user: one.charge for user, one in past.items()}}  # the view's have quotas in them
    back = {one.job_id: again(one) for one in running if one.yields is not None}
    rule = PlacementRule(
        charges,
        view.now,
        running,
        meter=_meter(view, cards, past),
        waiting=waiting,
        decided=decided,
        by_share=view.by_share,
        yields=view.giving_way.is_on,
        least_s=view.giving_way.least_s,
        may_ask=lambda job: job.job_id in asking or job.job_id in back,
    )
    return replay((), cards, view.now, rule, contention=None, until=enough, lasts=_predicted_s, running=back).runs


def _predicted_s(job: Waiting) -> float | None:
    """How long a waiting job takes; None: nothing is known."""
    return None if job.left_s == UNKNOWN_S else job.left_s


def _meter(view: FleetView, cards: Sequence[Card], past: Mapping[str, PastCardHours]) -> QuotaMeter | None:
    """The use of users with a quota, as it goes on from here."""
    from loractl.common.placement.card_hours import QuotaMeter

    allowed = {user: allowance for user, allowance in view.allowed.items() if user in past}
    if not allowed:
        return None
    meter = QuotaMeter(allowed, {card.node: card.total for card in cards}, past)
    needs = {
        job.job_id: job.vram_qlora if job.method == Method.QLORA.value else job.vram_lora
        for job in view.running.values()
    }
    meter.take_over(cards, view.now, {job_id: need for job_id, need in needs.items() if isinstance(need, int)})
    return meter


def why_unknown(job: Job, view: FleetView, ready: Sequence[Waiting], found: Outlook) -> str:
    """Why a job that waits for room has no expected start; empty where no job is in its way."""
    if not reaches(job, ready):
        return f"more than {LISTED_JOBS} jobs wait before it"
    if found.stopped:
        return f"it is not among the next {MOST_STARTS} to start"
    cards = suiting(waiting_of(vars(job), view.now), view)
    running = [one.job_id for node in cards for one in view.cards[node].running if one.ends is None]
    if running:
        return f"nobody knows yet when {when_they_end(sorted({*running}))}"
    first = [job_id for job_id, start in found.starts.items() if not cards.isdisjoint(start.nodes)]
    if not first:
        return ""
    return f"{numbers(first)} {'starts' if len(first) == 1 else 'start'} before it, and nobody knows for how long"


def ahead_of(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """The ready jobs, in the rule's order, that the rule tries before it and that could take a card that suits it; if
    no card does, those that lack one as well."""
    me = waiting_of(vars(job), view.now)
    mine, first = suiting(me, view), list[Waiting]()
    for other in waiting:
        before = view.turn(other) < view.turn(me) or other.job_id in view.placed
        if other.job_id != me.job_id and before:
            theirs = suiting(other, view)
            if not mine.isdisjoint(theirs) if mine else not theirs:
                first.append(other)
    return sorted(first, key=lambda other: (other.job_id not in view.placed, view.turn(other)))


def reaches(job: Job, waiting: Sequence[Waiting]) -> bool:
    """Whether the part of the rule's order that was read contains all that go before the job."""
    return len(waiting) <= LISTED_JOBS or any(other.job_id == job.job_id for other in waiting)


def suiting(job: Waiting, view: FleetView) -> frozenset[str]:
    """The open cards that the job could take once all else has left them."""
    if job.line not in view.suiting:
        view.suiting[job.line] = frozenset(node for node, card in view.cards.items() if _suits(card, job, view))
    return view.suiting[job.line]


def _suits(card: Card, job: Waiting, view: FleetView) -> bool:
    several = bool(job.gangs) and may_share(card, job)
    takes_it = several or takes(card, job, view.cards.values(), view.largest)
    return card.open and takes_it and (job.bound or 0) <= card.usable
