"""Which running jobs stop for which waiting one."""

from __future__ import annotations

import datetime as dt
import math
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need, Parallel, SharedNeed
from loractl.common.placement.cards import STOP_COST_S, Card, Occupant, Yields
from loractl.common.placement.lines import Lines, Waiting
from loractl.common.placement.preemption import (
    COST_SHARE,
    RATIO,
    UNDISTURBED_S,
    Preemption,
    first_stop,
    left_s,
    next_look,
    undisturbed_s,
)
from loractl.common.placement.rule import place, turns
from loractl.common.placement.shares import LAST
from loractl.common.units import GIB

from ....conftest import examples
from .scenes import NOW, Scene, a_card, a_job, running, scenes

ONCE_S = STOP_COST_S / COST_SHARE
DAY_S = 86_400.0


def a_long_one(job_id: int = 9, *, ran_s: float = ONCE_S, left_s: float | None = DAY_S, **more: object) -> Occupant:
    """A running job that would yield."""
    began = NOW - dt.timedelta(seconds=ran_s)
    yields = Yields(**{key: more.pop(key) for key in ("stops", "cost_s", "slowed") if key in more})  # type: ignore[arg-type]
    return replace(running(job_id, 20, left_s), **{"began": began, "since": began, "yields": yields, **more})  # type: ignore[arg-type]


def a_short_one(job_id: int = 10, gib: float = 8, **more: object) -> Waiting:
    return a_job(job_id, gib, **{"left_s": 120.0, **more})  # type: ignore[arg-type]


def on(*jobs: Occupant, **more: object) -> Card:
    return a_card("a:0", 24, **{"running": jobs, **more})


def stop(job: Waiting, *cards: Card, **more: object) -> Preemption | None:
    return first_stop(Lines([job]), cards, {}, NOW, **more)  # type: ignore[arg-type]


def test_a_long_job_yields_its_card_to_a_much_shorter_one() -> None:
    assert stop(a_short_one(), on(a_long_one())) == Preemption(
        job=a_short_one(), node="a:0", going=(9,), is_shorter=True
    )


@pytest.mark.parametrize(
    ("long", "short", "more"),
    [
        pytest.param(a_long_one(yields=None), a_short_one(), {}, id="it may not be stopped"),
        pytest.param(a_long_one(ran_s=ONCE_S - 1), a_short_one(), {}, id="it has not run for long enough"),
        pytest.param(a_long_one(ran_s=4 * ONCE_S - 1, stops=2), a_short_one(), {}, id="after two stops four times"),
        pytest.param(a_long_one(cost_s=61), a_short_one(), {}, id="a stop costs too much of that time"),
        pytest.param(a_long_one(left_s=4 * (120 + STOP_COST_S) - 1), a_short_one(), {}, id="it is not much longer"),
        pytest.param(a_long_one(left_s=None), a_short_one(left_s=841.0), {}, id="what is unknown counts as an hour"),
        pytest.param(a_long_one(left_s=60, cost_s=18), a_short_one(left_s=10.0, priority=-1), {}, id="lower priority"),
        pytest.param(a_long_one(left_s=70, cost_s=60), a_short_one(left_s=10.0), {}, id="its end is near"),
        pytest.param(a_long_one(gives_way_to=5), a_short_one(), {}, id="one stop at a time"),
        pytest.param(a_long_one(), a_short_one(gib=30), {}, id="the card is too small"),
        pytest.param(a_long_one(), a_short_one(gib=2), {}, id="there is room"),
        pytest.param(a_long_one(), a_short_one(), {"by_share": True}, id="the order of before"),
        pytest.param(a_long_one(), a_short_one(), {"yields": False}, id="the lab has no jobs yield"),
        pytest.param(a_long_one(), a_short_one(), {"least_s": ONCE_S + 1}, id="the lab's own time"),
    ],
)
def test_a_job_yields_in_no_other_case(long: Occupant, short: Waiting, more: dict[str, object]) -> None:
    shared = 2 if short.bound == 2 * GIB else 1
    assert stop(short, on(long, max_jobs=shared), **more) is None


