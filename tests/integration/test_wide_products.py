"""How a processor multiplies: in one order, and 16-bit weights in fp32 slab by slab."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from loractl.worker.base.kernels import load_kernels
from loractl.worker.base.processor import REPEATABLE
from loractl.worker.engine.passes import wide


@pytest.mark.long
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
    assert torch.equal(wide.product(x, narrow.T.contiguous().T, None), x @ weight.T)


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
