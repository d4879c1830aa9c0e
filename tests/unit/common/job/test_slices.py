"""Which rows a split names, as the datasets library means it."""

from __future__ import annotations

import pytest

from loractl.common.job.slices import parse_split


@pytest.mark.parametrize(
    ("split", "of_30"),
    [
        ("train", range(30)),
        ("train[:10]", range(10)),
        ("train[10:20]", range(10, 20)),
        ("train[-5:]", range(25, 30)),
        ("train[:5%]", range(2)),  # 1.5, rounded to the even one as Python does
        ("train[-5%:]", range(28, 30)),
        ("train[10%:20%]", range(3, 6)),
        ("train[:500]", range(30)),
        ("train[20:10]", range(0)),
    ],
)
def test_bounds_are_those_of_python_and_of_percents(split: str, of_30: range) -> None:
    (part,) = parse_split(split)
    assert list(part.places(30)) == list(of_30)


@pytest.mark.parametrize(("percent", "rows", "end"), [(75, 14, 10), (-90, 35, 3), (58, 25, 14)])
def test_a_share_that_ends_between_two_rows_is_rounded_as_datasets_does(percent: int, rows: int, end: int) -> None:
    (part,) = parse_split(f"train[:{percent}%]")
    assert part.places(rows) == range(end)


def test_parts_are_joined_by_a_plus() -> None:
    assert [part.name for part in parse_split("train[:80%] + test+validation.old")] == [
        "train",
        "test",
        "validation.old",
    ]


@pytest.mark.parametrize(
    ("split", "what"),
    [
        ("train[:5%", "is not a split of a data set"),
        ("train[5]", "is not a split of a data set"),
        ("train[:0.5]", "is not a split of a data set"),
        ("", "is not a split of a data set"),
        ("train+", "is not a split of a data set"),
        ("train[10:50%]", "has one bound in rows and one in percent"),
        ("train[:101%]", "has a bound beyond 100 %"),
    ],
)
def test_what_names_no_rows_is_refused(split: str, what: str) -> None:
    with pytest.raises(ValueError, match="^" + what):
        parse_split(split)
