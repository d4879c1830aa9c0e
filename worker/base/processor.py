"""How a CPU multiplies: the instructions that it has and the libraries may use, and how MKL adds up."""

from __future__ import annotations

import os
import platform
from pathlib import Path

REPEATABLE = ("MKL_CBWR", "AUTO,STRICT")
"""Makes MKL, before its first product, add up in an order that depends neither on the number of rows and threads nor on
where a matrix is in memory (Intel's "conditional numerical reproducibility"). Where measured, it cost no time. A CPU
from another maker may do otherwise below some number of rows, so packs ask (passes/together.py)."""

_MOST_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""oneDNN's own variables for the instructions that it may use at most."""

_NO_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of these variables that exclude bf16 instructions."""


def add_up_repeatably() -> None:
    """Set `REPEATABLE` for this process and its children, unless its owner has set it otherwise."""
    name, value = REPEATABLE
    os.environ.setdefault(name, value)


def has_bf16() -> bool:
    """Whether bf16 products have their own instructions here."""
    import torch

    return (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) and _most() not in _NO_BF16


def has_tiles() -> bool:
    """Whether there are tiles (Intel's AMX). Virtual machines may hide them."""
    import torch

    most = _most()
    return torch.cpu._is_amx_tile_supported() and (most in ("", "ALL", "DEFAULT") or "AMX" in most)


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def is_intel() -> bool:
    return "GenuineIntel" in _cpuinfo("vendor_id")


def arithmetic() -> tuple[str, ...]:
    """What the bits of a product in fp32 depend on, apart from its numbers and its shape."""
    import torch

    kept = [f"{name}={os.environ.get(name)}" for name in ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", *_MOST_ONEDNN)]
    model = _cpuinfo("model name") or platform.processor()
    return (model, torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", *kept)


def _most() -> str:
    return next((os.environ[name].upper() for name in _MOST_ONEDNN if name in os.environ), "")


def _cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty if there is none."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8", "replace").splitlines() if about.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
