"""Cards that come and go in a replay: what begins there, what stops, and that nothing starves."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines import best_fit, fifo, shortest_first
from loractl.common.job.method import Method, Need, Parallel, SharedNeed
from loractl.common.placement.cards import Card, largest_gpu, lasts, takes
from loractl.common.placement.lines import Waiting
from loractl.common.placement.replay import (
    MOST_IN_VAIN,
    PlacementRule,
    Presence,
    Replay,
    ReplayedJob,
    ReplayedRun,
    Rule,
    replay,
)
from loractl.common.placement.rule import Placement
from loractl.common.units import GIB

START = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
HOUR = 3600.0
FOUR_OF_SIX = Presence(open_s=4 * HOUR, shut_s=2 * HOUR)


class BlindRule(PlacementRule):
    """Our rule, as if it were not told when a card goes."""

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        return super().starts([replace(card, left_s=None, window_s=None) for card in cards], now)


def at(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def a_job(
    job_id: int, arrival: float, gib: float, seconds: float, load_s: float = 0.0, user: str = "ada"
) -> ReplayedJob:
    need, methods = Need(lora=int(gib * GIB), qlora=None), (Method.LORA,)
    waiting = Waiting(job_id=job_id, user=user, priority=0, since=at(arrival), methods=methods, need=need)
    return ReplayedJob(waiting=waiting, seconds=seconds, start_s=load_s, save_s=600.0)


def a_card(gib: float = 80, node: str = "a:0", max_jobs: int = 4) -> Card:
    return Card(node=node, total=int(gib * GIB), max_jobs=max_jobs)


@dataclass(frozen=True)
class Attempt:
    """When and where a job ran once."""

    job: Waiting
    card: Card  # as the rule saw it
    start: float
    end: float


class Witness:
    """A rule that writes down what another one starts, and what has left its card."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._running: dict[int, tuple[Waiting, Card, float]] = {}
        self.attempts: list[Attempt] = []

    def arrived(self, job: ReplayedJob) -> None:
        self._rule.arrived(job)

    def starts(self, cards: Sequence[Card], now: dt.datetime) -> list[Placement]:
        placed, seen = list(self._rule.starts(cards, now)), {card.node: card for card in cards}
        for one in placed:
            card, largest = seen[one.node], largest_gpu(cards)
            assert card.open
            if type(self._rule) is PlacementRule:
                assert takes(card, one.job, cards, largest), "the claim's own predicate"
            self._running[one.job.job_id] = (one.job, card, (now - START).total_seconds())
        return placed

    def stops(self, cards: Sequence[Card], now: dt.datetime) -> Sequence[int]:
        return self._rule.stops(cards, now)

    def ended(self, job_id: int, now: dt.datetime) -> None:
        job, card, start = self._running.pop(job_id)
        self.attempts.append(Attempt(job=job, card=card, start=start, end=(now - START).total_seconds()))
        self._rule.ended(job_id, now)

    def next_change(self, now: dt.datetime) -> dt.datetime | None:
        return self._rule.next_change(now)

    def times(self, job_id: int) -> list[tuple[float, float]]:
        return [(one.start / HOUR, one.end / HOUR) for one in self.attempts if one.job.job_id == job_id]


def replayed(
    jobs: Sequence[ReplayedJob], presence: Presence = FOUR_OF_SIX, rule: Rule | None = None
) -> tuple[Replay, Witness]:
    card, witness = a_card(), Witness(rule or PlacementRule())
    done = replay(jobs, [card], START, witness, presences={card.node: presence})
    return done, witness


def run_of(done: Replay, job_id: int = 1) -> ReplayedRun:
    return done.runs[job_id]


