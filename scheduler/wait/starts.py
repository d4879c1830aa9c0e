"""When waiting jobs are expected to start, and which of their rivals go first: a replay of the fleet in which running
jobs end as measured.
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

if TYPE_CHECKING:
    from loractl.common.placement.card_hours import PastCardHours, QuotaMeter
    from loractl.common.placement.clock import ReplayedRun
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job


REPLAYED_JOBS = 200
"""With more waiting jobs no expected start is given: it would depend on too many unknown durations."""


@dataclass(frozen=True, kw_only=True)
class ExpectedStart:
    """When and where a job is expected to start."""

    at: dt.datetime
    spread_s: float  # half width, from the spread of the running jobs' measured steps
    node: str
    beside: tuple[str, ...] = ()  # the other cards of a job on several cards

    @property
    def nodes(self) -> tuple[str, ...]:
        """All cards on which it starts."""
        return self.node, *self.beside

    def as_json(self) -> dict[str, Any]:
        """`at` as ISO 8601, `spread_s`, and `node`: with several cards, the first, and all of them in `nodes`."""
        return {"at": self.at.isoformat(), "spread_s": self.spread_s, "node": self.node, "nodes": list(self.nodes)}


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
    cards = view.cards.values()
    expected = _replayed(view, waiting, list(cards), past or {})
    late = _replayed(view, waiting, [_late(card, view) for card in cards], past or {})
    return {
        job_id: ExpectedStart(
            at=run.started,
            spread_s=max(0.0, (late[job_id].started - run.started).total_seconds()),
            node=run.node,
            beside=run.beside,
        )
        for job_id, run in expected.items()
        if job_id in late
    }


def _replayed(
    view: FleetView, waiting: Sequence[Waiting], cards: Sequence[Card], past: Mapping[str, PastCardHours]
) -> Mapping[int, ReplayedRun]:
    """The run of each job that starts in a replay on these cards."""
    from loractl.common.placement.clock import ReplayedJob
    from loractl.common.placement.replay import PlacementRule, replay

    running = [job for card in cards for job in card.running]
    jobs = [ReplayedJob(waiting=job, seconds=None) for job in waiting]
    charges = {**view.charges, **{user: one.charge for user, one in past.items()}}  # the view's have quotas in them
    meter = _meter(view, cards, past)
    rule = PlacementRule(charges, view.now, running, meter=meter)
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


def ahead_of(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """The ready jobs, in the rule's order, that the rule tries before it and that could take a card that suits it."""
    mine = turn(waiting_of(vars(job), view.now), view.charges)
    first = [other for other in rivals(job, view, waiting) if turn(other, view.charges) < mine]
    return sorted(first, key=lambda other: turn(other, view.charges))


def reaches(job: Job, waiting: Sequence[Waiting]) -> bool:
    """Whether the part of the rule's order that was read contains all that go before the job."""
    return len(waiting) <= REPLAYED_JOBS or any(other.job_id == job.job_id for other in waiting)


def rivals(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> list[Waiting]:
    """Other ready jobs that could take a card that suits this one; if no card does, those that lack one as well."""
    me = waiting_of(vars(job), view.now)
    mine = _suiting(me, view)

    def wants(theirs: frozenset[str]) -> bool:
        return not mine.isdisjoint(theirs) if mine else not theirs

    return [other for other in waiting if other.job_id != me.job_id and wants(_suiting(other, view))]


def _suiting(job: Waiting, view: FleetView) -> frozenset[str]:
    """The open cards that the job could take. Hundreds of waiting jobs ask for the same, so the view keeps it."""
    form = (job.need, job.methods, job.requires, job.only_host, job.avoids, job.bf16, job.alone, job.gangs)
    found = view.suiting.get(form)
    if found is None:
        fleet = view.cards.values()

        def may_have(card: Card) -> bool:
            several = bool(job.gangs) and may_share(card, job)
            takes_it = card.open and (several or takes(card, job, fleet, view.round.largest))
            return takes_it and (job.bound or 0) <= card.usable

        found = view.suiting[form] = frozenset(card.node for card in fleet if may_have(card))
    return found
