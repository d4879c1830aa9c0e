"""The estimate of an evaluation's rest, on work whose times are known."""

from __future__ import annotations

import pytest

from loractl.common.placement.duration import ANSWER_EACH, ANSWER_STEP
from loractl.worker.evaluation.stretches import ADAPTED, ANSWERS, ROWS, Stopwatch, Stretch, answered, scored

SCORED = Stretch(kind=ROWS, costs=(200,) * 20)  # 0.1 s a row
MADE = Stretch(kind=ANSWERS, costs=(8 * 256,) * 10)  # 12 s an answer
WORK = [SCORED, MADE] * 2
TOTAL_S = 2 * (20 * 0.1 + 10 * 12)


def test_answers_are_not_taken_to_come_as_fast_as_rows_are_scored() -> None:
    watch = Stopwatch(WORK, now=0.0)
    assert watch.left_seconds is None
    watch.lap(20, now=2.0)
    assert watch.left_seconds == pytest.approx(2 + 20 * 0.0005 * 8 * 256), "nothing was generated yet"
    watch.lap(25, now=62.0)
    assert watch.left_seconds == pytest.approx(TOTAL_S - 62), "half of one model's answers are measured"
    watch.lap(30, now=122.0)
    watch.lap(50, now=130.0)
    assert watch.left_seconds == pytest.approx(10 * 12), "slower rows make no slower answers"
    watch.lap(60, now=TOTAL_S)
    assert watch.left_seconds == 0


def test_a_lap_over_both_kinds_is_shared_by_their_cost() -> None:
    watch = Stopwatch(WORK, now=0.0)
    watch.lap(60, now=100.0)
    assert watch.left_seconds == 0
    watch = Stopwatch(WORK, now=0.0)
    watch.lap(30, now=100.0)
    assert watch.left_seconds == pytest.approx(100.0), "the other model does the same"


def test_the_longest_rows_come_first_and_cost_more() -> None:
    watch = Stopwatch([scored(ROWS, [[10, 30], [20, 40]])], now=0.0)
    for done, took in ((1, 30), (2, 40), (3, 80), (4, 100)):
        watch.lap(done, now=took)
        assert watch.left_seconds == 100 - took


def test_the_tuned_model_takes_longer_than_the_base() -> None:
    watch = Stopwatch([SCORED, SCORED.adapted], now=0.0)
    watch.lap(20, now=10.0)
    assert watch.left_seconds == pytest.approx(10 * ADAPTED)


def test_a_batch_of_few_answers_takes_little_less_than_a_full_one() -> None:
    def batch_s(rows: int) -> float:
        return 50 + 10 * (ANSWER_STEP / rows + ANSWER_EACH)

    made = answered(ANSWERS, [50] * 9, 10, batch=8)
    watch = Stopwatch([made], now=0.0)
    watch.lap(8, now=8 * batch_s(8))
    assert watch.left_seconds == pytest.approx(batch_s(1)) and batch_s(1) > 1.5 * batch_s(8)
