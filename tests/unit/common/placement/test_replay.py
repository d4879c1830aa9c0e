"""The virtual clock: when jobs start and end, what sharing costs, and that nothing starves under the real rule."""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines import best_fit, fifo, shortest_first
from loractl.common.job.method import Method, Need, Parallel, SharedNeed
from loractl.common.placement import rule as rule_module
from loractl.common.placement.cards import Card, Occupant, Yields
from loractl.common.placement.gangs import GangShare
from loractl.common.placement.lines import Waiting
from loractl.common.placement.preemption import COST_SHARE, undisturbed_s
from loractl.common.placement.replay import PlacementRule, Remaining, Replay, ReplayedFleet, ReplayedJob, Rule, replay
from loractl.common.placement.rule import RESERVE_AFTER_S, USE_S, Placement
from loractl.common.placement.shares import charge, decayed
from loractl.common.units import GIB

from ....conftest import examples

START = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
HOUR = 3600.0
SOMEWHERE = frozenset({("room", "2")})


def at(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def a_job(
    job_id: int, arrival: float, gib: float, seconds: float | None, *, user: str = "ada", priority: int = 0
) -> ReplayedJob:
    waiting = Waiting(
        job_id=job_id,
        user=user,
        priority=priority,
        since=at(arrival),
        methods=(Method.LORA,),
        need=Need(lora=int(gib * GIB), qlora=None),
    )
    return ReplayedJob(waiting=waiting, seconds=seconds)


def a_card(gib: float = 80, node: str = "a:0", max_jobs: int = 4, running: Sequence[Occupant] = ()) -> Card:
    return Card(node=node, total=int(gib * GIB), max_jobs=max_jobs, running=tuple(running))


def starts(done: Replay) -> dict[int, float]:
    return {job_id: (run.started - START).total_seconds() for job_id, run in done.runs.items()}


def ends(done: Replay) -> dict[int, float | None]:
    return {
        job_id: None if run.ended is None else (run.ended - START).total_seconds() for job_id, run in done.runs.items()
    }


# --- the clock ---


def test_a_job_starts_when_it_arrives_or_when_there_is_room() -> None:
    jobs = [yielding(a_job(1, 10, 50, 100)), yielding(a_job(2, 20, 50, 100)), yielding(a_job(3, 30, 20, 5))]
    done = replay(jobs, [a_card()], START)
    assert starts(done) == {1: 10, 3: 30, 2: 110}
    assert ends(done) == {1: 110, 3: 35, 2: 210}
    assert [((when - START).total_seconds(), size // GIB) for when, size in done.reserved] == [
        (0, 0),
        (10, 50),
        (30, 70),
        (35, 50),
        (110, 50),
        (210, 0),
    ]


def test_a_job_starts_once_though_one_before_it_in_its_line_waits_for_an_empty_card() -> None:
    """While job 9 ends, job 1 has its card kept, and job 2 shares the other one."""
    first, second = (replace(a_job(number, 0, 20, None).waiting, left_s=7200.0) for number in (1, 2))
    runs = [Occupant(job_id=8, user="bob", reserved=GIB), Occupant(job_id=9, user="bob", reserved=GIB, ends=at(60))]
    cards = [a_card(node="a:0", running=runs[:1]), a_card(gib=24, node="a:1", max_jobs=1, running=runs[1:])]
    line = {1: second}
    rule = PlacementRule(waiting=Remaining([first], lambda job: line.get(job.job_id)))
    done = replay([], cards, START, rule, until=lambda runs: len(runs) > 2)
    assert starts(done) == {2: 0, 1: 60}
    assert {number: run.node for number, run in done.runs.items()} == {2: "a:0", 1: "a:1"}
    assert done.reserved[-1][1] == 41 * GIB, "both, and job 8"


def test_jobs_slow_each_other_as_it_was_measured_on_their_card() -> None:
    def last(contention: float | None) -> float:
        card = replace(a_card(), contention=contention)
        return max(ends(replay([a_job(1, 0, 8, 100), a_job(2, 0, 8, 100)], [card], START, contention=None)).values())

    assert [last(0.0), last(0.2), last(1.0), last(None)] == pytest.approx([100, 120, 200, 150])


def test_jobs_on_one_card_slow_each_other_by_the_contention() -> None:
    jobs = [yielding(a_job(1, 0, 20, 100)), yielding(a_job(2, 50, 20, 100))]
    assert ends(replay(jobs, [a_card()], START)) == {1: 100, 2: 150}
    # alone until 50, then at half speed both: 1 ends at 150, 2 has 50 left and is alone again
    assert ends(replay(jobs, [a_card()], START, contention=1.0)) == {1: 150, 2: 200}
    two_thirds = ends(replay(jobs, [a_card()], START, contention=0.5))
    assert two_thirds == {1: pytest.approx(125), 2: pytest.approx(175)}


def test_a_start_takes_time_on_the_card_and_others_slow_it_too() -> None:
    jobs = [replace(a_job(n, 0, 20, 100), start_s=60) for n in (1, 2)]
    assert ends(replay(jobs, [a_card()], START)) == {1: 160, 2: 160}
    assert ends(replay(jobs, [a_card()], START, contention=1.0)) == {1: 320, 2: 320}


def test_it_goes_on_from_what_runs_already() -> None:
    busy = Occupant(job_id=9, user="bob", reserved=70 * GIB, ends=at(60))
    endless = Occupant(job_id=8, user="bob", reserved=20 * GIB)
    cards = [a_card(running=[busy]), a_card(24, "a:1", 1, [endless])]
    done = replay([a_job(1, -500, 24, None), a_job(2, -400, 80, 10)], cards, START)
    assert starts(done) == {1: 60}, "without a known duration the first never ends"
    assert ends(done) == {1: None}


def test_an_expected_end_beside_others_is_not_slowed_a_second_time() -> None:
    running = [Occupant(job_id=n, user="bob", reserved=30 * GIB, ends=at(60)) for n in (8, 9)]
    done = replay([a_job(1, 0, 80, 10)], [a_card(running=running)], START, contention=1.0)
    assert starts(done) == {1: 60}


def test_it_stops_once_the_job_that_was_asked_for_has_started() -> None:
    jobs = [a_job(n, 0, 80, 10) for n in range(1, 6)]
    assert list(replay(jobs, [a_card()], START, until=lambda runs: 3 in runs).runs) == [1, 2, 3]


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 80), st.integers(0, 200), st.sampled_from("abc")), max_size=25
    ),
    st.sampled_from((PlacementRule, fifo, shortest_first, best_fit)),
    st.sampled_from((0.0, 0.5, 1.0)),
)
def test_every_job_runs_once_and_no_card_is_ever_over_its_size(
    drawn: list[tuple[int, int, int, str]], make: Callable[[], Rule], contention: float
) -> None:
    drawn = sorted(drawn)
    jobs = [a_job(n, t, gib, s, user=user) for n, (t, gib, s, user) in enumerate(drawn, start=1)]
    jobs = [replace(job, start_s=9) if n % 2 else job for n, job in enumerate(jobs)]
    cards = [a_card(80), a_card(80, "a:1", 1), a_card(24, "a:2", 1)]
    done = replay(jobs, cards, START, make(), contention=contention)
    assert set(done.runs) == {job.waiting.job_id for job in jobs}
    for job in jobs:
        run = done.runs[job.waiting.job_id]
        assert run.started >= job.waiting.since
        assert run.ended is not None
        assert (run.ended - run.started).total_seconds() >= job.start_s + (job.seconds or 0) - 1e-3
    for card in cards:
        here = [run for run in done.runs.values() if run.node == card.node]
        for moment in {run.started for run in here}:
            beside = [r for r in here if r.started <= moment and r.ended is not None and moment < r.ended]
            assert sum(r.reserved for r in beside) <= card.total
            assert len(beside) <= card.max_jobs
    assert done.reserved[-1][1] == 0


