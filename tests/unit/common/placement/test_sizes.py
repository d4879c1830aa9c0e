"""Sizes: the VRAM classes hold what they promise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.placement.lines import VRAM_CLASSES, served_classes, vram_class
from loractl.common.queue.hints import queue_name
from loractl.common.units import GIB

from .scenes import sizes


@given(sizes, sizes)
def test_a_job_that_fits_always_waits_in_a_class_that_is_served(need: int, free: int) -> None:
    if need <= free:
        assert vram_class(need) in served_classes(free)


@given(sizes)
def test_a_job_of_unknown_need_wakes_every_node(free: int) -> None:
    assert vram_class(None) in served_classes(free)


@given(st.integers(1, VRAM_CLASSES[-1] * GIB))
def test_a_class_holds_the_need_and_the_next_smaller_one_does_not(need: int) -> None:
    chosen = vram_class(need)
    assert need <= chosen * GIB
    assert all(need > c * GIB for c in VRAM_CLASSES if c < chosen)


def test_a_node_does_not_serve_classes_of_jobs_that_cannot_fit() -> None:
    assert served_classes(24 * GIB) == (8, 12, 16, 24)
    assert served_classes(24 * GIB + 1) == (8, 12, 16, 24, 32)
    assert served_classes(0) == ()


def test_each_class_has_a_queue_of_its_own_and_a_need_beyond_all_the_largest() -> None:
    assert list(VRAM_CLASSES) == sorted(set(VRAM_CLASSES))
    assert len({queue_name(c) for c in VRAM_CLASSES}) == len(VRAM_CLASSES)
    assert queue_name(vram_class(10**15)) == "vram.288"
