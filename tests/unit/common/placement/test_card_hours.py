"""Card hours on the clock of a replay: counted as the database counts them, and held against quotas."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.placement.card_hours import PastCardHours, QuotaMeter, by_hour
from loractl.common.placement.cards import Card, Occupant
from loractl.common.placement.lines import Waiting
from loractl.common.placement.replay import PlacementRule, Replay, ReplayedJob, replay
from loractl.common.placement.shares import Allowance
from loractl.common.units import GIB

START = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
HOUR = 3600.0
DAY = 86400


def at(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def a_job(job_id: int, arrival: float, gib: float, seconds: float | None, user: str = "ada") -> ReplayedJob:
    need, methods = Need(lora=int(gib * GIB), qlora=None), (Method.LORA,)
    waiting = Waiting(job_id=job_id, user=user, priority=0, since=at(arrival), methods=methods, need=need)
    return ReplayedJob(waiting=waiting, seconds=seconds)


def a_card(gib: float = 80, node: str = "a:0", max_jobs: int = 4) -> Card:
    return Card(node=node, total=int(gib * GIB), max_jobs=max_jobs)


def quota(hours: float, *, soft: bool = False, window_s: int = DAY) -> Allowance:
    return Allowance(user="ada", card_hours=hours, window_s=window_s, soft=soft, used=0.0, below_at=None)


def replayed(jobs: Sequence[ReplayedJob], cards: Sequence[Card], allowed: Mapping[str, Allowance]) -> Replay:
    meter = QuotaMeter(allowed, {card.node: card.total for card in cards})
    return replay(jobs, cards, START, PlacementRule(meter=meter))


def starts(done: Replay) -> dict[int, float]:
    return {job_id: (run.started - START).total_seconds() / HOUR for job_id, run in done.runs.items()}


def test_beyond_a_hard_quota_jobs_wait_until_the_hours_are_out_of_its_time() -> None:
    jobs = [a_job(1, 0, 80, 3 * HOUR), a_job(2, HOUR, 20, HOUR), a_job(3, 2 * HOUR, 20, HOUR, "bob")]
    assert starts(replayed(jobs, [a_card()], {"ada": quota(2.0)})) == {1: 0, 3: 3, 2: 25}, "at 25 h, one of three left"
    assert starts(replayed(jobs, [a_card()], {"ada": quota(3.5)})) == {1: 0, 2: 3, 3: 3}
    assert starts(replayed(jobs, [a_card()], {"ada": quota(0.0)})) == {3: 2}, "those never start"


def test_a_share_counts_as_its_part_of_the_card() -> None:
    jobs = [a_job(1, 0, 20, 4 * HOUR), a_job(2, HOUR, 20, HOUR), a_job(3, 2 * HOUR, 20, HOUR)]
    done = replayed(jobs, [a_card()], {"ada": quota(0.5)})
    assert starts(done) == {1: 0, 2: 1, 3: 26}, "a quarter each hour: at 26 h a quarter is left"
    whole = replayed(jobs, [a_card(20, "a:0", 1), a_card(20, "a:1", 1)], {"ada": quota(0.5)})
    assert starts(whole) == {1: 0, 2: 27, 3: 27}, "at 27 h the last of four is out, and both cards are free"


def test_beyond_a_soft_quota_jobs_go_last() -> None:
    jobs = [a_job(1, 0, 80, HOUR), a_job(2, 1, 80, HOUR), a_job(3, 2, 80, HOUR, "bob"), a_job(4, 3, 80, HOUR, "bob")]
    jobs = [*jobs, a_job(5, HOUR, 80, HOUR, "bob")]
    soft = {"ada": quota(1.0, soft=True)}
    assert starts(replayed(jobs, [a_card()], soft)) == {1: 0, 3: 1, 4: 2, 5: 3, 2: 4}
    assert starts(replayed(jobs, [a_card()], {}))[2] < 4


def test_use_goes_on_from_what_was_had_before() -> None:
    """What runs counts whole, and what has ended until its hour is out of the quota's time."""
    allowed = {"ada": replace(quota(2.0), used=9.0)}
    running = Occupant(job_id=9, user="ada", reserved=40 * GIB, began=at(-HOUR))
    card = replace(a_card(), running=(running,))
    past = {"ada": PastCardHours(ended={at(-20 * HOUR): 1.0, at(-30 * HOUR): 7.0}, running={9: 0.5})}
    meter = QuotaMeter(allowed, {"a:0": 80 * GIB}, past)
    meter.take_over([card], START, {})
    assert meter.at(START)["ada"].used == pytest.approx(1.5)
    assert meter.at(at(HOUR))["ada"].used == pytest.approx(2.0)
    assert meter.below_at(["ada", "bob"], at(HOUR)) is None, "at 4 h the job alone has had it"
    meter.ended(9, at(HOUR))
    assert meter.at(at(HOUR))["ada"].used == pytest.approx(2.0)
    assert meter.below_at(["ada"], at(HOUR)) == at(4 * HOUR)
    assert meter.below_at(["bob"], at(HOUR)) is None, "none of ada's jobs waits"
    assert meter.at(at(23 * HOUR))["ada"].used == pytest.approx(0.5)
    roomy = QuotaMeter(allowed, {"a:0": 80 * GIB}, past)
    roomy.take_over([card], START, {9: 20 * GIB})
    assert roomy.at(at(HOUR))["ada"].used == pytest.approx(1.75), "the room that nobody else wanted is not counted"