def test_nothing_yields_where_room_comes_within_the_time_that_the_stop_costs() -> None:
    soon = a_card("b:0", 24, running=(running(8, 20, STOP_COST_S),))
    assert stop(a_short_one(), on(a_long_one()), soon) is None
    later = replace(soon, running=(running(8, 20, STOP_COST_S + 1),))
    assert stop(a_short_one(), on(a_long_one()), later) is not None


def test_a_job_on_a_slow_card_does_not_yield_to_one_that_would_be_as_slow_there() -> None:
    """20 equal jobs of 20 minutes, on a card where steps take four times as long as was measured before."""
    short = a_short_one(left_s=1200.0)
    assert stop(short, on(a_long_one(left_s=4 * 1300.0, ran_s=2000.0))) is not None
    assert stop(short, on(a_long_one(left_s=4 * 1300.0, ran_s=2000.0, slowed=4.0))) is None
    assert stop(a_short_one(left_s=300.0), on(a_long_one(left_s=4 * 1259.0, ran_s=2000.0, slowed=4.0))) is None
    assert stop(a_short_one(left_s=300.0), on(a_long_one(left_s=4 * 1260.0, ran_s=2000.0, slowed=4.0))) is not None


def test_a_lab_may_say_its_own_time() -> None:
    assert stop(a_short_one(), on(a_long_one(ran_s=5.0)), least_s=5.0) is not None


def test_no_job_yields_on_a_card_whose_worker_stops() -> None:
    assert stop(a_short_one(checkpoint_s=1.0), on(a_long_one(), left_s=10 * DAY_S, window_s=20 * DAY_S)) is None


def test_neither_side_is_on_several_cards() -> None:
    both = [a_card(f"a:{n}", 24, running=(a_long_one(),), gangs=True) for n in range(2)]
    assert stop(a_short_one(), *both) is None, "a job on both"
    gang = SharedNeed(cards=2, need=Need(lora=20 * GIB, qlora=None), parallel=Parallel.SHARDED)
    each = [a_card(f"a:{n}", 24, running=(a_long_one(n),), gangs=True) for n in range(2)]
    assert stop(a_short_one(gib=40, alone=False, gangs=(gang,)), *each) is None


def test_a_job_that_would_go_first_anyway_does_not_yield() -> None:
    """The waiting one's user has had all the use, and what counts of it is more than what is left of the other."""
    waits, short = a_short_one(left_s=60.0), a_long_one(left_s=3600.0)
    assert first_stop(Lines([waits]), [on(short)], {"ada": 50.0}, NOW) is None
    assert first_stop(Lines([waits]), [on(a_long_one())], {"ada": 50.0}, NOW) is not None


@pytest.mark.parametrize(
    ("since_days", "charges", "by_share"),
    [(0, {"bob": LAST}, False), (15, {}, False), (1.1, {}, True)],
    ids=["beyond a soft quota", "older", "what waited a day first"],
)
def test_nobody_stops_for_a_higher_priority_who_would_take_the_card_back(
    since_days: float, charges: dict[str, float], by_share: bool
) -> None:
    """It would be asked again and again, and neither would get on."""
    low = replace(running(9, 20, 3600.0), user="ada", preemptible=True, began=NOW, since=NOW)
    high = a_job(10, 20, user="bob", priority=1, left_s=3600.0)
    assert first_stop(Lines([high]), [on(low)], {}, NOW, by_share=by_share) is not None
    older = replace(low, since=NOW - dt.timedelta(days=since_days))
    assert first_stop(Lines([high]), [on(older)], charges, NOW, by_share=by_share) is None


def test_nobody_stops_who_goes_first_once_the_hour_that_a_start_counts_is_taken_back() -> None:
    """What has run for ten minutes counts as an hour of use while it runs, and as ten minutes once it has stopped."""
    long, short = a_long_one(ran_s=700.0, cost_s=5.0, left_s=2700.0, user="ada"), a_short_one(user="vera", left_s=600.0)
    assert first_stop(Lines([short]), [on(long)], {"ada": 200.0, "vera": 200.0}, NOW) is not None
    assert first_stop(Lines([short]), [on(long)], {"ada": 20.0, "vera": 20.0}, NOW) is None


