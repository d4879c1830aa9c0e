"""Products of several trainings: rows are multiplied together only where no bit depends on that."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

from loractl.worker.base.kernels import load_kernels
from loractl.worker.base.processor import REPEATABLE
from loractl.worker.engine.passes import apart
from loractl.worker.engine.passes.apart import FEW, LayerShape, pieces, unsteady

SHAPES = [
    LayerShape(outputs=48, inputs=64, biased=biased, turned=turned, stored=stored)
    for biased, turned, stored in (
        (False, False, torch.float32),
        (True, True, torch.float32),
        (True, False, torch.bfloat16),
    )
]


@pytest.mark.parametrize(
    ("lengths", "together"),
    [
        ([40], [40]),
        ([5], [5]),
        ([40, 90, 33], [163]),
        ([40, FEW - 1, 90, 33], [40, FEW - 1, 123]),
        ([1, 2, FEW], [1, 2, FEW]),
        ([FEW, FEW, 3], [2 * FEW, 3]),
    ],
)
def test_neighbours_are_multiplied_together_but_few_rows_by_themselves(lengths: list[int], together: list[int]) -> None:
    assert list(pieces(lengths, steady=True)) == together
    assert list(pieces(lengths, steady=False)) == lengths


def test_a_library_that_rounds_by_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, and where a 16-bit weight is widened; the sentence names the layer."""

    def by_rows(x: torch.Tensor, weight: torch.Tensor, bias: object, lengths: Sequence[int]) -> torch.Tensor:
        return torch.cat([part @ weight.float().T * (1 + 1e-6 * (len(part) > 500)) for part in x.split(lengths)])

    def alike(x: torch.Tensor, weight: torch.Tensor, bias: object, lengths: Sequence[int]) -> torch.Tensor:
        return by_rows(x, weight, bias, [4] * (len(x) // 4) + [len(x) % 4])

    def back(given: torch.Tensor, weight: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        return by_rows(given, weight.T, None, lengths)

    def back_alike(given: torch.Tensor, weight: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        return back(given, weight, [4] * (len(given) // 4) + [len(given) % 4])

    monkeypatch.setattr(apart, "product", alike)
    monkeypatch.setattr(apart, "input_gradient", back_alike)
    monkeypatch.setattr(apart, "_WIDE", (alike, back_alike))
    assert unsteady(SHAPES) is None
    monkeypatch.setattr(apart, "product", by_rows)
    assert "64 to 48, float32: answers of 512 rows" in str(unsteady(SHAPES))
    assert unsteady(SHAPES[2:]) is None
    monkeypatch.setattr(apart, "_WIDE", (alike, back))
    assert "with a bias, bfloat16: gradients" in str(unsteady(SHAPES[2:]))


def test_what_computes_tells_the_library_to_add_up_in_one_order_unless_its_owner_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, value = REPEATABLE
    for set_before, expected in ((None, value), ("COMPATIBLE", "COMPATIBLE")):
        monkeypatch.delenv(name, raising=False)
        if set_before is not None:
            monkeypatch.setenv(name, set_before)
        load_kernels()
        assert os.environ[name] == expected
