"""When waiting jobs are expected to start, and which others go first: a replay of the rule in which running jobs end as
measured.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loractl.common.job.method import Method
from loractl.common.placement.cards import Card, takes
from loractl.common.placement.gangs import may_share
from loractl.common.placement.lines import Waiting
from loractl.common.placement.rule import turn
from loractl.common.store.fleet import FleetView, waiting_of

from .gangs import numbers, when_they_end

if TYPE_CHECKING:
    from loractl.common.placement.card_hours import PastCardHours, QuotaMeter
    from loractl.common.placement.replay import ReplayedRun
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


REPLAYED_JOBS = 200
"""With more waiting jobs no expected start is given: it would depend on too many unknown durations."""


@dataclass(frozen=True, kw_only=True)
class ExpectedStart:
    """When and where a job is expected to start."""

    at: dt.datetime
    spread_s: float  # half width, from the spread of the running jobs' measured steps
    nodes: tuple[str, ...]  # all its cards
    rests_on: tuple[int, ...] = ()  # the running jobs that leave these cards before, as is expected of them

    def as_json(self) -> dict[str, Any]:
        """`at` as ISO 8601, `spread_s`, `rests_on`, and `node`: with several cards, the first, and all of them in
        `nodes`."""
        lists = {"nodes": list(self.nodes), "rests_on": list(self.rests_on)}
        return {"at": self.at.isoformat(), "spread_s": self.spread_s, "node": self.nodes[0], **lists}


def read_starts(store: Store, view: FleetView, waiting: Sequence[Waiting]) -> dict[int, ExpectedStart]:
    """See expected_starts. Past use is read only if somebody has a quota."""
    if len(waiting) > REPLAYED_JOBS:
        return {}
    return expected_starts(view, waiting, store.usage.past() if view.allowed else {})


def expected_starts(
    view: FleetView, waiting: Sequence[Waiting], past: Mapping[str, PastCardHours] | None = None
) -> dict[int, ExpectedStart]:
    """When the ready jobs start, if that depends only on quotas and on running jobs with a measured end.

    The duration of a waiting job is unknown: a job that can only start after it gets no time. `past`: what users with a
    quota have had; without it, jobs of a user who is beyond a hard one get no time.
    """
    if len(waiting) > REPLAYED_JOBS:
        return {}
    cards = list(view.cards.values())
    late = _replayed(view, waiting, [_late(card, view) for card in cards], past or {})
    return {
        job_id: _expected(view, run, late[job_id])
        for job_id, run in _replayed(view, waiting, cards, past or {}).items()
        if job_id in late
    }


def _expected(view: FleetView, run: ReplayedRun, late: ReplayedRun) -> ExpectedStart:
    nodes = run.node, *run.beside
    gone = [one for node in nodes for one in view.cards[node].running if one.ends and one.ends <= run.started]
    return ExpectedStart(
        at=run.started,
        spread_s=max(0.0, (late.started - run.started).total_seconds()),
        nodes=nodes,
        rests_on=tuple(dict.fromkeys(one.job_id for one in gone)),
    )


def _replayed(
    view: FleetView, waiting: Sequence[Waiting], cards: Sequence[Card], past: Mapping[str, PastCardHours]
) -> Mapping[int, ReplayedRun]:
    """The run of each job that starts in a replay on these cards."""
    from loractl.common.placement.replay import PlacementRule, ReplayedJob, replay

    running = [job for card in cards for job in card.running]
    jobs = [ReplayedJob(waiting=job, seconds=None) for job in waiting]
    charges = {**view.charges, **{user: one.charge for user, one in past.items()}}  # the view's have quotas in them
    rule = PlacementRule(charges, view.now, running, meter=_meter(view, cards, past))
    return replay(jobs, cards, view.now, rule).runs


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


def _late(card: Card, view: FleetView) -> Card:
    """The card when everything takes as long as its measured spread allows."""

    def later(job_id: int) -> dt.timedelta:
        row = view.running.get(job_id)
        return dt.timedelta(seconds=(row.eta_spread_seconds or 0.0) if row is not None else 0.0)

    return replace(
        card,
        running=tuple(replace(j, ends=None if j.ends is None else j.ends + later(j.job_id)) for j in card.running),
    )


def why_unknown(job: Job, view: FleetView, starts: Mapping[int, ExpectedStart], waiting: Sequence[Waiting]) -> str:
    """Why a job that waits for room has no expected start; empty where no job is in its way."""
    if len(waiting) > REPLAYED_JOBS:
        return f"more than {REPLAYED_JOBS} jobs wait"
    cards = suiting(waiting_of(vars(job), view.now), view)
    running = [one.job_id for node in cards for one in view.cards[node].running if one.ends is None]
    if running:
        return f"nobody knows yet when {when_they_end(sorted({*running}))}"
    first = [job_id for job_id, start in starts.items() if not cards.isdisjoint(start.nodes)]
    if not first:
        return ""
    return f"{numbers(first)} {'starts' if len(first) == 1 else 'start'} before it, and nobody knows for how long"


def ahead_of(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """The ready jobs, in the rule's order, that the rule tries before it and that could take a card that suits it; if
    no card does, those that lack one as well."""
    me = waiting_of(vars(job), view.now)
    mine, known = suiting(me, view), dict[tuple[object, ...], frozenset[str]]()
    first = list[Waiting]()
    for other in waiting:
        before = turn(other, view.charges) < turn(me, view.charges) or other.job_id in view.placed
        if other.job_id == me.job_id or not before:
            continue
        form = (other.need, other.methods, other.requires, other.only_host, other.avoids, other.bf16, other.gangs)
        theirs = known[form] = known.get(form) or suiting(other, view)
        if not mine.isdisjoint(theirs) if mine else not theirs:
            first.append(other)
    return sorted(first, key=lambda other: (other.job_id not in view.placed, turn(other, view.charges)))


def reaches(job: Job, waiting: Sequence[Waiting]) -> bool:
    """Whether the part of the rule's order that was read contains all that go before the job."""
    return len(waiting) <= REPLAYED_JOBS or any(other.job_id == job.job_id for other in waiting)


def suiting(job: Waiting, view: FleetView) -> frozenset[str]:
    """The open cards that the job could take once all else has left them."""
    fleet = view.cards.values()

    def may_have(card: Card) -> bool:
        several = bool(job.gangs) and may_share(card, job)
        return card.open and (several or takes(card, job, fleet, view.largest)) and (job.bound or 0) <= card.usable

    return frozenset(card.node for card in fleet if may_have(card))