def test_of_several_the_longest_yields_and_no_more_than_must() -> None:
    jobs = (a_long_one(8, left_s=DAY_S), a_long_one(9, left_s=2 * DAY_S), a_long_one(7, left_s=3 * DAY_S))
    card = a_card("a:0", 80, max_jobs=3, running=(*jobs[:2], replace(jobs[2], reserved=4 * GIB)))
    found = stop(a_short_one(gib=50), card)
    assert found is not None and found.going == (9,), "the longest holds too little"
    found = stop(a_short_one(gib=60), card)
    assert found is not None and set(found.going) == {8, 9}


def test_what_outlives_its_prediction_counts_as_longer_and_the_unknown_by_what_it_ran() -> None:
    assert left_s(a_long_one(ran_s=36_000, left_s=-5), NOW) == 3600
    assert left_s(a_long_one(ran_s=36_000, left_s=None), NOW) == 36_000
    assert left_s(a_long_one(ran_s=36, left_s=None), NOW) == 3600


def test_a_round_looks_again_when_the_next_job_may_yield() -> None:
    cards = [on(a_long_one(ran_s=ONCE_S - 60)), a_card("b:0", running=(a_long_one(8, ran_s=ONCE_S + 5),))]
    assert next_look(cards, NOW) == NOW + dt.timedelta(seconds=60)
    assert next_look(cards[1:], NOW) is None


def yielding(scene: Scene, seed: int) -> Scene:
    """The scene, if its running jobs may yield."""
    rng = random.Random(seed)

    def one(job: Occupant) -> Occupant:
        began = NOW - dt.timedelta(seconds=rng.choice((100, 3000, 90_000)))
        yields = Yields(stops=rng.choice((0, 0, 1, 4)), cost_s=rng.choice((5.0, 60.0)))
        ends = rng.choice((job.ends, None, NOW + dt.timedelta(days=rng.choice((1, 9)))))
        priority = rng.choice((0, 0, 0, 1, -1))
        yields = rng.choice((yields, yields, None))
        since, stops_for_priority = began - dt.timedelta(days=rng.choice((0, 0, 20))), rng.random() < 0.3
        told = replace(job, began=began, since=since, ends=ends, priority=priority, yields=yields)
        return replace(told, preemptible=stops_for_priority)

    return replace(scene, cards=[replace(card, running=tuple(map(one, card.running))) for card in scene.cards])


@settings(max_examples=examples(200))
@given(scenes(), st.integers(0, 2**32))
def test_on_any_fleet_nobody_who_stopped_takes_the_card_back(scene: Scene, seed: int) -> None:
    scene = yielding(scene, seed)
    if (found := first_stop(Lines(scene.jobs), scene.cards, scene.charges, NOW)) is None:
        return
    charges, stopped = dict(scene.charges), dict[int, Waiting]()
    for one in (one for card in scene.cards for one in card.running if one.job_id in found.going):
        assert one.began is not None and one.since is not None
        ran_s = (NOW - one.began).total_seconds()
        charges[one.user] = max(0, charges.get(one.user, 0) - one.reserved / GIB * max(0, 3600 - ran_s) / 3600)
        need = Need(lora=one.reserved, qlora=None)
        stopped[one.job_id] = Waiting(
            job_id=one.job_id, user=one.user, priority=one.priority, since=one.since, methods=(Method.LORA,), need=need,
            left_s=left_s(one, NOW),
        )  # fmt: skip
    cards = [card.without(found.going) for card in scene.cards]
    decisions = place(Lines([*scene.jobs, *stopped.values()]), cards, charges, NOW)
    assert found.job.job_id in {one.placed.job.job_id for one in decisions if one.placed is not None}


