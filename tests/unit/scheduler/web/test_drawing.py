"""What a page draws has room where it stands, and says the same in fewer lines."""

from __future__ import annotations

import pytest

from loractl.scheduler.web.pages.drawing import labels

from .conftest import Web
from .test_pages import words


@pytest.mark.parametrize(
    ("percent", "found"),
    [
        (100, [("slim middle ample", "lena · 30 · 0.6")]),
        (36, [("slim", "30"), ("middle", "lena · 30"), ("ample", "lena · 30 · 0.6")]),
        (20, [("slim middle", "30"), ("ample", "lena · 30")]),
        (7, [("ample", "30")]),
        (3, []),
    ],
    ids=str,
)
def test_a_label_that_has_no_room_is_shorter_and_never_cut(percent: float, found: list[tuple[str, str]]) -> None:
    assert labels(percent, "lena · 30 · 0.6", "lena · 30", "30") == found


def test_checkpoints_that_follow_each_other_are_one_line_of_the_history(own_web: Web) -> None:
    own_web.alter(
        "INSERT INTO events (job_id, attempt, at, kind, text) SELECT 12, 1, '2026-01-14 11:59:59.000000', 'saved',"
        " 'saved step ' || (job_id * 10) FROM jobs WHERE job_id <= 9"
    )
    page = words(own_web.client.get("/jobs/12").text)
    assert "Saved steps 10 to 90, 9 checkpoints" in page and "Saved step 50" not in page
