"""NF4 on a processor: the bits of bitsandbytes, sooner."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from loractl.worker.base.kernels import PIECE, QUANTISE, load_kernels


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def quantised(on: str, weight: torch.Tensor, *how: object) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernel of a device does it; XLA has none of its own."""
    load_kernels()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    packed, scales = torch.library.get_kernel(QUANTISE, on).call_boxed(keys, weight, *how)
    return packed, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_gets_the_bits_that_bitsandbytes_gives_it(threads: int, dtype: torch.dtype) -> None:
    weight = torch.randn(6, PIECE // 2 + 64, generator=torch.Generator().manual_seed(1))
    weight[0, :64], weight[1, 3], weight[2, 5], weight[3, :64] = 0.0, torch.nan, torch.inf, 1e-39
    for blocksize, storage in ((64, torch.uint8), (128, torch.bfloat16)):
        mine, theirs = (quantised(on, weight.to(dtype), blocksize, "nf4", storage) for on in ("CPU", "XLA"))
        assert torch.equal(mine[0].view(torch.uint8), theirs[0].view(torch.uint8)) and mine[0].shape == theirs[0].shape
        assert torch.equal(mine[1].nan_to_num(7.0), theirs[1].nan_to_num(7.0))


@pytest.mark.parametrize("how", [(64, "fp4", torch.uint8), (64, "nf4", torch.uint8)])
def test_what_is_not_in_whole_blocks_of_nf4_is_left_to_bitsandbytes(how: tuple[object, ...]) -> None:
    for weight in (torch.randn(3, 33), torch.randn(4, 64)):
        mine, theirs = (quantised(on, weight, *how) for on in ("CPU", "XLA"))
        assert all(map(torch.equal, mine, theirs))


def test_a_weight_is_quantised_several_times_as_fast() -> None:
    weight, took = torch.randn(32 * PIECE), {}
    for on in ("CPU", "XLA", "CPU", "XLA"):
        began = time.process_time()
        quantised(on, weight, 64, "nf4", torch.uint8)
        took[on] = min(took.get(on, 9.0), time.process_time() - began)
    assert took["CPU"] < 0.6 * took["XLA"]
