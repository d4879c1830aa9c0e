"""How a CPU multiplies: the instructions that it has and the libraries may use, and how MKL adds up."""

from __future__ import annotations

import os
import platform

from loractl.worker.allowance import MOST_ONEDNN, bf16_allowed, cpuinfo, instructions_allowed

REPEATABLE = ("MKL_CBWR", "AUTO,STRICT")
"""Makes MKL, before its first product, add up in an order that depends neither on the number of rows and threads nor on
where a matrix is in memory (Intel's "conditional numerical reproducibility"). Where measured, it cost no time."""


def has_bf16() -> bool:
    """Whether bf16 products have their own instructions here."""
    import torch

    return bf16_allowed() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_tiles() -> bool:
    """Whether there are tiles (Intel's AMX). Virtual machines may hide them."""
    import torch

    most = instructions_allowed()
    return torch.cpu._is_amx_tile_supported() and (most in ("", "ALL", "DEFAULT") or "AMX" in most)


def arithmetic() -> tuple[str, ...]:
    """What the bits of a product in fp32 depend on, apart from its numbers and its shape."""
    import torch

    kept = [f"{name}={os.environ.get(name)}" for name in ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", *MOST_ONEDNN)]
    model = cpuinfo("model name") or platform.processor()
    return (model, torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", *kept)
