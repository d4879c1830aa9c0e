"""What a job needs: the methods that it may run with, and the one that is chosen."""

from __future__ import annotations

import pytest

from loractl.common.job.method import Method, Need, choose_method, least_need, permitted_methods, within
from loractl.common.units import GIB

from ..placement.scenes import AUTO

NEED = Need(lora=20 * GIB, qlora=8 * GIB)


@pytest.mark.parametrize(
    ("wanted", "limit", "chosen"),
    [
        (Method.AUTO, 20 * GIB, Method.LORA),
        (Method.AUTO, 20 * GIB - 1, Method.QLORA),
        (Method.AUTO, 8 * GIB - 1, None),
        (Method.LORA, 20 * GIB - 1, None),
        (Method.QLORA, 100 * GIB, Method.QLORA),
        ([Method.QLORA, Method.LORA], 100 * GIB, Method.QLORA),
    ],
)
def test_the_preferred_method_that_fits_is_chosen(
    wanted: Method | list[Method], limit: int, chosen: Method | None
) -> None:
    assert choose_method(permitted_methods(wanted), NEED, limit) is chosen
    assert (chosen in within(permitted_methods(wanted), NEED, limit)) == (chosen is not None)


def test_an_unknown_need_counts_as_fitting() -> None:
    unknown = Need(lora=None, qlora=None)
    assert choose_method(AUTO, unknown, 1) is Method.LORA
    assert within(AUTO, unknown, 1) == AUTO
    assert within(AUTO, NEED, None) == AUTO
    assert within(AUTO, NEED, 8 * GIB) == (Method.QLORA,)


def test_the_least_need_is_that_of_the_smallest_permitted_method_or_unknown() -> None:
    assert [least_need(m, NEED) for m in (AUTO, AUTO[:1], AUTO[1:])] == [8 * GIB, 20 * GIB, 8 * GIB]
    assert least_need(AUTO, Need(lora=GIB, qlora=None)) is None
    assert least_need(AUTO[:1], Need(lora=GIB, qlora=None)) == GIB
