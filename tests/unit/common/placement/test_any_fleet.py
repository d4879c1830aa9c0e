"""What must hold of the placement rule on any fleet."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence, Set
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from loractl.common.placement.cards import (
    Card,
    Occupant,
    could_start,
    largest_gpu,
    room_at,
    room_for,
    takes,
)
from loractl.common.placement.duration import CONTENTION
from loractl.common.placement.lines import ANY_ROOM, Lines, Waiting, waited
from loractl.common.placement.rule import RESERVE_AFTER_S, Decision, place

from .scenes import NOW, Scene, decide, many, order, scenes, started


def after(cards: Sequence[Card], decisions: Sequence[Decision]) -> dict[str, Card]:
    """The cards with what has started."""
    left = {card.node: card for card in cards}
    for d in decisions:
        if d.placed is not None:
            job = d.placed.job
            occupant = Occupant(job_id=job.job_id, user=job.user, reserved=d.placed.reserved)
            left[d.placed.node] = left[d.placed.node].with_job(occupant)
    return left


@given(scenes())
def test_no_card_is_ever_promised_twice(scene: Scene) -> None:
    decisions = scene.decide()
    before = {card.node: card for card in scene.cards}
    assert len(order(decisions)) == len(set(order(decisions)))
    for node, card in after(scene.cards, decisions).items():
        if card.running != before[node].running:
            assert card.open
            assert card.outside + card.margin + card.taken <= card.total
            assert len(card.running) <= card.max_jobs


@given(scenes())
def test_each_job_runs_as_it_may(scene: Scene) -> None:
    by_node, largest = {card.node: card for card in scene.cards}, largest_gpu(scene.cards)
    for d in scene.decide():
        if d.placed is None:
            continue
        job, card, size = d.placed.job, by_node[d.placed.node], d.placed.job.need.of(d.placed.method)
        assert d.placed.method in job.methods
        assert d.placed.reserved == size or size is None
        assert job.requires <= card.labels
        assert not card.processor or largest == 0 or (job.least is not None and job.least > largest)
        assert job.least is not None or not card.running


@given(scenes())
def test_no_user_passes_the_limit(scene: Scene) -> None:
    limits = [card.user_limit for card in scene.cards if card.open and card.user_limit is not None]
    assume(limits)
    decisions = scene.decide()
    users = [job.user for card in after(scene.cards, decisions).values() for job in card.running]
    newly = {d.placed.job.user for d in decisions if d.placed is not None}
    assert all(users.count(user) <= min(limits) for user in newly)


@many
@given(scenes())
def test_no_card_idles_while_a_job_that_it_should_take_waits(scene: Scene) -> None:
    decisions = scene.decide()
    left = after(scene.cards, decisions)
    kept = {d.reserved.node for d in decisions if d.reserved is not None}
    limit = min((c.user_limit for c in scene.cards if c.open and c.user_limit is not None), default=99)
    users = [job.user for card in left.values() for job in card.running]
    alone = {d.declined.job.job_id for d in decisions if d.declined is not None}  # each has a card that will be empty
    for job in scene.jobs:
        if job.job_id in started(decisions) or job.job_id in alone or users.count(job.user) >= limit:
            continue
        for card in left.values():
            assert card.node in kept or not card.open or not could_start(job, card, scene.cards), (job, card)


@many
@given(scenes())
def test_a_job_that_could_share_a_card_waits_no_longer_than_sharing_would_cost_it(scene: Scene) -> None:
    decisions, cards = scene.decide(), {card.node: card for card in scene.cards}
    declined = [(d.declined, d.reserved) for d in decisions if d.declined is not None]
    assert len({kept.node for _, kept in declined if kept is not None}) == len(declined), "a card for each"
    for shared, kept in declined:
        assert kept is not None and kept.job is shared.job and kept.job.job_id not in started(decisions)
        ends = [one.ends for one in cards[kept.node].running]
        assert ends and shared.reserved <= cards[kept.node].capacity
        assert kept.node not in started(decisions).values()
        others = len(after(scene.cards, decisions)[shared.node].running)
        assert all(end is not None and end > NOW for end in ends)
        waits_s = max((end - shared.job.since).total_seconds() for end in ends if end is not None)
        contention = cards[shared.node].contention
        assert waits_s < (CONTENTION if contention is None else contention) * others * shared.job.left_s


@many
@given(scenes())
def test_what_starts_on_a_kept_card_does_not_delay_the_job_for_which_it_is_kept(scene: Scene) -> None:
    decisions = scene.decide()
    numbers = [n for n, d in enumerate(decisions) if d.reserved is not None and d.declined is None]
    assert len(numbers) <= 1
    for number in numbers:
        kept = decisions[number].reserved
        assert kept is not None
        assert (NOW - kept.job.since).total_seconds() >= RESERVE_AFTER_S
        before, then = (after(scene.cards, part)[kept.node] for part in (decisions[:number], decisions))
        assert could_wait(kept.job, before), "it is kept where the job can start"
        for size in sizes_on(kept.job, before):
            then_room, room = room_at(then, size, NOW), room_at(before, size, NOW)
            if room is None or room.spare != kept.spare:
                continue  # not the method for which it is kept
            assert then_room is not None
            assert then_room.at == room.at


@many
@given(scenes())
def test_a_kept_card_is_the_one_with_the_earliest_room(scene: Scene) -> None:
    decisions = scene.decide()
    for number, d in enumerate(decisions):
        if d.reserved is None or d.declined is not None:
            continue
        left, job = after(scene.cards, decisions[:number]), d.reserved.job
        for before in decisions[:number]:
            if before.declined is not None and before.reserved is not None:
                del left[before.reserved.node]  # another job waits for all of it
        far = NOW + dt.timedelta(days=999)
        at = {
            node: [
                room.at or far for size in sizes_on(job, card) if (room := room_for(card, job, size, NOW)) is not None
            ]
            for node, card in left.items()
            if card.open and takes(card, job, scene.cards, largest_gpu(scene.cards))
        }
        assert min(at[d.reserved.node]) == min(moment for moments in at.values() for moment in moments)


@many
@given(scenes())
def test_no_job_starts_where_it_failed_while_another_card_could_hold_it(scene: Scene) -> None:
    cards = {card.node: card for card in scene.cards}
    for d in scene.decide():
        if d.placed is None:
            continue
        job, blamed = d.placed.job, d.placed.job.avoids
        if not blamed & {d.placed.node, cards[d.placed.node].host}:
            continue
        sound = [card for card in scene.cards if not blamed & {card.node, card.host}]
        idle = [replace(card, running=(), user_limit=None) for card in sound if card.open]
        largest = largest_gpu(scene.cards)
        fits = [c for c in idle if could_start(replace(job, avoids=frozenset(), bf16=None), c, idle)]
        assert not [c for c in fits if not c.processor or largest == 0 or (job.least or 0) > largest]


@many
@given(scenes())
def test_what_a_job_avoids_never_makes_it_wait_for_nothing(scene: Scene) -> None:
    """On the fleet without anything else that we run, a job starts if it would start with no such memory."""
    idle = [replace(card, running=()) for card in scene.cards]
    for job in scene.jobs:
        forgets = replace(job, avoids=frozenset(), bf16=None)
        assert bool(started(decide([job], idle))) == bool(started(decide([forgets], idle)))


def sizes_on(job: Waiting, card: Card) -> list[int]:
    """Bytes with which the job could run there, by method."""
    needs = [job.need.of(method) for method in job.methods]
    return [max(1, card.capacity) if need is None or job.least is None else need for need in needs]


def could_wait(job: Waiting, card: Card) -> bool:
    return any(room_at(card, size, NOW) is not None for size in sizes_on(job, card))


@given(scenes())
def test_a_caller_that_stops_early_has_seen_the_same_decisions(scene: Scene) -> None:
    whole = scene.decide()
    lazily = place(Lines(scene.jobs), scene.cards, scene.charges, NOW)
    assert next(lazily, None) == (whole[0] if whole else None)


class Apart(Lines):
    """A queue in which each job is a line."""

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        return sorted(self._jobs.values(), key=lambda job: job.job_id)

    def after(self, job: Waiting) -> Waiting | None:
        return None


@many
@given(scenes(), st.data())
def test_what_is_not_read_of_a_line_could_not_start(scene: Scene, data: st.DataObject) -> None:
    forms = data.draw(st.lists(st.sampled_from(scene.jobs), min_size=1, max_size=3))
    jobs = [
        replace(data.draw(st.sampled_from(forms)), job_id=job.job_id, since=job.since, again=job.again)
        for job in scene.jobs
    ]
    found = [tuple(place(kind(jobs), scene.cards, scene.charges, NOW)) for kind in (Lines, Apart)]
    assert found[0] == found[1]


class Fitting(Lines):
    """A queue that leaves out what it may."""

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        every = super().firsts(also)
        return [
            job
            for job in every
            if job.job_id in also or (job.bound or 0) <= room or waited(job, NOW) >= RESERVE_AFTER_S
        ]


@many
@given(scenes())
def test_what_has_no_room_and_is_young_changes_no_decision(scene: Scene) -> None:
    found = [tuple(place(kind(scene.jobs), scene.cards, scene.charges, NOW)) for kind in (Lines, Fitting)]
    assert found[0] == found[1]
