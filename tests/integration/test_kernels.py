"""NF4 on a processor: the bits of bitsandbytes, sooner."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loractl.worker.base.kernels import PIECE, QUANTISE, load_kernels


def quantised(on: str, weight: torch.Tensor, *how: object) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernel of a device does it; XLA has none of its own."""
    load_kernels()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    packed, scales = torch.library.get_kernel(QUANTISE, on).call_boxed(keys, weight, *how)
    return packed, scales


FETCHING = """
import socket, sys
asked = []
socket.getaddrinfo = lambda host, *args, **kwargs: asked.append(host) or sys.exit(f"asked for {host}")
from loractl.worker.base.kernels import load_kernels
load_kernels()
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(sys.argv[1])
LlamaForCausalLM.from_pretrained(sys.argv[1])
print(asked, is_kernels_available(), sys.modules["kernels"])
"""


def test_no_library_fetches_native_code_from_the_hub(tmp_path: Path) -> None:
    """bitsandbytes would while it is imported, on processors with bf16 products; transformers, as it loads a model."""
    assert importlib.metadata.version("kernels")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "USE_HUB_KERNELS"))}
    command = [sys.executable, "-c", FETCHING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert (done.stdout, done.returncode) == ("[] False None\n", 0), done.stderr
    assert "kernels" not in done.stderr  # nor is anybody told to install it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_gets_the_bits_that_bitsandbytes_gives_it(dtype: torch.dtype) -> None:
    weight = torch.randn(6, PIECE // 2 + 64, generator=torch.Generator().manual_seed(1))
    weight[0, :64], weight[1, 3], weight[2, 5], weight[3, :64] = 0.0, torch.nan, torch.inf, 1e-39
    for blocksize, storage in ((64, torch.uint8), (128, torch.bfloat16)):
        mine, theirs = (quantised(on, weight.to(dtype), blocksize, "nf4", storage) for on in ("CPU", "XLA"))
        assert torch.equal(mine[0].view(torch.uint8), theirs[0].view(torch.uint8)) and mine[0].shape == theirs[0].shape
        assert torch.equal(mine[1].nan_to_num(7.0), theirs[1].nan_to_num(7.0))


def test_each_weight_in_16_bit_gets_the_same_code_beside_each_largest_one_of_its_block() -> None:
    """But for powers of two, which change nothing, and for less than a 128th of the largest one, which is 0 to NF4."""
    numbers = torch.arange(0x3C00, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # from 2**-7 to 2
    every = torch.cat([numbers, -numbers, numbers[:31]])[
        torch.randperm(33 * 63, generator=torch.Generator().manual_seed(1))
    ]
    largest = numbers[-128:]
    blocks = every.view(-1, 63).expand(len(largest), -1, -1)
    most = largest[:, None, None].expand(*blocks.shape[:2], 1)
    weight = torch.cat([most, blocks.clamp(-most, most)], -1)
    mine, theirs = (quantised(on, weight, 64, "nf4", torch.uint8) for on in ("CPU", "XLA"))
    assert all(map(torch.equal, mine, theirs)) and len((mine[0] % 16).unique()) == 16


@pytest.mark.parametrize("how", [(64, "fp4", torch.uint8), (64, "nf4", torch.uint8)])
def test_what_is_not_in_whole_blocks_of_nf4_is_left_to_bitsandbytes(how: tuple[object, ...]) -> None:
    for weight in (torch.randn(3, 33), torch.randn(4, 64)):
        mine, theirs = (quantised(on, weight, *how) for on in ("CPU", "XLA"))
        assert all(map(torch.equal, mine, theirs))


def test_a_weight_is_quantised_several_times_as_fast() -> None:
    weight, took = torch.randn(32 * PIECE), {}
    for on in 3 * ("CPU", "XLA"):
        began = time.process_time()
        quantised(on, weight, 64, "nf4", torch.uint8)
        took[on] = min(took.get(on, 9.0), time.process_time() - began)
    assert took["CPU"] < 0.6 * took["XLA"], took  # far more than noise: the general way takes several times as long
