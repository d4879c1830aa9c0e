"""Sizes and durations, as they are written and as they are shown."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.units import (
    GIB,
    amount,
    duration,
    gib,
    hours,
    parse_date,
    parse_duration,
    parse_moment,
    parse_size,
    thousands,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("800 MiB", 800 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("24G", 24 * 2**30),
        ("800m", 800 * 2**20),
        ("1048576", 2**20),
        (1048576, 2**20),
        ("512 B", 512),
        ("0", 0),
    ],
)
def test_a_size_is_read_with_binary_and_decimal_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 apples", "-1GiB", "1e9", "nan", "9" * 400])
def test_what_is_no_size_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 12GiB"):
        parse_size(text)


@pytest.mark.parametrize("parse", [parse_size, parse_duration])
def test_a_sign_is_named(parse: Callable[[str], float]) -> None:
    with pytest.raises(ValueError, match="is below zero; write it like"):
        parse("-5m")


@pytest.mark.parametrize("text", ["12", 12, "1.5", "1048575"])
def test_a_number_that_can_only_lack_its_unit_is_refused_with_the_unit(text: str | int) -> None:
    with pytest.raises(ValueError, match=f"write {text}GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("30min", 1800),
        ("2h", 7200),
        ("1d", 86400),
        ("1h30m", 5400),
        ("1 h 30 m", 5400),
        (45, 45),
    ],
)
def test_a_duration_is_read_with_one_or_more_units(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "5 weeks", "h", "1h30", "9" * 400, "9" * 400 + "h"])
def test_what_is_no_duration_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 90s"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text", ["00:00:00:00", "2026-12-24T00:00:00:00", "18:00Z", "24:00", "2026W521", "2026-02-30", "18"]
)
def test_what_only_pythons_own_reader_takes_for_a_time_is_refused(text: str) -> None:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    with pytest.raises(ValueError, match="neither a duration nor a time"):
        parse_date(text) if text == "18" else parse_moment(text, now)
    assert parse_moment("2026-12-24T18:00Z", now) == dt.datetime(2026, 12, 24, 18, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0"), (101.24, "101.2"), (1.0, "1.0"), (0.21, "0.21"), (0.00123, "0.0012"), (1e-7, "<0.0001")],
)
def test_hours_below_one_keep_the_digits_that_tell_them_from_none(value: float, shown: str) -> None:
    assert hours(value) == shown


@given(st.text(max_size=30))
def test_no_text_makes_the_parsers_fail_in_another_way(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert str(error).startswith("is not a ")


@given(st.integers(0, 10**6))
def test_a_size_in_gib_survives_reading_and_showing(number: int) -> None:
    assert gib(parse_size(f"{number}GiB")) == f"{number}.0"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"), (0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3600, "60 min"), (5399, "1 h 30 min"),
        (7080, "1 h 58 min"), (7260, "2 h 01 min"), (48 * 3600, "2 d 0 h"), (76 * 3600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_a_duration_is_shown_in_at_most_two_units(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_are_shown_with_their_unknown_value_as_a_dash() -> None:
    assert [gib(None), gib(0), gib(1.25 * GIB)] == ["–", "0.0", "1.2"]
    assert [thousands(None), thousands(0), thousands(1584), thousands(1234567)] == ["–", "0", "1 584", "1 234 567"]


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (14_541, "14.2 KiB"), (2**20, "1.0 MiB"), (5 * GIB, "5.0 GiB")],
)
def test_an_amount_of_bytes_is_shown_in_the_largest_unit_that_it_fills(size: int, shown: str) -> None:
    assert amount(size) == shown
