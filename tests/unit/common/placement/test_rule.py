"""The placement rule, by examples."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.placement.lines import Lines, Waiting
from loractl.common.placement.preemption import give_way
from loractl.common.placement.rule import PRIORITY_DAYS, RESERVE_AFTER_S, USE_S, Term, deciding, place, turns
from loractl.common.placement.shares import LAST
from loractl.common.units import GIB

from .scenes import AUTO, LABELS, NOW, a_card, a_job, decide, order, running, started


def test_auto_takes_lora_where_some_card_has_room_for_it_and_else_qlora() -> None:
    job = a_job(1, methods=AUTO, need=Need(lora=20 * GIB, qlora=8 * GIB))
    small, large = a_card("a:0", 12), a_card("a:1", 24)
    (first,) = decide([job], [small, large])
    assert first.placed is not None
    assert (first.placed.node, first.placed.method, first.placed.reserved) == ("a:1", Method.LORA, 20 * GIB)
    (second,) = decide([job], [small, replace(large, running=(running(9, 20),))])
    assert second.placed is not None
    assert (second.placed.node, second.placed.method, second.placed.reserved) == ("a:0", Method.QLORA, 8 * GIB)


def test_a_job_may_prefer_qlora() -> None:
    job = a_job(1, methods=(Method.QLORA, Method.LORA), need=Need(lora=20 * GIB, qlora=8 * GIB))
    (decision,) = decide([job], [a_card(gib=80)])
    assert decision.placed is not None
    assert decision.placed.method is Method.QLORA


def test_priority_goes_before_share_and_share_before_age() -> None:
    jobs = [
        a_job(1, user="ada"),
        a_job(2, user="bob"),
        a_job(3, user="cyd", priority=1),
    ]
    cards = [a_card(f"a:{n}", 8) for n in range(3)]
    assert order(decide(jobs, cards, {"ada": 5.0, "bob": 1.0, "cyd": 9.0})) == [3, 2, 1]
    assert order(decide(jobs, cards)) == [3, 1, 2]


def test_a_second_job_of_one_user_comes_after_the_first_one_of_another() -> None:
    jobs = [a_job(1, user="ada"), a_job(2, user="ada"), a_job(3, user="bob")]
    assert order(decide(jobs, [a_card(f"a:{n}", 8) for n in range(2)])) == [1, 3]


def test_small_jobs_go_to_small_idle_cards_and_to_a_shared_one_last() -> None:
    shared = a_card("a:0", 80, max_jobs=4, running=(running(9, 60),))
    cards = [shared, a_card("a:1", 48, max_jobs=4), a_card("a:2", 12)]
    assert started(decide([a_job(n) for n in (1, 2, 3)], cards)) == {1: "a:2", 2: "a:1", 3: "a:0"}


def test_a_card_is_kept_for_the_first_that_waited_half_an_hour_where_it_can_start_first() -> None:
    soon = a_card("a:0", 80, max_jobs=4, running=(running(8, 60, 2000),))
    late = a_card("a:1", 80, max_jobs=4, running=(running(9, 60, 6000),))
    large, small = a_job(1, 70, age_s=RESERVE_AFTER_S), a_job(2, 15, user="bob")
    kept, placed = decide([large, small], [soon, late])
    assert kept.reserved is not None
    assert (kept.reserved.job.job_id, kept.reserved.node, kept.reserved.spare) == (1, "a:0", 10 * GIB)
    assert placed.placed is not None
    assert placed.placed.node == "a:1"
    young = replace(large, since=NOW - dt.timedelta(seconds=RESERVE_AFTER_S - 1))
    assert [d.reserved for d in decide([young, small], [soon, late])] == [None]


def test_what_the_kept_job_leaves_over_may_be_used() -> None:
    card = a_card("a:0", 80, max_jobs=4, running=(running(8, 60, 600),))
    jobs = [a_job(1, 70, age_s=RESERVE_AFTER_S), a_job(2, 11, user="bob"), a_job(3, 10, user="cyd"), a_job(4, 1)]
    assert started(decide(jobs, [card])) == {3: "a:0"}


def test_a_job_waits_for_an_empty_card_before_sharing_one_has_cost_it_that_long() -> None:
    """Next to k others it is taken to run at 1 / (1 + k / 2) of its speed: two hours next to two take two more."""
    shared = a_card("a:0", 80, max_jobs=4, running=(running(8, 10, 9000), running(9, 10)))
    small = a_card("a:1", 24, running=(running(7, 10, 7100),))
    job = a_job(1, 20, left_s=7200.0)
    (kept,) = decide([job], [shared, small])
    assert kept.reserved is not None and kept.declined is not None
    assert (kept.reserved.node, kept.declined.node) == ("a:1", "a:0")
    sooner = replace(job, left_s=7100.0)
    assert started(decide([sooner], [shared, small])) == {1: "a:0"}
    waited = replace(job, since=NOW - dt.timedelta(seconds=101))
    assert started(decide([waited], [shared, small])) == {1: "a:0"}, "both sides are the same at any time"
    large = replace(job, need=Need(lora=30 * GIB, qlora=None))
    assert started(decide([large], [shared, small])) == {1: "a:0"}
    late = replace(small, running=(running(7, 10, -5),))
    assert started(decide([job], [shared, late])) == {1: "a:0"}, "nobody knows when it ends"
    asked = replace(small, running=(replace(running(7, 10, 9), gives_way_to=1),))
    assert started(decide([job], [shared, asked])) == {1: "a:0"}, "what was asked for is taken"
    assert started(decide([job, replace(job, job_id=2)], [shared, small])) == {2: "a:0"}, "it is kept for one of them"
    assert started(tuple(place(Lines([job]), [shared, small], {}, NOW, by_share=True))) == {1: "a:0"}


def test_what_was_measured_of_a_card_decides_whether_a_job_waits_for_an_empty_one() -> None:
    """Of two hours, 0.4 for each of two others are 5,760 s."""
    shared = a_card("a:0", 80, max_jobs=4, running=(running(8, 10, 9000), running(9, 10)))
    small = a_card("a:1", 24, running=(running(7, 10, 7100),), contention=0.0)
    job = a_job(1, 20, left_s=7200.0)
    for contention, waits in ((0.0, False), (0.4, False), (0.5, True), (None, True), (2.0, True)):
        (decision,) = decide([job], [replace(shared, contention=contention), small])
        assert (decision.declined is not None) == waits, contention
    (decision,) = decide([job], [replace(shared, contention=0.4), replace(small, running=(running(7, 10, 5700),))])
    assert decision.declined is not None


def test_a_job_goes_where_fewest_others_run() -> None:
    two = a_card("a:0", 48, max_jobs=4, running=(running(8, 10), running(9, 10)))
    one = a_card("a:1", 80, max_jobs=4, running=(running(7, 10),))
    assert started(decide([a_job(1, 20)], [two, one])) == {1: "a:1"}
    assert started(tuple(place(Lines([a_job(1, 20)]), [two, one], {}, NOW, by_share=True))) == {1: "a:0"}, "as before"


def test_nothing_starts_on_a_card_that_is_kept_until_it_is_empty() -> None:
    """Not even beside the job that runs there."""
    shared = a_card("a:0", 80, max_jobs=2, running=(running(8, 10),))
    soon = a_card("a:1", 80, max_jobs=2, running=(running(7, 10, 60),))
    first, second = a_job(1, 70, left_s=3600.0), a_job(2, 20, left_s=7200.0)
    kept, other = decide([first, second], [shared, soon])
    assert kept.declined is not None and kept.reserved is not None and kept.reserved.node == "a:1"
    assert started((other,)) == {2: "a:0"}


def first_of(*jobs: Waiting, charges: dict[str, float] | None = None) -> int:
    """The job that gets the only place."""
    (number,) = order(decide(jobs, [a_card(gib=8)], charges))
    return number


def test_the_least_work_goes_first_and_each_day_of_waiting_halves_it() -> None:
    long, short = a_job(1, left_s=8 * 3600), a_job(2, left_s=3600)
    assert first_of(long, short) == 2
    assert first_of(replace(long, since=NOW - dt.timedelta(days=2.9)), short) == 2
    assert first_of(replace(long, since=NOW - dt.timedelta(days=3.1)), short) == 1


def test_what_a_user_has_used_adds_up_to_two_hours_to_each_job() -> None:
    mine, short = a_job(1, user="bob", left_s=7000), a_job(2, left_s=60)
    assert first_of(mine, short, charges={"ada": 99.0}) == 1
    assert first_of(mine, short, charges={"ada": 99.0, "bob": 99.0}) == 2
    assert first_of(mine, short, charges={"ada": 30.0, "eve": 69.0}) == 2


def test_a_job_of_lower_priority_goes_first_once_it_has_waited_two_weeks_longer_for_each_step() -> None:
    low, high = a_job(1), a_job(2, priority=2)
    assert first_of(replace(low, left_s=60), replace(high, left_s=900_000)) == 2
    assert first_of(replace(low, since=NOW - dt.timedelta(days=27.9)), high) == 2
    assert first_of(replace(low, since=NOW - dt.timedelta(days=28.1)), high) == 1


def test_a_user_beyond_a_soft_quota_comes_last_and_not_for_ever() -> None:
    beyond = a_job(1, left_s=60)
    assert first_of(beyond, a_job(2, user="bob", left_s=1e6), charges={"ada": LAST + 9.0, "bob": 99.0}) == 2
    old = replace(beyond, since=NOW - dt.timedelta(days=45))
    assert first_of(old, a_job(2, user="bob"), charges={"ada": LAST + 9.0, "bob": 99.0}) == 1


@given(st.floats(1, 1e7), st.floats(1, 1e7), st.floats(0, 1), st.integers(-2, 2), st.floats(0, 1e7))
def test_a_job_is_passed_only_by_those_that_come_within_its_bound(
    left_s: float, other_s: float, part: float, priority: int, later_s: float
) -> None:
    """The bound of docs/placement.md, whatever the load and however many come."""
    charges = {"ada": part * 100, "bob": (1 - part) * 100}
    job = a_job(1, left_s=left_s, user="ada", age_s=later_s)
    passes = turns(charges)(a_job(2, left_s=other_s, user="bob", priority=priority)) < turns(charges)(job)
    bound = math.log2((left_s + USE_S * part) / (other_s + USE_S * (1 - part))) + PRIORITY_DAYS * priority
    if abs(later_s / 86400 - bound) > 1e-6:
        assert passes == (later_s / 86400 < bound)


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 99), st.floats(0, 99), st.floats(0, 9e5), st.integers(-1, 1))
def test_the_term_that_decides_is_one_that_favours_the_first(
    mine_s: float, other_s: float, mine: float, others: float, later_s: float, priority: int
) -> None:
    charges = {"ada": mine, "bob": others}
    pair = [a_job(1, left_s=mine_s, age_s=later_s), a_job(2, left_s=other_s, user="bob", priority=priority)]
    first, other = sorted(pair, key=turns(charges))
    match deciding(first, other, charges):
        case Term.PRIORITY:
            assert first.priority > other.priority
        case Term.LEFT:
            assert first.left_s < other.left_s
        case Term.USE:
            assert charges[first.user] < charges[other.user]
        case Term.WAIT:
            assert first.since < other.since
        case None:
            assert turns(charges)(first)[0] == pytest.approx(turns(charges)(other)[0])


def test_a_job_that_could_never_run_keeps_its_user_from_no_reservation() -> None:
    card = a_card("a:0", 80, max_jobs=4, running=(running(8, 60, 600),))
    jobs = [a_job(1, 200, age_s=9000), a_job(2, 80, age_s=RESERVE_AFTER_S), a_job(3, 15, user="bob")]
    decisions = decide(jobs, [card], {"bob": 9.0})
    assert [d.reserved.job.job_id for d in decisions if d.reserved is not None] == [2]
    assert started(decisions) == {}


def test_a_job_of_unknown_need_gets_a_whole_empty_card() -> None:
    shared = a_card("a:0", 80, max_jobs=4, running=(running(9, 1),))
    assert started(decide([a_job(1, None)], [shared])) == {}
    (decision,) = decide([a_job(1, None)], [shared, a_card("a:1", 24, margin=GIB, outside=2 * GIB)])
    assert decision.placed is not None
    assert (decision.placed.node, decision.placed.reserved) == ("a:1", 21 * GIB)


def test_a_processor_takes_what_no_gpu_could_ever_hold_or_all_where_there_is_none() -> None:
    processor = a_card("a:cpu", 64, processor=True)
    busy = a_card("a:0", 24, running=(running(9, 24),))
    assert started(decide([a_job(1, 24)], [processor, busy])) == {}
    assert started(decide([a_job(1, 25)], [processor, busy])) == {1: "a:cpu"}
    assert started(decide([a_job(1, 24)], [processor])) == {1: "a:cpu"}
    assert started(decide([a_job(1, None)], [processor, busy])) == {}
    assert started(decide([a_job(1, None)], [processor])) == {1: "a:cpu"}


def test_labels_of_a_job_must_all_be_the_nodes() -> None:
    job = a_job(1, requires=LABELS)
    assert started(decide([job], [a_card("a:0"), a_card("a:1", 80, labels=LABELS | {("room", "2")})])) == {1: "a:1"}
    assert started(decide([job], [a_card("a:0")])) == {}


def test_a_user_runs_no_more_than_the_limit() -> None:
    cards = [a_card("a:0", 8, user_limit=2, running=(running(9, 8, user="ada"),)), a_card("a:1"), a_card("a:2")]
    assert started(decide([a_job(1), a_job(2), a_job(3, user="bob")], cards)) == {1: "a:1", 3: "a:2"}


def test_a_closed_card_takes_nothing() -> None:
    assert decide([a_job(1)], [a_card(open=False)]) == ()


def test_a_job_whose_finished_result_lies_on_a_box_is_that_box_s_alone() -> None:
    owl, heron = a_card("owl:0", 24), a_card("heron:1", 80)
    job = a_job(1, age_s=RESERVE_AFTER_S, only_host="heron")
    assert started(decide([job, a_job(2, user="bob")], [owl, heron])) == {1: "heron:1", 2: "owl:0"}
    assert started(decide([job], [owl, replace(heron, open=False)])) == {}
    kept, other = decide([job, a_job(2, user="bob")], [owl, replace(heron, running=(running(9, 80, 600),))])
    assert kept.reserved is not None and kept.reserved.node == "heron:1"
    assert other.placed is not None and other.placed.node == "owl:0", "the other box is not kept from others"


def test_a_job_keeps_off_the_card_that_failed_it_while_another_could_hold_it() -> None:
    bad, good = a_card("a:0", 12), a_card("b:0", 24)
    job = a_job(1, avoids=frozenset({"a:0"}))
    assert started(decide([job], [bad, good])) == {1: "b:0"}, "not on the one that it would fill best"
    assert started(decide([a_job(2), job], [bad, good])) == {1: "b:0", 2: "a:0"}, "another job may have that"
    busy = replace(good, running=(running(9, 24),))
    assert started(decide([job], [bad, busy])) == {}, "it waits for the other, which can hold it later"


def test_a_job_takes_the_card_that_failed_it_where_no_other_could_hold_it() -> None:
    bad, good = a_card("a:0", 80), a_card("b:0", 24)
    job = a_job(1, 40, avoids=frozenset({"a:0"}))
    for others in (
        [],
        [good],
        [replace(good, total=80 * GIB, open=False)],
        [replace(good, total=80 * GIB, max_jobs=0)],
    ):
        assert started(decide([job], [bad, *others])) == {1: "a:0"}
    lent = replace(good, total=80 * GIB, outside=41 * GIB)
    assert started(decide([job], [bad, lent])) == {1: "a:0"}, "other people's programs may stay for ever"


def test_a_job_waits_for_a_card_of_its_checkpoint_s_number_format_while_one_is_open() -> None:
    old, new = replace(a_card("a:0", 24), bf16=False), replace(a_card("b:0", 24), bf16=True)
    busy = replace(new, running=(running(9, 24),))
    job = a_job(1, bf16=True)
    assert started(decide([job], [old, busy])) == {}
    assert started(decide([replace(job, bf16=None)], [old, busy])) == {1: "a:0"}
    assert started(decide([replace(job, bf16=False)], [old, busy])) == {1: "a:0"}
    for other in (replace(busy, open=False), replace(busy, total=2 * GIB), replace(busy, bf16=None)):
        assert started(decide([job], [old, other])) == {1: "a:0"}, "else it goes on in another format"
    failed = replace(job, avoids=frozenset({"b:0"}))
    assert started(decide([failed], [old, new])) == {1: "a:0"}, "rather than on the one that failed it"


def test_a_box_that_failed_a_job_is_avoided_with_all_its_cards() -> None:
    cards = [a_card("a:0", 8), a_card("a:1", 8), a_card("b:0", 80)]
    assert started(decide([a_job(1, avoids=frozenset({"a"}))], cards)) == {1: "b:0"}


def test_a_kept_card_is_none_that_failed_the_job() -> None:
    soon, late = (
        a_card(f"{box}:0", 80, running=(running(n, 60, ends),)) for box, n, ends in (("a", 8, 60), ("b", 9, 600))
    )
    job = a_job(1, 70, age_s=RESERVE_AFTER_S, avoids=frozenset({"a"}))
    (kept,) = decide([job], [soon, late, a_card("c:0", 8)])
    assert kept.reserved is not None
    assert kept.reserved.node == "b:0"


@pytest.mark.parametrize(
    ("needs", "going"),
    [(10, {4}), (14, {1}), (18, {3, 4}), (20, {2, 4}), (26, {1, 4}), (34, {1, 3, 4}), (50, None)],
)
def test_the_fewest_give_way_then_those_of_the_lowest_priority_then_the_smallest(
    needs: int, going: set[int] | None
) -> None:
    """By size alone, 1 and 2 would stop for 18 GiB."""
    jobs = {1: (16, 3), 2: (10, 1), 3: (8, 1), 4: (10, 0)}  # GiB and priority
    there = tuple(replace(running(n, gib), preemptible=True, priority=priority) for n, (gib, priority) in jobs.items())
    asked = give_way(a_job(9, needs, priority=5), [a_card("a:0", 44, max_jobs=8, running=there)])
    assert (None if asked is None else set(asked[1])) == going