def test_a_job_on_several_cards_holds_each_of_them_until_its_end() -> None:
    gang = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=20 * GIB, qlora=None))
    large = a_job(1, 0, 40, 100)
    large = replace(large, waiting=replace(large.waiting, gangs=(gang,)))
    cards = [replace(a_card(24, f"a:{n}", 1), gangs=True) for n in (0, 1)]
    done = replay([large, a_job(2, 1, 8, 10), a_job(3, 2, 8, 10)], cards, START)
    assert starts(done) == {1: 0, 2: 100, 3: 100}
    assert {done.runs[n].node for n in (2, 3)} == {"a:0", "a:1"}


@pytest.mark.parametrize("shared", [0, 1])
def test_a_job_on_several_cards_is_expected_to_leave_all_of_them_at_once(shared: int) -> None:
    busy = [Occupant(job_id=9, user="bob", reserved=GIB, ends=at(1000))]
    cards = [a_card(80, f"a:{n}", running=busy if n == shared else ()) for n in (0, 1)]
    floor, large = ReplayedFleet(cards, START, contention=1.0), a_job(1, 0, 20, 100)
    beside = (GangShare(node="a:1", bytes=GIB),)
    floor.start(Placement(job=large.waiting, node="a:0", method=Method.LORA, reserved=GIB, beside=beside), large)
    expected = [one.ends for card in floor.cards.values() for one in card.running if one.job_id == 1]
    assert expected == [at(200)] * 2, "one of the cards takes turns"


