"""Where lines of a picture stand: readable numbers at the axes, attempts as lines of their own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.chart import BOTTOM, LEFT, RIGHT, TOP, axes_of, forest, loss_chart

LINE = st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=30)


@given(LINE)
def test_every_point_stands_inside_and_the_numbers_are_few_and_different(line: list[tuple[int, float]]) -> None:
    axes = axes_of([line], width=920, height=290)
    assert axes is not None
    for step, value in line:
        assert LEFT <= axes.x(step) <= 920 - RIGHT and TOP - 0.1 <= axes.y(value) <= 290 - BOTTOM + 0.1
    labels = axes.labels()
    assert 2 <= len(labels["y"]) <= 7 and 1 <= len(labels["x"]) <= 6
    assert len({text for _, text in labels["y"]}) == len(labels["y"])
    assert all(
        axes.x(int(text.replace("\u202f", "").replace(" ", "").replace(",", ""))) == x for x, text in labels["x"]
    )


@pytest.mark.parametrize(
    ("last", "numbers"), [(10, ["0", "5", "10"]), (8, ["0", "2", "4", "6", "8"]), (100, ["0", "25", "50", "75", "100"])]
)
def test_steps_are_numbered_at_even_distances(last: int, numbers: list[str]) -> None:
    axes = axes_of([[(0, 1.0), (last, 2.0)]], width=920, height=290)
    assert axes is not None and [text for _, text in axes.labels()["x"]] == numbers


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ((0.5, 2.6), ["0", "1", "2", "3"]), ((1.7, 1.7), ["1.700", "1.725", "1.750"]),
        ((3.0, 3.9), ["3.00", "3.25", "3.50", "3.75", "4.00"]), ((0.31, 0.62), ["0.3", "0.4", "0.5", "0.6", "0.7"]),
    ],
)  # fmt: skip
def test_the_upright_axis_has_round_numbers(values: tuple[float, float], numbers: list[str]) -> None:
    axes = axes_of([list(enumerate(values))], width=920, height=290)
    assert axes is not None and [text for _, text in axes.labels()["y"]] == numbers


def test_an_attempt_that_went_back_is_a_line_of_its_own_and_takes_the_place_of_what_it_repeated() -> None:
    chart = loss_chart([[(1, 3.0), (2, 9.0)], [(2, 2.0), (3, 1.0)]], [(3, 1.5)], width=920, height=290)
    assert chart["raw"].count("M") == 2 and chart["last"][2] == "1.00" and len(chart["evals"]) == 1


def test_what_is_no_number_is_not_drawn() -> None:
    assert loss_chart([[(1, math.nan), (2, math.inf)]], [], width=920, height=290)["last"] is None
    assert forest([{"name": "a", "low": None, "high": None, "change": None}]) == {
        "a": {"low": 50.0, "change": 50.0, "high": 50.0}
    }


def test_an_interval_that_is_not_told_is_not_drawn() -> None:
    """The page drew one beside "–" and "too few cases"."""
    told = {"name": "loss", "low": -3.0, "change": -2.0, "high": -1.0, "cases": 48, "reading": "better"}
    few = {**told, "name": "rouge", "cases": 4, "reading": "too few cases"}
    drawn = forest([told, few])
    assert drawn["loss"]["low"] < drawn["loss"]["change"] < drawn["loss"]["high"] < 50
    assert drawn["rouge"]["low"] == drawn["rouge"]["change"] == drawn["rouge"]["high"]
