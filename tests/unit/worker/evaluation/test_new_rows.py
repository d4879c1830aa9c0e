"""Measures next to those of the rows that no row to train on gives away."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loractl.worker.evaluation.comparison import Compared, Labels, compare_shares, judged_apart, with_new_rows


def measure(name: str, cases: int) -> Compared:
    return compare_shares(name, name.upper(), [False] * cases, [True] * cases)


def test_a_measure_is_followed_by_that_of_the_new_rows_where_its_cases_are_others() -> None:
    every = [measure("same", 12), measure("fewer", 40), measure("gone", 16)]
    found = with_new_rows(every, [measure("same", 12), measure("fewer", 30), measure("only", 10)])
    assert [(one.name, one.cases, one.reading) for one in found] == [
        ("same", 12, "better"),
        ("fewer", 40, "better"),
        ("new_rows_fewer", 30, "better"),
        ("gone", 16, "better"),
        ("new_rows_gone", 0, "too few cases"),
        ("new_rows_only", 10, "better"),
    ]
    assert found[2].label == "FEWER, rows like none that is trained on" and math.isnan(found[4].tuned)
    assert with_new_rows(every) == every


@pytest.mark.parametrize(("seen", "rows", "apart"), [(0, 40, False), (1, 31, True), (11, 40, False), (40, 40, False)])
def test_rows_are_judged_apart_where_thirty_are_left(seen: int, rows: int, apart: bool) -> None:
    assert judged_apart(np.arange(rows) < seen) == apart


def test_labels_of_some_rows_are_those_of_their_places() -> None:
    labels = Labels.of("ab", list("aabb"), list("abab"), list("bbbb")).among(np.array([True, False, False, True]))
    assert (labels.expected, labels.base, labels.tuned) == ([0, 1], [0, 1], [1, 1])
    assert labels.names == ["a", "b", "other"] and labels.right(labels.tuned) == [False, True]