# --- other rules ---


def test_fifo_is_blocked_by_its_first_and_takes_whole_cards() -> None:
    jobs = [a_job(1, 0, 20, 100), a_job(2, 1, 80, 100), a_job(3, 2, 20, 10)]
    cards = [a_card(80, "a:1"), a_card(24, "a:0", 1)]
    assert starts(replay([*jobs, a_job(4, 3, 24, 1)], cards, START, fifo())) == {1: 0, 2: 1, 3: 100, 4: 101}


def test_shortest_first_and_best_fit_pass_over_what_does_not_fit() -> None:
    jobs = [a_job(1, 0, 70, 100), a_job(2, 1, 70, 50), a_job(3, 2, 5, 60), a_job(4, 3, 5, 20)]
    assert starts(replay(jobs, [a_card()], START, shortest_first())) == {1: 0, 4: 100, 2: 120, 3: 170}
    assert starts(replay(jobs, [a_card()], START, best_fit())) == {1: 0, 3: 2, 4: 3, 2: 100}


# --- nothing starves ---


def small_jobs(users: str, seconds: float, each_s: float, priority: int = 0) -> Iterable[ReplayedJob]:
    """A stream that more than fills two 80 GiB cards for four days."""
    for n in range(2, int(4 * 24 * HOUR / each_s)):
        yield a_job(n + 10, n * each_s, 20, seconds, user=users[n % len(users)], priority=priority)


def wait_of(large: ReplayedJob, stream: Iterable[ReplayedJob], rule: Rule) -> float | None:
    cards = [a_card(80), a_card(80, "a:1")]
    done = replay([large, *stream], cards, START, rule, until=lambda runs: large.waiting.job_id in runs)
    run = done.runs.get(large.waiting.job_id)
    return None if run is None else (run.started - large.waiting.since).total_seconds()


def test_a_large_job_starts_soon_under_an_endless_stream_of_small_ones() -> None:
    """Seven of eight places are always taken, so that without a reservation no card would ever be empty."""
    large = a_job(11, 2 * HOUR, 80, HOUR, user="eve")
    stream = list(small_jobs("abcd", HOUR, HOUR / 7))
    found = wait_of(large, stream, PlacementRule())
    assert found is not None
    assert found <= RESERVE_AFTER_S + HOUR / 7 + HOUR
    assert (wait_of(large, stream, best_fit()) or 1e9) > 3 * 24 * HOUR, "else this stream shows nothing"


