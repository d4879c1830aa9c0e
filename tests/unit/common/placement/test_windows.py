"""Cards whose workers stop: what begins there, and what is kept or gathered only within their time."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import pytest

from loractl.common.job.method import Need, Parallel, SharedNeed
from loractl.common.placement.cards import Card
from loractl.common.placement.lines import ANY_ROOM, Lines, Waiting
from loractl.common.placement.refusals import out_of_reach
from loractl.common.placement.rule import place
from loractl.common.units import GIB

from .scenes import NOW, a_card, a_job, decide, running, started

HOUR = 3600.0


def ending(left_s: float, node: str = "a:0", window_s: float = 4 * HOUR, **more: object) -> Card:
    return a_card(node, **{"left_s": left_s, "window_s": window_s, **more})  # type: ignore[arg-type]


def shared(job_id: int, gib: float = 20, **more: object) -> Waiting:
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=int(gib * GIB), qlora=None))
    return a_job(job_id, 36, gangs=(way,), alone=False, **more)


@pytest.mark.parametrize(
    ("took_s", "left_s", "window_s", "starts"),
    [
        (600, 601, 4 * HOUR, True),
        (600, 599, 4 * HOUR, False),
        (None, HOUR, 24 * HOUR, True),  # not measured: an hour will do
        (None, HOUR - 1, 24 * HOUR, False),
        (None, 600, 1200, True),  # and half of a short allocation
        (None, 599, 1200, False),
        (3 * HOUR, None, None, True),  # its worker stays
    ],
)
def test_a_job_starts_where_it_can_store_a_checkpoint_before_the_card_goes(
    took_s: float | None, left_s: float | None, window_s: float | None, starts: bool
) -> None:
    card = replace(a_card(), left_s=left_s, window_s=window_s)
    assert bool(started(decide([a_job(1, checkpoint_s=took_s)], [card]))) is starts


def test_a_job_that_is_too_long_for_a_card_leaves_it_to_the_next() -> None:
    jobs = [a_job(1, checkpoint_s=2 * HOUR), a_job(2, checkpoint_s=60.0)]
    assert started(decide(jobs, [ending(HOUR)])) == {2: "a:0"}
    assert started(decide(jobs, [ending(HOUR), a_card("b:0", 80)])) == {1: "b:0", 2: "a:0"}


class ReadLines(Lines):
    """A queue that counts the jobs that it gives."""

    read = 0

    def firsts(self, also: Set[int] = frozenset(), room: int = ANY_ROOM) -> list[Waiting]:
        found = super().firsts(also, room)
        self.read += len(found)
        return found

    def after(self, job: Waiting) -> Waiting | None:
        self.read += 1
        return super().after(job)


LONG, SHORT = 10 * HOUR, 60.0


@pytest.mark.parametrize("age_s", [0.0, HOUR, 2e5])
@pytest.mark.parametrize(
    "cards",
    [
        [ending(4 * HOUR)],
        [ending(4 * HOUR), ending(12 * HOUR, "b:0", 12 * HOUR, gib=4)],
        [ending(4 * HOUR), a_card("b:0", 4)],
        [ending(4 * HOUR), a_card("b:0", 200, processor=True)],
        [ending(4 * HOUR), ending(12 * HOUR, "b:0", 12 * HOUR, running=(running(9, 20),))],
        [ending(4 * HOUR), ending(12 * HOUR, "b:0", 12 * HOUR, running=(running(9, 20, 3 * HOUR),))],
        [ending(4 * HOUR), ending(12 * HOUR, "b:0", 12 * HOUR, running=(running(9, 20, 3 * HOUR),), stuck=True)],
    ],
    ids=["one", "a small one", "a small one that stays", "a processor", "one busy for no known time",
         "one busy for too long", "one that takes nothing"],
)  # fmt: skip
def test_no_number_of_jobs_that_are_too_long_keeps_a_card_from_those_behind_them(
    cards: list[Card], age_s: float
) -> None:
    """Nor are they read: a claim must not go through a whole queue of them."""
    long = [a_job(number, age_s=age_s, checkpoint_s=LONG) for number in range(1, 200)]
    queue = ReadLines([*long, a_job(200, age_s=age_s, checkpoint_s=SHORT)])
    assert started(tuple(place(queue, cards, {}, NOW))) == {200: "a:0"}
    assert queue.read <= 3


def test_a_long_job_that_a_card_will_have_time_for_is_kept_its_place() -> None:
    busy = ending(12 * HOUR, "b:0", 12 * HOUR, running=(running(9, 20, HOUR),))
    jobs = [*(a_job(number, age_s=HOUR, checkpoint_s=LONG) for number in (1, 2)), a_job(3, 3, checkpoint_s=SHORT)]
    found = decide(jobs, [ending(4 * HOUR), busy])
    assert [(d.reserved.job.job_id, d.reserved.node) for d in found if d.reserved] == [(1, "b:0")]
    assert started(found) == {3: "a:0"}


@pytest.mark.parametrize(("ends_s", "kept"), [(1800.0, True), (3500.0, False), (None, False)])
def test_a_card_is_kept_for_a_job_only_where_it_has_time_for_it_then(ends_s: float | None, kept: bool) -> None:
    card = ending(HOUR, gib=24, running=(running(9, 20, ends_s),), max_jobs=4)
    found = decide([a_job(1, 20, age_s=HOUR, checkpoint_s=600.0), a_job(2, 3, checkpoint_s=60.0)], [card])
    assert any(decision.reserved is not None for decision in found) is kept
    assert (2 in started(found)) is True, "what is kept leaves it its 4 GiB"


def test_several_cards_are_gathered_only_within_the_time_of_each() -> None:
    """The one that is free already would idle until it goes."""
    free, busy = ending(600, "a:0", gangs=True), a_card("a:1", gangs=True, running=(running(9, 20, 900.0),))
    job, small = shared(1, age_s=HOUR, checkpoint_s=60.0), a_job(2, 3, checkpoint_s=60.0)
    assert started(decide([job, small], [free, busy])) == {2: "a:0"}
    longer = replace(free, left_s=1000.0)
    found = decide([job, small], [longer, busy])
    assert [one.node for d in found if d.reserved for one in d.reserved.cards] == ["a:0", "a:1"]
    assert started(decide([job], [longer, a_card("a:1", gangs=True)])) == {1: "a:0"}
    assert started(decide([shared(1, checkpoint_s=2000.0)], [longer, a_card("a:1", gangs=True)])) == {}


def test_a_job_keeps_off_no_card_for_one_that_goes_too_soon() -> None:
    failed = a_job(1, avoids=frozenset({"b:0"}), checkpoint_s=HOUR)
    assert started(decide([failed], [ending(600), a_card("b:0")])) == {1: "b:0"}
    assert started(decide([failed], [ending(2 * HOUR), a_card("b:0")])) == {1: "a:0"}


def test_the_reach_says_that_time_is_short() -> None:
    card = ending(HOUR, window_s=2 * HOUR)
    waits, never = a_job(1, checkpoint_s=1.5 * HOUR), a_job(1, checkpoint_s=3 * HOUR)
    assert out_of_reach(waits, [card]) is None
    said = "needs 3 h 00 min to store its first checkpoint, and no worker stays longer than 2 h 00 min"
    assert out_of_reach(never, [card]) == said
    assert out_of_reach(never, [card, a_card("b:0")]) is None, "one stays"
    assert out_of_reach(never, [card, a_card("b:0", 4)]) == said, "but is too small"
