"""The choice of a method, and the classes that decide which nodes are woken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.policy import (
    VRAM_CLASSES,
    Need,
    choose_method,
    least_need,
    permitted_methods,
    queue_name,
    served_classes,
    vram_class,
)
from loractl.common.spec import Method
from loractl.common.units import GIB

NEED = Need(lora=20 * GIB, qlora=8 * GIB)
sizes = st.integers(1, 400 * GIB)


@pytest.mark.parametrize(
    ("wanted", "limit", "chosen"),
    [
        (Method.AUTO, 20 * GIB, Method.LORA),
        (Method.AUTO, 20 * GIB - 1, Method.QLORA),
        (Method.AUTO, 8 * GIB - 1, None),
        (Method.LORA, 20 * GIB, Method.LORA),
        (Method.LORA, 20 * GIB - 1, None),
        (Method.QLORA, 100 * GIB, Method.QLORA),
        (Method.QLORA, 8 * GIB - 1, None),
    ],
)
def test_the_better_method_that_fits_is_chosen(wanted: Method, limit: int, chosen: Method | None) -> None:
    assert choose_method(wanted, NEED, limit) is chosen


def test_an_unknown_need_counts_as_fitting() -> None:
    unknown = Need(lora=None, qlora=None)
    assert choose_method(Method.AUTO, unknown, 1) is Method.LORA
    assert choose_method(Method.QLORA, unknown, 1) is Method.QLORA
    assert choose_method(Method.AUTO, Need(lora=20 * GIB, qlora=None), GIB) is Method.QLORA


def test_the_least_need_is_that_of_the_smallest_permitted_method_or_unknown() -> None:
    assert [least_need(m, NEED) for m in (Method.AUTO, Method.LORA, Method.QLORA)] == [8 * GIB, 20 * GIB, 8 * GIB]
    assert least_need(Method.AUTO, Need(lora=GIB, qlora=None)) is None
    assert least_need(Method.LORA, Need(lora=GIB, qlora=None)) == GIB


@given(st.sampled_from(Method), st.none() | sizes, st.none() | sizes, sizes)
def test_a_method_is_found_exactly_when_the_least_need_fits(
    wanted: Method, lora: int | None, qlora: int | None, limit: int
) -> None:
    need = Need(lora=lora, qlora=qlora)
    least, method = least_need(wanted, need), choose_method(wanted, need, limit)
    assert (method is not None) == (least is None or least <= limit or (None in _permitted(wanted, need)))
    if method is not None:
        assert method in permitted_methods(wanted)
        size = need.of(method)
        assert size is None or size <= limit


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


def _permitted(wanted: Method, need: Need) -> list[int | None]:
    return [need.of(method) for method in permitted_methods(wanted)]
