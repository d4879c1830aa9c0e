"""bitsandbytes, loaded without torch's compiler, and with a faster way to NF4 on a CPU."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from .processor import REPEATABLE

QUANTISE = "bitsandbytes::quantize_4bit"

PIECE = 7 * 2**12
"""Elements of a weight quantised at a time: they stay in a core's cache, and torch does not divide fewer than 2**15
among threads, so that no operation waits for a thread on a busy CPU."""


def load_kernels() -> None:
    """Import bitsandbytes; call it before peft, which does the same. It asks for the device's capability.

    It passes five functions to torch.compile, for devices without kernels. None of them is compiled, but torch loads
    its compiler for that: a tenth of a trainer's start. Here they stay as written.

    All code that computes calls it first, so it also sets how MKL adds up, before torch loads MKL, and keeps the hub's
    code away.
    """
    refuse_hub_kernels()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # on some processors it asks for `kernels`
    os.environ.setdefault(*REPEATABLE)  # unless its owner has set it otherwise
    import torch

    compiler = torch.compile
    torch.compile = _as_written
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler
    if not torch._C._dispatch_has_kernel_for_dispatch_key(QUANTISE, "CPU"):  # a later version may bring its own
        torch.library.register_kernel(QUANTISE, "cpu", _quantiser())


def refuse_hub_kernels() -> None:
    """Hide the package `kernels`, which comes with transformers; call it before transformers imports a model's code.

    With it transformers and bitsandbytes fetch native code from the hub and run it: bitsandbytes while it is imported
    on some processors, transformers for each model that it loads. What a job computes would depend on the hub's answer.
    """
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
    os.environ["USE_HUB_KERNELS"] = "NO"  # else transformers refuses to load a model without the package


def _as_written(function: Any = None, **_: Any) -> Any:
    """Replaces torch.compile: as a call, or as a decorator with options."""
    return function if function is not None else _as_written


def _quantiser() -> Callable[[Any, int, str, Any], tuple[Any, Any]]:
    """A kernel that packs a weight into 4 bits as bitsandbytes 0.50 does for devices without one, bit for bit.

    bitsandbytes looks up each element among the 15 borders between NF4's values, which takes a CPU 26 ns; counting the
    borders below it takes 4. numpy counts in bytes, which torch is slow to fill: there it took 9. Two threads were no
    faster than one, since each waits for Python's lock after each operation. What is not in whole blocks of NF4 is left
    to bitsandbytes.
    """
    import numpy as np
    import torch
    from bitsandbytes.functional import get_4bit_type

    general = torch.library.get_kernel(QUANTISE, "CPU")
    values = get_4bit_type("nf4", device="cpu")
    borders = ((values[:-1] + values[1:]) / 2).numpy()
    own = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def quantise(weight: Any, blocksize: int, quant_type: str, quant_storage: Any) -> tuple[Any, Any]:
        flat, count = weight.detach().reshape(-1), weight.numel()
        if quant_type != "nf4" or count % blocksize or PIECE % blocksize:
            packed, scales = general.call_boxed(own, weight, blocksize, quant_type, quant_storage)
            return packed, scales
        packed = torch.empty(count // 2, dtype=torch.uint8)
        scales = torch.empty(count // blocksize)

        scaled, below, code = torch.empty(PIECE), np.empty(PIECE, np.bool_), np.empty(PIECE, np.uint8)
        for at in range(0, count, PIECE):
            size = min(PIECE, count - at)
            _scale(flat[at : at + size], scaled[:size], scales[at // blocksize : (at + size) // blocksize])
            _count(borders, scaled[:size].numpy(), below[:size], code[:size])
            pairs = code[:size].view("<u2")  # the first of two is the low byte
            packed[at // 2 : (at + size) // 2].numpy()[:] = pairs << 4 | pairs >> 8
        return packed.view(quant_storage).unsqueeze(1), scales

    return quantise


def _scale(weight: Any, scaled: Any, scales: Any) -> None:
    """Write the largest absolute value of each block to `scales`, and the weight divided by these to `scaled`."""
    blocks = scaled.copy_(weight).view(len(scales), -1)
    most = scales.copy_(blocks.abs().amax(-1))
    blocks.mul_(most.clamp(min=1e-38).reciprocal_().view(-1, 1))


def _count(borders: Any, scaled: Any, below: Any, code: Any) -> None:
    """Write to `code` how many borders are below each number; a NaN is above all."""
    import numpy as np

    code.fill(len(borders))
    for border in borders:
        np.less_equal(scaled, border, out=below)
        np.subtract(code, below.view(np.uint8), out=code)
