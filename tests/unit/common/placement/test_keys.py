"""Queue keys: they sort as the rule tries, and differ where the rule looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.placement.lines import queue_key, size_step

from .scenes import sizes


@given(st.lists(st.tuples(st.integers(-100, 100), st.none() | sizes), min_size=2, max_size=2))
def test_queue_keys_sort_by_priority_and_then_by_size(pair: list[tuple[int, int | None]]) -> None:
    (p, a), (q, b) = pair
    first, second = queue_key(p, a, {}, "ada"), queue_key(q, b, {}, "ada")
    if p != q:
        assert (first < second) == (p > q)
    elif (a or 0) <= (b or 0):
        assert first <= second
        assert size_step(a) <= size_step(b)
    assert (first == second) == (p == q and size_step(a) == size_step(b))


@given(sizes, st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2), st.text(max_size=5))
def test_equal_needs_share_a_key_and_other_labels_or_users_do_not(size: int, labels: dict[str, str], user: str) -> None:
    key = queue_key(0, size, labels, user)
    assert key == queue_key(0, size, dict(reversed(labels.items())), user)
    assert key != queue_key(0, size, labels, user + "x")
    assert key != queue_key(0, size, {**labels, "more": "y"}, user)