def test_a_job_goes_on_when_its_card_is_back_and_loads_its_base_again() -> None:
    done, seen = replayed([a_job(1, 0, 20, 9 * HOUR, load_s=360)])
    assert seen.times(1) == [(0, 4), (6, 10), (12, pytest.approx(13.3))], "nine hours, and three loads of six minutes"
    run = run_of(done)
    assert (run.started, run.ended, run.attempts, run.in_vain) == (START, at(13.3 * HOUR), 3, 0)
    assert done.reserved[-1][1] == 0
    assert [size // GIB for _, size in done.reserved] == [20, 0, 20, 0, 20, 0]


def test_a_card_takes_no_job_that_can_reach_no_checkpoint_before_it_goes() -> None:
    """Not measured, it needs an hour. The second time it is: 6 minutes of loading, and 10 to the first checkpoint."""
    late = a_job(1, 3.5 * HOUR, 20, 5 * HOUR, load_s=360)
    _done, seen = replayed([late])
    assert seen.times(1) == [(6, 10), (12, pytest.approx(13.2))]
    assert seen.attempts[1].job.checkpoint_s == pytest.approx(960)
    blind, seen = replayed([late], rule=BlindRule())
    assert seen.times(1)[0] == (3.5, 4)
    assert run_of(blind).in_vain == 0, "it had trained for a while"
    slow, seen = replayed([a_job(1, 3.5 * HOUR, 20, HOUR, load_s=2400)], rule=BlindRule())
    assert (seen.times(1), run_of(slow).in_vain) == ([(3.5, 4), (6, pytest.approx(7 + 2 / 3))], 1)


def test_a_start_in_vain_teaches_what_a_job_needs() -> None:
    """Loading takes 70 minutes, an hour was left: from now on it asks for 75."""
    slow = a_job(1, 3 * HOUR, 20, HOUR, load_s=4200)
    done, seen = replayed([slow])
    assert seen.times(1) == [(3, 4), (6, pytest.approx(8 + 1 / 6))]
    assert (run_of(done).in_vain, seen.attempts[1].job.checkpoint_s) == (1, pytest.approx(4500))


def test_a_stop_before_the_first_planned_checkpoint_keeps_the_steps_too() -> None:
    _done, seen = replayed([a_job(1, 3 * HOUR, 20, 2 * HOUR, load_s=3300)])
    assert seen.times(1) == [(3, 4), (6, pytest.approx(6 + 55 / 60 + 2 - 5 / 60))]
    assert seen.attempts[1].job.checkpoint_s == pytest.approx(HOUR), "that of the stop came at its end"


def test_the_jobs_of_a_card_slow_each_other_and_keep_what_they_have_done() -> None:
    jobs, card = [a_job(n, 0, 20, 3 * HOUR) for n in (1, 2)], a_card()
    done = replay(jobs, [card], START, contention=1.0, presences={"a:0": FOUR_OF_SIX})
    ends = [run.ended for run in done.runs.values()]
    assert ends == [at(8 * HOUR)] * 2, "two hours of each are done after four, and one of each takes two more"


def test_a_card_that_never_comes_back_leaves_jobs_unfinished() -> None:
    jobs = [a_job(1, 0, 20, 9 * HOUR), a_job(2, 0, 20, HOUR), a_job(3, 5 * HOUR, 20, HOUR)]
    done, _seen = replayed(jobs, Presence(open_s=4 * HOUR))
    assert (run_of(done, 1).ended, run_of(done, 1).attempts) == (None, 1)
    assert run_of(done, 2).ended == at(HOUR)
    assert 3 not in done.runs
    both = replay(jobs, [a_card(), a_card(24, "a:1", 1)], START, presences={"a:0": Presence(open_s=4 * HOUR)})
    assert all(run.ended is not None for run in both.runs.values()), "on the card that stays"


def test_a_job_on_several_cards_stops_with_the_first_that_goes() -> None:
    gang = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=20 * GIB, qlora=None))
    large = a_job(1, 0, 40, 5 * HOUR)
    large = replace(large, waiting=replace(large.waiting, gangs=(gang,)))
    cards = [replace(a_card(24, f"a:{n}", 1), gangs=True) for n in (0, 1)]
    done = replay([large], cards, START, presences={"a:1": FOUR_OF_SIX})
    assert (run_of(done).ended, run_of(done).attempts) == (at(7 * HOUR), 2)
    assert done.reserved[-1][1] == 0


@pytest.mark.parametrize("rule", [PlacementRule, BlindRule, fifo, shortest_first, best_fit])
def test_a_job_that_loads_for_longer_than_its_card_stays_ends_no_replay(rule: type[PlacementRule]) -> None:
    done, seen = replayed([a_job(1, 0, 20, HOUR, load_s=5 * HOUR), a_job(2, 0, 20, HOUR)], rule=rule())
    assert run_of(done).ended is None
    assert run_of(done, 2).ended is not None
    assert run_of(done).in_vain == (1 if rule is PlacementRule else MOST_IN_VAIN)
    assert len(seen.times(1)) == run_of(done).in_vain


windows = st.builds(Presence, open_s=st.integers(1800, 30_000), shut_s=st.integers(300, 30_000))
draws = st.lists(
    st.tuples(
        st.integers(0, 100_000), st.integers(1, 80), st.integers(0, 60_000), st.integers(1, 500), st.sampled_from("abc")
    ),
    max_size=30,
)


@given(draws, windows, windows, st.sampled_from((0.0, 0.5)), st.booleans())
def test_nothing_starves_and_each_start_is_one_that_a_claim_would_make(
    drawn: list[tuple[int, int, int, int, str]], first: Presence, second: Presence, contention: float, blind: bool
) -> None:
    """Each loads within a window, next to three others too, and so ends. Under our rule few loads are in vain."""
    jobs = [a_job(n, t, gib, s, load, user) for n, (t, gib, s, load, user) in enumerate(sorted(drawn), start=1)]
    cards = [a_card(80), a_card(80, "a:1", 1)]
    witness = Witness(BlindRule() if blind else PlacementRule())
    presences = {"a:0": first, "a:1": second}
    done = replay(jobs, cards, START, witness, contention=contention, presences=presences)
    assert all(done.runs[job.waiting.job_id].ended is not None for job in jobs)
    for one in witness.attempts:
        presence = presences[one.card.node]
        within = one.start % presence.cycle_s
        assert within < presence.open_s, "it was there"
        assert one.end - one.start <= presence.open_s - within + 1e-3, "it ended or stopped before the card went"
        left_s, open_s = one.card.left_s, one.card.window_s
        assert blind or (left_s == pytest.approx(presence.open_s - within) and open_s == presence.open_s)
        assert blind or lasts(one.card, one.job)
    for job in jobs:
        run = done.runs[job.waiting.job_id]
        mine = [one for one in witness.attempts if one.job.job_id == job.waiting.job_id]
        assert len(mine) == run.attempts
        assert sum(one.end - one.start for one in mine) >= (job.seconds or 0) - 1e-3, "no second of it is lost"
        assert blind or run.in_vain <= math.ceil(math.log(4, 1.25)), "each time it asks for a quarter more"
