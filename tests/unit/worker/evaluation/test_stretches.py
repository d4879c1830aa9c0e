"""The estimate of an evaluation's rest, on work whose times are known."""

from __future__ import annotations

import pytest

from loractl.worker.evaluation.stretches import ANSWERS, GENERATED, ROWS, Stopwatch, Stretch

SCORED = Stretch(kind=ROWS, count=20, tokens=4000)  # 0.1 s a row
MADE = Stretch(kind=ANSWERS, count=10, tokens=GENERATED * 10 * 256)  # 12 s an answer
WORK = [SCORED, MADE] * 2
TOTAL_S = 2 * (20 * 0.1 + 10 * 12)


def test_answers_are_not_taken_to_come_as_fast_as_rows_are_scored() -> None:
    watch = Stopwatch(WORK, now=0.0)
    assert watch.left_seconds is None
    watch.lap(20, now=2.0)
    assert watch.left_seconds == pytest.approx(2 + 20 * 0.0005 * GENERATED * 256), "nothing was generated yet"
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
