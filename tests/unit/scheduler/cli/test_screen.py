"""Tables, bars and times: as wide as they may be, and quiet where the terminal has no letters for them."""

from __future__ import annotations

import datetime as dt

import click
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.units import clock
from loractl.scheduler.cli.screen import Screen, bar, fit, sparkline, table

from ...factories import NOON

PLAIN = Screen(width=80, unicode=True, color=False)
ASCII = Screen(width=80, unicode=False, color=False)
COLOR = Screen(width=80, unicode=True, color=True)


@given(st.floats(-1, 2), st.integers(1, 60), st.booleans())
def test_a_bar_always_has_the_width_that_it_was_given(share: float, width: int, unicode: bool) -> None:
    screen = PLAIN if unicode else ASCII
    drawn = bar(share, width, screen)
    assert len(drawn) == width
    assert unicode or set(drawn) <= {"#", "."}


def test_a_bar_grows_in_eighths_and_is_full_only_at_the_end() -> None:
    assert [bar(share, 2, PLAIN) for share in (0, 1 / 16, 0.5, 1)] == ["··", "▏·", "█·", "██"]
    assert [bar(share, 4, ASCII) for share in (0, 0.5, 0.99, 1)] == ["....", "##..", "###.", "####"]


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 60))
def test_a_sparkline_fits_its_width_and_spans_its_values(values: list[float], width: int) -> None:
    drawn = sparkline(values, width, PLAIN)
    assert len(drawn) == min(width, len(values))
    if len(values) <= width and len(set(values)) > 1:
        assert drawn[values.index(min(values))] == "▁"
        assert drawn[values.index(max(values))] == "█"


def test_a_sparkline_of_a_flat_value_or_in_ascii_is_quiet() -> None:
    assert sparkline([2.0, 2.0], 30, PLAIN) == "▁▁"
    assert sparkline([1.0, 2.0], 30, ASCII) == sparkline([], 30, PLAIN) == ""


def test_a_table_is_aligned_by_what_is_seen_not_by_its_escapes() -> None:
    styled = [["1", COLOR.style("red", fg="red"), "x"], ["10", "green", "y"]]
    lines = [click.unstyle(line) for line in table(["N", "COLOR", "Z"], styled, COLOR, right=("N",))]
    assert lines == [" N  COLOR  Z", " 1  red    x", "10  green  y"]
    assert table(["N", "COLOR"], [], PLAIN) == ["N  COLOR"]


@given(st.text(max_size=50), st.integers(1, 40))
def test_a_fitted_text_is_one_printable_line_of_at_most_the_width(text: str, width: int) -> None:
    shown = fit(text, width)
    assert len(shown) <= max(width, 2)
    assert shown == "" or shown.isprintable()


def test_a_moment_is_as_short_as_its_age_allows() -> None:
    local = NOON.astimezone()
    assert clock(None, NOON) == "–"
    assert clock(NOON, NOON) == local.strftime("%H:%M")
    assert clock(NOON, NOON + dt.timedelta(days=2)) == local.strftime("%a %H:%M")
    assert clock(NOON, NOON + dt.timedelta(days=40)) == local.strftime("%d %b")
