"""Cards: when they have room, and what could start on them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.placement.cards import (
    SHARED_FROM_BYTES,
    Occupant,
    could_start,
    default_max_jobs,
    room_at,
)
from loractl.common.units import GIB

from .scenes import NOW, Scene, decide, scenes, started


@given(scenes(), st.integers(1, 90).map(lambda gib: gib * GIB))
def test_room_is_there_when_those_that_must_end_first_have_and_not_before(scene: Scene, size: int) -> None:
    for card in scene.cards:
        room = room_at(card, size, NOW)
        if room is None:
            assert size > card.capacity or card.max_jobs < 1
            continue
        stay = tuple(job for job in card.running if job not in room.after)
        then = replace(card, running=stay)
        assert then.free - size == room.spare
        assert then.slots - 1 == room.spare_slots
        for last in room.after[-1:]:
            sooner = replace(card, running=(*stay, last))
            assert sooner.capacity - sooner.taken < size or not sooner.slots
        ends = [job.ends for job in room.after]
        assert (room.at is None) == (None in ends)
        assert room.at is None or room.at == max([NOW, *(end for end in ends if end is not None)])


@given(scenes())
def test_could_start_is_what_the_rule_would_do_with_that_job_and_card_alone(scene: Scene) -> None:
    for job in scene.jobs:
        for card in scene.cards:
            full = [c.with_job(Occupant(job_id=9, user="z", reserved=c.total)) for c in scene.cards if c is not card]
            alone = [replace(c, user_limit=None) for c in (card, *full)]
            got = decide([job], alone)
            given = started(got) or any(d.declined is not None for d in got)  # it may wait until that card is empty
            assert (card.open and could_start(job, card, scene.cards)) == bool(given)


def test_cards_are_shared_from_forty_gib_on() -> None:
    assert [default_max_jobs(size) for size in (SHARED_FROM_BYTES - 1, SHARED_FROM_BYTES)] == [1, 4]