@pytest.mark.parametrize("case", ["over its share", "lower priority", "longer"])
def test_a_large_job_starts_within_the_bound_of_the_order(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the others are preferred: by their priority, or since its user has had far more than they.

    The stream is more than the cards can take, so that there is always a preferred job that has waited for long.
    """
    monkeypatch.setattr(rule_module, "PRIORITY_DAYS", 1.5)  # days of a stream that is replayed
    large = a_job(11, 2 * HOUR, 80, HOUR, user="eve")
    if case == "longer":
        large = replace(large, waiting=replace(large.waiting, left_s=3 * HOUR))
    stream = list(small_jobs("abcdfghi", HOUR, HOUR / 9, priority=1 if case == "lower priority" else 0))
    rule = PlacementRule({"eve": 1e6} if case == "over its share" else {}, START)
    found = wait_of(large, stream, rule)
    assert found is not None
    days = {"over its share": math.log2((HOUR + USE_S) / HOUR), "lower priority": 1.5, "longer": math.log2(3)}[case]
    assert found <= days * 24 * HOUR * 9 / 8 + 2 * HOUR, "nine arrive while eight are served"


def test_a_thousand_short_jobs_of_one_user_do_not_hold_up_another_s_long_one() -> None:
    short = [a_job(n, 0, 20, 60, user="ada") for n in range(1, 1001)]
    short = [replace(job, waiting=replace(job.waiting, left_s=60.0)) for job in short]
    other = a_job(1001, HOUR, 20, 1.5 * HOUR, user="bob")
    other = replace(other, waiting=replace(other.waiting, left_s=1.5 * HOUR))
    card = replace(a_card(80), max_jobs=1)
    run = replay([*short, other], [card], START, PlacementRule(), until=lambda runs: 1001 in runs).runs[1001]
    assert (run.started - other.waiting.since).total_seconds() <= 60
    before = PlacementRule(by_share=True)
    run = replay([*short, other], [card], START, before, until=lambda runs: 1001 in runs).runs[1001]
    assert (run.started - other.waiting.since).total_seconds() <= 60, "as in the order of before"


@pytest.mark.parametrize("sound", [80, 40])
def test_a_large_job_that_avoids_a_card_starts_too(sound: float) -> None:
    """On the other one, which is never empty by itself; where that is too small, on the card that failed it."""
    large = a_job(11, 2 * HOUR, 80, HOUR, user="eve")
    large = replace(large, waiting=replace(large.waiting, avoids=frozenset({"a:0"})))
    cards = [a_card(80), a_card(sound, "b:0")]
    stream = small_jobs("abcd", HOUR, HOUR / 7)
    run = replay([large, *stream], cards, START, PlacementRule(), until=lambda runs: 11 in runs).runs[11]
    assert run.node == ("b:0" if sound == 80 else "a:0")
    assert (run.started - large.waiting.since).total_seconds() <= RESERVE_AFTER_S + HOUR / 7 + HOUR


def test_a_job_that_no_card_could_hold_delays_nobody() -> None:
    impossible = a_job(1, 0, 500, HOUR, user="eve")
    large = a_job(11, 2 * HOUR, 80, HOUR, user="eve")
    found = wait_of(large, [impossible, *small_jobs("abcd", HOUR, HOUR / 7)], PlacementRule())
    assert found is not None
    assert found <= RESERVE_AFTER_S + HOUR / 7 + HOUR


def test_users_get_like_shares_of_a_busy_card_whatever_they_submit() -> None:
    greedy = [a_job(n, 0, 80, 600, user="ada") for n in range(1, 200)]
    modest = [a_job(n, 0, 80, 600, user="bob") for n in range(200, 240)]
    done = replay([*greedy, *modest], [a_card()], START)
    first = sorted(done.runs, key=lambda job_id: done.runs[job_id].started)[:60]
    assert 28 <= sum(job_id >= 200 for job_id in first) <= 32


# --- giving way ---


class Watched(PlacementRule):
    """Our rule with giving way; it asserts that no card is ever promised twice."""

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        given = super().starts(cards, now)
        promised = {card.node: [*(one.reserved for one in card.running)] for card in cards}
        running = {one.job_id for card in cards for one in card.running}
        for placed in given:
            assert placed.job.job_id not in running
            promised[placed.node].append(placed.reserved)
        for card in cards:
            assert sum(promised[card.node]) <= card.capacity
            assert len(promised[card.node]) <= card.max_jobs
        return given


def yielding(job: ReplayedJob) -> ReplayedJob:
    """It gives way, and how long it takes is known."""
    assert job.seconds is not None
    return replace(job, yields=True, waiting=replace(job.waiting, left_s=job.seconds))


def test_a_long_job_gives_way_to_a_short_one_and_goes_on_with_what_was_left() -> None:
    long, short = yielding(a_job(1, 0, 80, 10 * HOUR)), yielding(a_job(2, HOUR, 80, 120))
    done = replay([long, short], [a_card()], START, PlacementRule(yields=True))
    assert starts(done) == {1: 0, 2: HOUR}
    assert ends(done) == {2: HOUR + 120, 1: pytest.approx(10 * HOUR + 120 + long.stop_s)}
    assert done.runs[1].stops == 1
    without = replay([long, short], [a_card()], START, PlacementRule())
    assert ends(without) == {1: 10 * HOUR, 2: 10 * HOUR + 120}


def test_a_job_gives_way_once_it_has_run_undisturbed_and_not_before() -> None:
    """The replay looks again at that moment, although no job arrives or ends then."""
    long, short = yielding(a_job(1, 0, 80, 10 * HOUR)), yielding(a_job(2, 60, 80, 120))
    done = replay([long, short], [a_card()], START, PlacementRule(yields=True))
    assert starts(done)[2] == undisturbed_s(Yields())


def test_one_that_does_not_yield_is_not_stopped() -> None:
    long, short = replace(yielding(a_job(1, 0, 80, 10 * HOUR)), yields=False), yielding(a_job(2, HOUR, 80, 120))
    assert starts(replay([long, short], [a_card()], START, PlacementRule(yields=True)))[2] == 10 * HOUR


@settings(max_examples=examples(30), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9000), st.integers(1, 80), st.integers(0, 40_000), st.sampled_from("abc")), max_size=20
    ),
    st.sampled_from((0.0, 0.5)),
)
def test_each_job_that_gives_way_ends_and_no_card_is_promised_twice(
    drawn: list[tuple[int, int, int, str]], contention: float
) -> None:
    jobs = [yielding(a_job(n, t, gib, s, user=user)) for n, (t, gib, s, user) in enumerate(sorted(drawn), start=1)]
    cards = [a_card(80), a_card(80, "a:1", 1), a_card(24, "a:2", 1)]
    done = replay(jobs, cards, START, Watched(yields=True), contention=contention)
    assert set(done.runs) == {job.waiting.job_id for job in jobs}
    for job in jobs:
        run, seconds = done.runs[job.waiting.job_id], job.seconds or 0.0
        assert run.ended is not None
        assert (run.ended - run.started).total_seconds() >= seconds + run.stops * job.stop_s - 1e-3
        if not contention:  # else it has its cards for longer than it would need alone
            assert run.stops * job.stop_s <= COST_SHARE * (seconds + run.stops * job.stop_s) + 1e-3
    assert done.reserved[-1][1] == 0


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(2, 40), st.floats(60, 7200), st.floats(1, 30), st.integers(0, 5))
def test_a_long_job_is_passed_by_no_more_work_than_the_bound_says(
    each_hour: int, short_s: float, long_h: float, seed: int
) -> None:
    """Others' jobs that come within log2 of the works' ratio days after it may pass it, and none that comes later."""
    rng, long_s = random.Random(seed), long_h * HOUR
    days = max(0.0, math.log2((long_s + USE_S) / short_s))
    times = sorted(rng.uniform(0, 40 / each_hour * HOUR) for _ in range(40))
    short = [yielding(a_job(n, t, 80, short_s, user="ada")) for n, t in enumerate(times, start=2)]
    long = yielding(a_job(1, 0, 80, long_s, user="bob"))
    done = replay([long, *short], [a_card()], START, PlacementRule(yields=True))
    passing = sum(short_s for job in short if starts_after(job) <= days * 24 * HOUR)
    run = done.runs[1]
    assert run.ended is not None
    took = (run.ended - START).total_seconds()
    assert took <= long_s + run.stops * long.stop_s + passing + short_s + 1e-3


def starts_after(job: ReplayedJob) -> float:
    return (job.waiting.since - START).total_seconds()


def test_what_runs_from_the_beginning_gives_way_too() -> None:
    """As why and status ask it. Of a running job they know what its card shows, and perhaps how it would wait."""
    busy = Occupant(job_id=9, user="bob", reserved=80 * GIB, ends=at(10 * HOUR), began=at(-HOUR))
    busy = replace(busy, since=at(-2 * HOUR), yields=Yields())
    short, cards = yielding(a_job(1, 0, 80, 60)), [a_card(running=[busy])]
    assert starts(replay([short], cards, START, PlacementRule(yields=True))) == {1: 0}
    again = replace(yielding(a_job(9, -2 * HOUR, 80, 10 * HOUR, user="bob")), stops=1)
    done = replay([short], cards, START, PlacementRule(yields=True), running={9: again})
    assert starts(done) == {1: 0, 9: 60}
    assert ends(done)[9] == pytest.approx(60 + 10 * HOUR + again.stop_s)
    assert done.runs[9].stops == 2


def test_a_thousand_short_jobs_do_not_hold_up_a_long_one_that_gives_way_to_them() -> None:
    """It is stopped a few times only, since each time it runs twice as long undisturbed."""
    short = [yielding(a_job(n, n * 100.0, 20, 60, user="ada")) for n in range(2, 1002)]
    long = yielding(a_job(1, 0, 20, 20 * HOUR, user="bob"))
    card = replace(a_card(80), max_jobs=1)
    run = replay([long, *short], [card], START, PlacementRule(yields=True)).runs[1]
    assert run.ended is not None
    assert run.stops <= math.log2(20 * HOUR / undisturbed_s(Yields()) + 1)
    assert (run.ended - START).total_seconds() <= 20 * HOUR + run.stops * long.stop_s + 1000 * 60


# --- charges ---


def test_charges_are_those_that_the_database_would_keep() -> None:
    rule = PlacementRule()
    rule.arrived(a_job(1, 0, 10, 2 * HOUR))
    assert len(rule.starts([a_card()], START)) == 1
    assert rule.charges(at(60)) == {"ada": pytest.approx(10.0)}, "an hour at least"
    rule.ended(1, at(2 * HOUR))
    assert rule.charges(at(2 * HOUR)) == {"ada": pytest.approx(20.0)}
    rule.arrived(a_job(2, 3 * HOUR, 5, HOUR))
    rule.starts([a_card()], at(26 * HOUR))
    assert rule.charges(at(28 * HOUR)) == {"ada": pytest.approx(charge(decayed(20, 26 * HOUR), [(5 * GIB, 2 * HOUR)]))}


def test_a_job_on_several_cards_is_charged_for_all_of_them() -> None:
    gang = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=20 * GIB, qlora=None))
    pair, rule = [replace(a_card(24, f"a:{n}", 1), gangs=True) for n in range(2)], PlacementRule()
    large = a_job(1, 0, 40, HOUR)
    rule.arrived(replace(large, waiting=replace(large.waiting, gangs=(gang,))))
    (placed,) = rule.starts(pair, START)
    assert rule.charges(at(60)) == {"ada": pytest.approx(40.0)}
    rule.ended(1, at(2 * HOUR))
    assert rule.charges(at(2 * HOUR)) == {"ada": pytest.approx(80.0)}
    running = [Occupant(job_id=9, user="bob", reserved=share.bytes, began=at(-HOUR)) for share in placed.shares]
    rule = PlacementRule({}, START, running)
    assert rule.charges(at(HOUR)) == {"bob": pytest.approx(40.0)}


def test_charges_go_on_from_those_that_were_given() -> None:
    """What ran before is in them already; it counts on from then. The first hour is charged at once."""
    busy = Occupant(job_id=9, user="bob", reserved=10 * GIB, began=at(-HOUR), ends=at(HOUR))
    young = Occupant(job_id=8, user="cyd", reserved=10 * GIB, began=at(-HOUR / 4))
    rule = PlacementRule({"cyd": 10.0}, START, [young])
    assert rule.charges(at(HOUR / 2))["cyd"] == pytest.approx(decayed(10.0, HOUR / 2))
    rule.ended(8, at(HOUR / 2))
    assert rule.charges(at(HOUR / 2))["cyd"] == pytest.approx(7.5, rel=0.03)
    rule = PlacementRule({"bob": 7.0, "ada": 1.0}, START, [busy])
    assert rule.charges(START) == {"bob": pytest.approx(7.0), "ada": pytest.approx(1.0)}
    rule.ended(9, at(HOUR))
    assert rule.charges(at(HOUR))["bob"] == pytest.approx(decayed(7.0, HOUR) + 10.0)