@settings(max_examples=examples(200))
@given(scenes(), st.integers(0, 2**32))
def test_on_any_fleet_only_a_much_longer_job_yields_and_the_shorter_one_starts(scene: Scene, seed: int) -> None:
    scene = yielding(scene, seed)
    found = first_stop(Lines(scene.jobs), scene.cards, scene.charges, NOW)
    if found is None or not found.is_shorter:
        return
    turn = turns(scene.charges)
    (card,) = (card for card in scene.cards if card.node == found.node)
    assert card.open and card.left_s is None
    for job in (job for job in card.running if job.job_id in found.going):
        left = left_s(job, NOW)
        assert job.yields is not None and job.began is not None and job.since is not None
        assert left >= RATIO * (found.job.left_s + job.yields.cost_s) and job.priority <= found.job.priority
        assert (NOW - job.began).total_seconds() >= undisturbed_s(job.yields) >= UNDISTURBED_S
        waits = replace(found.job, job_id=job.job_id, user=job.user, priority=job.priority, left_s=left)
        assert turn(found.job) < turn(replace(waits, since=job.since)), "the other would go first"
    then = [card.without(found.going) for card in scene.cards]
    placed = [d.placed for d in place(Lines(scene.jobs), then, scene.charges, NOW) if d.placed is not None]
    assert found.job.job_id in {one.job.job_id for one in placed}
    assert len({one.job.job_id for one in placed}) == len(placed)
    for card in then:
        taken = sum(one.reserved for one in placed if one.node == card.node)
        assert taken <= max(0, card.capacity - card.taken), "no card is promised twice"


@dataclass(kw_only=True)
class Long:
    """A long job on the lab's only card."""

    left_s: float
    began: float | None = None
    stops: int = 0
    ran_s: float = 0.0


STEP_S = 60.0


@settings(max_examples=examples(6))
@given(st.integers(0, 2**32))
def test_no_job_yields_for_ever_and_stops_cost_no_more_than_their_share(seed: int) -> None:
    """Short jobs keep coming while the long one is there. Each stop costs it a minute of the card."""
    rng = random.Random(seed)
    total_s, every_s = rng.choice((3, 12)) * 3600.0, rng.choice((150, 900, 5000))
    long, now, short_until, waits = Long(left_s=total_s), 0.0, 0.0, list[float]()
    coming = rng.uniform(0, 3000)
    while long.left_s > 0:
        now += STEP_S
        assert now < 40 * total_s, "it starves"
        if coming <= now:
            waits.append(now)
            coming += rng.expovariate(1 / every_s)
        if long.began is not None:
            long.left_s, long.ran_s = long.left_s - STEP_S, long.ran_s + STEP_S
            ends, began = moment(now + max(long.left_s, 1.0)), moment(long.began)
            occupant = replace(running(1, 20), ends=ends, began=began, since=NOW, yields=Yields(stops=long.stops))
            jobs = [a_short_one(n + 10, since=moment(at)) for n, at in enumerate(waits)]
            if jobs and (found := first_stop(Lines(jobs), [on(occupant)], {}, moment(now))) is not None:
                assert found.going == (1,)
                assert now - long.began >= ONCE_S * 2**long.stops
                long.stops, long.began, long.left_s = long.stops + 1, None, long.left_s + STOP_COST_S
        elif now >= short_until:
            if waits:
                waits.pop(0)
                short_until = now + 120.0
            else:
                long.began = now
    assert long.stops <= math.log2(long.ran_s / ONCE_S + 1)
    assert long.stops * STOP_COST_S <= COST_SHARE * long.ran_s


def moment(seconds: float) -> dt.datetime:
    return NOW + dt.timedelta(seconds=seconds)


def test_no_job_yields_where_one_that_goes_after_it_would_take_its_room() -> None:
    """It would wait for that one, too."""
    long = replace(a_long_one(left_s=9 * 3600), reserved=60 * GIB, since=NOW)  # too young to have the card kept for it
    card = a_card("a:0", 80, max_jobs=4, running=(long,))
    short, next_ = a_short_one(gib=30), a_job(11, 45, user="cyd", left_s=20 * 3600.0)
    assert first_stop(Lines([short]), [card], {}, NOW) is not None
    assert first_stop(Lines([short, next_]), [card], {}, NOW) is None


def test_a_dead_worker_is_asked_for_nothing() -> None:
    assert stop(a_short_one(), on(a_long_one(), silent=True)) is None
