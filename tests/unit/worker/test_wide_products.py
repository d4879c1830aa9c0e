"""Products of 16-bit weights in fp32: slab by slab they are those of the whole weight."""

from __future__ import annotations

import pytest
import torch

from loractl.worker.engine.passes import wide


@pytest.mark.parametrize(("outputs", "inputs"), [(1100, 1024), (7, 5), (2, wide.SLAB + 1)])
def test_a_weight_is_multiplied_slab_by_slab(outputs: int, inputs: int) -> None:
    """Of whole numbers, which every order of summing leaves exact."""
    draw = torch.Generator().manual_seed(0)
    weight, x, given, bias = (
        torch.randint(-2, 3, shape, generator=draw).float()
        for shape in ((outputs, inputs), (3, inputs), (3, outputs), (outputs,))
    )
    narrow = weight.bfloat16()
    assert torch.equal(wide.product(x, narrow, bias.bfloat16()), x @ weight.T + bias)
    assert torch.equal(wide.input_gradient(given, narrow), given @ weight)
    assert torch.equal(wide.product(x, narrow.T.contiguous().T), x @ weight.T)
