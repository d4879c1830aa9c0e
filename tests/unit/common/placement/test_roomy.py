"""Room that nobody else wants: who gets it, and for whom it stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loractl.common.job.method import RoomyForm
from loractl.common.placement.cards import Card
from loractl.common.placement.roomy import with_room
from loractl.common.placement.rule import RESERVE_AFTER_S, Placement
from loractl.common.units import GIB

from .scenes import a_card, a_job, decide, running

FORMS = tuple(RoomyForm(micro_batch=rows, bytes=gib * GIB, planned=gib * GIB) for rows, gib in ((4, 40), (2, 23)))


def placed_on(card: Card, gib: float = 8) -> Placement:
    (decision,) = decide([a_job(1, gib)], [card])
    assert decision.placed is not None
    return decision.placed


def nobody(_: int) -> bool:
    return False


def form_on(card: Card) -> int | None:
    found = with_room(placed_on(card), card, FORMS, nobody)
    assert found.reserved == (8 * GIB if found.form is None else found.form.bytes)
    return None if found.form is None else found.form.micro_batch


@pytest.mark.parametrize(("total", "rows"), [(80, 4), (40, 4), (39, 2), (24, 2), (22, None)])
def test_a_job_alone_takes_the_fastest_form_that_its_card_holds(total: int, rows: int | None) -> None:
    assert form_on(a_card(gib=total)) == rows


@pytest.mark.parametrize(("max_jobs", "given"), [(1, True), (2, False)])
def test_every_second_block_is_recomputed_only_where_no_other_job_may_come(max_jobs: int, given: bool) -> None:
    """It gains too little for the room of one that comes later."""
    half = replace(FORMS[-1], bytes=12 * GIB, half=True)
    card = a_card(gib=16, max_jobs=max_jobs)
    assert (with_room(placed_on(card), card, (*FORMS, half), nobody).form == half) is given


def test_what_others_hold_or_the_owner_keeps_is_no_room() -> None:
    assert form_on(a_card(gib=80, margin=20 * GIB, outside=21 * GIB)) == 2


def test_beside_another_job_nobody_has_the_room() -> None:
    assert form_on(a_card(gib=80, max_jobs=4, running=(running(9, 4),))) is None


def test_a_processor_gives_no_room() -> None:
    assert form_on(a_card(gib=80, processor=True)) is None


def test_a_ready_job_that_would_fit_beside_the_need_has_the_room() -> None:
    card, asked = a_card(gib=80, max_jobs=4), list[int]()

    def somebody(free: int) -> bool:
        asked.append(free)
        return True

    assert with_room(placed_on(card), card, FORMS, somebody).form is None
    assert asked == [72 * GIB]


def test_on_a_card_of_one_job_nothing_fits_beside_it() -> None:
    card, asked = a_card(gib=80), list[int]()
    with_room(placed_on(card), card, FORMS, lambda free: bool(asked.append(free)))
    assert asked == [0]


def test_room_that_is_kept_for_another_job_stays_his() -> None:
    """One to which the card's job gives way has its room kept, though it is not there yet."""
    leaves = replace(running(9, 40, 60), gives_way_to=2)
    card = a_card(gib=80, max_jobs=4, running=(leaves,))
    kept, later = decide([a_job(2, 50, age_s=RESERVE_AFTER_S, priority=1), a_job(3, 8)], [card])
    assert kept.reserved is not None and later.placed is not None
    assert later.placed.room == 30 * GIB, "what the one before him leaves"
    idle = replace(card, running=())
    assert with_room(later.placed, idle, FORMS, nobody).form == FORMS[1]
