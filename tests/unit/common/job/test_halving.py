"""The rule by which a sweep's losers stop: the best at every rung is safe, whatever the order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.sweep import ETA, RUNGS, eval_interval, judge, meets_rungs, rung_step

LOSSES = st.floats(0, 20)


def survivors(losses: list[float]) -> list[int]:
    """Who goes on at one rung when members reach it in this order, each compared with those before it."""
    return [n for n, loss in enumerate(losses) if judge(loss, losses[:n]).goes_on]


@given(st.lists(LOSSES, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_best_one_goes_on_in_whatever_order_members_come(losses: list[float], rng) -> None:
    rng.shuffle(losses)
    kept = {losses[n] for n in survivors(losses)}
    assert min(losses) in kept
    assert all(n in survivors(losses) for n, loss in enumerate(losses) if loss == min(losses)), "ties of the best too"


@given(st.permutations(range(8)), st.permutations(range(8)))
def test_who_is_best_at_every_rung_runs_to_its_end(first: list[int], second: list[int]) -> None:
    """Member 0 is best at both rungs; the others come in any order and with any rank at each."""
    at_first = [float(place) for place in first]
    gone_on = {first[n] for n in survivors(at_first)}
    at_second = [float(member) for member in second if member in gone_on]
    assert 0.0 in {at_second[n] for n in survivors(at_second)}


@given(LOSSES)
def test_the_only_one_goes_on(loss: float) -> None:
    verdict = judge(loss, [])
    assert (verdict.goes_on, verdict.kept, verdict.reached, verdict.bar) == (True, 1, 1, loss)


@given(st.lists(LOSSES, min_size=1, max_size=30), LOSSES)
def test_a_loser_is_not_among_the_best_half_of_all_that_were_there(others: list[float], loss: float) -> None:
    verdict = judge(loss, others)
    better = sum(other < loss for other in others)
    assert verdict.reached == len(others) + 1
    assert verdict.kept == max(1, verdict.reached // ETA)
    assert verdict.goes_on == (better < verdict.kept)
    assert judge(verdict.bar, others).goes_on, "the bar that is told would have been enough"


@given(st.lists(LOSSES, min_size=1, max_size=30), LOSSES, st.floats(0, 5))
def test_a_better_loss_never_fares_worse(others: list[float], loss: float, gain: float) -> None:
    assert judge(loss - gain, others).goes_on >= judge(loss, others).goes_on


def test_equal_members_all_go_on() -> None:
    assert survivors([1.5] * 6) == list(range(6))


@given(st.sampled_from(RUNGS), st.sampled_from([0.25, 0.125, 0.05, 0.0625]), st.integers(1, 5000))
def test_a_rung_stands_at_an_evaluation_at_or_beyond_it_and_before_the_end(
    rung: float, share: float, total: int
) -> None:
    every, step = eval_interval(share, total), rung_step(rung, share, total)
    assert every == math.ceil(total * share), "as transformers counts"
    if step is None:
        assert total - every < rung * total or total <= every
        return
    assert step % every == 0 and step < total
    assert step >= rung * total - 1e-6 > step - every - 1e-6


def test_rungs_of_short_trainings() -> None:
    assert [rung_step(rung, 0.25, 32) for rung in RUNGS] == [8, 16]
    assert [rung_step(rung, 0.25, 30) for rung in RUNGS] == [8, 16]
    assert [rung_step(rung, 0.25, 3) for rung in RUNGS] == [1, 2]
    assert [rung_step(rung, 0.25, 2) for rung in RUNGS] == [1, 1]
    assert [rung_step(rung, 0.25, 1) for rung in RUNGS] == [None, None]
    assert [rung_step(rung, 4, 32) for rung in RUNGS] == [8, 16]


@pytest.mark.parametrize(
    ("eval_steps", "max_steps", "meets"),
    [
        (0.25, None, True), (0.125, None, True), (0.05, 100, True), (0.5, None, False), (0.1, None, False),
        (0.3, 100, False), (8, 32, True), (4, 32, True), (8, 30, False), (8, None, False), (64, 32, False),
    ],
)  # fmt: skip
def test_evaluations_that_meet_the_rungs(eval_steps: float, max_steps: int | None, meets: bool) -> None:
    assert meets_rungs(eval_steps, max_steps) is meets