def had(done: Replay, jobs: Sequence[ReplayedJob], cards: Sequence[Card], user: str, now: dt.datetime) -> float:
    """Card hours of a day, added up from the runs alone."""
    totals, used = {card.node: card.total for card in cards}, 0.0
    for job in jobs:
        run = done.runs.get(job.waiting.job_id)
        if job.waiting.user != user or run is None or run.started > now:
            continue
        share = run.reserved / totals[run.node]
        assert run.ended is not None
        if run.ended > now:
            used += share * (now - run.started).total_seconds() / HOUR
        else:
            past = now - dt.timedelta(seconds=DAY)
            used += sum(hours * share for hour, hours in by_hour(run.started, run.ended) if hour > past)
    return used


@given(
    st.lists(
        st.tuples(st.integers(0, 200_000), st.integers(1, 80), st.integers(1, 40_000), st.sampled_from("abc")),
        max_size=40,
    ),
    st.floats(0.1, 20.0),
    st.floats(0.1, 20.0),
)
def test_nobody_exceeds_a_hard_quota_by_more_than_what_ran_when_it_filled(
    drawn: list[tuple[int, int, int, str]], first: float, second: float
) -> None:
    jobs = [a_job(n, t, gib, s, user) for n, (t, gib, s, user) in enumerate(sorted(drawn), start=1)]
    cards, allowed = [a_card(80), a_card(24, "a:1", 1)], {"a": quota(first), "b": quota(second)}
    done = replayed(jobs, cards, allowed)
    assert all(job.waiting.job_id in done.runs for job in jobs), "each starts in the end"
    for job in jobs:
        user, begin = job.waiting.user, done.runs[job.waiting.job_id].started
        if user in allowed:
            before = [other for other in jobs if done.runs[other.waiting.job_id].started < begin]
            assert had(done, before, cards, user, begin) < allowed[user].card_hours + 1e-6


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 80), st.integers(0, 20_000)), max_size=20),
    st.booleans(),
)
@example([(0, 80, 20_000)] * 19, False)
def test_a_quota_that_nobody_reaches_changes_nothing(drawn: list[tuple[int, int, int]], soft: bool) -> None:
    """But for jobs that waited a day, which a hard one lets go first one at a time."""
    jobs = [a_job(n, t, gib, s, "ab"[n % 2]) for n, (t, gib, s) in enumerate(sorted(drawn), start=1)]
    cards = [a_card(80), a_card(24, "a:1", 1)]
    without, reached = replayed(jobs, cards, {}), replayed(jobs, cards, {"a": quota(1e6, soft=soft)})
    waits = ((without.runs[job.waiting.job_id].started - job.waiting.since).total_seconds() for job in jobs)
    if soft or max(waits, default=0) < DAY:
        assert reached == without
    else:
        assert reached.runs.keys() == without.runs.keys()
