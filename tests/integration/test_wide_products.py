"""Products of 16-bit weights in fp32: slab by slab they are those of the whole weight."""

from __future__ import annotations

import platform
from pathlib import Path

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
    for parts in ([3], [1, 2]):
        assert torch.equal(wide.product(x, narrow, bias.bfloat16(), parts), x @ weight.T + bias)
        assert torch.equal(wide.input_gradient(given, narrow, parts), given @ weight)
        assert torch.equal(wide.product(x, narrow.T.contiguous().T, None, parts), x @ weight.T)


@pytest.mark.parametrize(
    ("bf16", "tiles", "vendor", "most", "expected"),
    [
        (False, False, "AuthenticAMD", "", True),
        (False, False, "GenuineIntel", "", True),
        (True, False, "GenuineIntel", "", True),
        (True, True, "GenuineIntel", "", False),
        (True, True, "GenuineIntel", "AVX512_CORE_AMX", False),
        (True, True, "GenuineIntel", "avx512_core_bf16", True),
        (True, False, "AuthenticAMD", "", False),
        (True, False, "AuthenticAMD", "AVX512_CORE_BF16", False),
        (True, False, "AuthenticAMD", "AVX2", True),
    ],
)
def test_products_are_wide_where_bf16_is_slow(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, tiles: bool, vendor: str, most: str, expected: bool
) -> None:
    """`most`: the instructions that oneDNN may use at most, as its own variable says."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda *_: f"vendor_id : {vendor}")
    assert wide.multiplies_wide.__wrapped__() is expected
