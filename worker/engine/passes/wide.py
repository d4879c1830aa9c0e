"""Products of 16-bit weights in fp32, on CPUs that are faster that way.

The multiplied numbers are the same, and fp32 holds their products exactly: only the sum is rounded later. Weights are
widened in parts, so no whole layer is held in fp32.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from typing import Any

import torch

from loractl.worker.allowance import cpuinfo
from loractl.worker.base.processor import has_bf16, has_tiles


class Scratch:
    """Memory for fp32 numbers on a CPU. Each tensor overwrites the last."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, count: int, width: int) -> torch.Tensor:
        """Memory of shape (count, width), which the last tensor used."""
        if self._memory is None or len(self._memory) < count * width:
            self._memory = None  # before allocating more
            self._memory = torch.empty(count * width)
        return torch.empty(0).set_(self._memory.untyped_storage(), 0, (count, width))

    def leave(self) -> None:
        """Release the memory. Tensors still in use keep theirs."""
        self._memory = None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the last one, unchanged."""
        return self._memory is not None and tensor.data_ptr() == self._memory.data_ptr() and tensor.is_contiguous()


SLAB = 1 << 20
"""Numbers of a weight widened at a time: 4 MiB, which stay in a core's cache."""


@functools.cache
def multiplies_wide() -> bool:
    """Whether this CPU multiplies fp32 faster than bf16.

    Without instructions for bf16 it is emulated, at a fifth of the rate of fp32. Intel's AVX512 multiplies bf16 at half
    that rate (82 GFLOPS against 154 on a core); its tiles (AMX), which virtual machines may hide, and AMD's AVX512 are
    faster in bf16. Decided by kind, not by timing: a job resumed on a similar machine must compute the same bits.
    """
    if platform.machine() not in ("x86_64", "AMD64") or has_tiles():
        return False
    return "GenuineIntel" in cpuinfo("vendor_id") or not has_bf16()


_narrow = False


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """Products of 16-bit numbers as the library computes them, whose bits do not depend on the number of rows. Only one
    thread of a process at a time may use it."""
    global _narrow
    _narrow = True
    try:
        yield
    finally:
        _narrow = False


def widens(x: torch.Tensor) -> bool:
    """Whether products of tensors like `x` are computed in fp32 here."""
    return not _narrow and may_widen(x.device, x.dtype)


def may_widen(device: torch.device, kind: torch.dtype) -> bool:
    """Whether products of numbers of this type on this device are computed in fp32, outside `narrow`."""
    return kind is torch.bfloat16 and device.type == "cpu" and multiplies_wide()


def as_it_is(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast, which would make fp32 products narrow again, if products of tensors like `x` are computed in
    fp32."""
    return torch.autocast(x.device.type, enabled=False) if widens(x) else contextlib.nullcontext()


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch | None = None
) -> torch.Tensor:
    """x W^T + bias in fp32, of shape (tokens, outputs); `x` is in fp32, `weight` (outputs, inputs) in 16 bit.
    `scratch`: has room for the output."""
    shape = len(x), len(weight)
    answer = x.new_empty(shape) if scratch is None else scratch.take(*shape)
    for rows, wide in _slabs(weight):
        torch.mm(x, wide.T, out=answer[:, rows])
    return answer if bias is None else answer.add_(bias)


def input_gradient(given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """given W in fp32, of shape (tokens, inputs); `given` is in fp32."""
    back = given.new_empty(len(given), weight.shape[1])
    for rows, wide in _slabs(weight):
        if rows.start == 0:
            torch.mm(given[:, rows], wide, out=back)
        else:
            back.addmm_(given[:, rows], wide)
    return back


def _slabs(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a weight, and the same in fp32. The next rows overwrite them."""
    count, width = weight.shape
    height = max(1, min(count, SLAB // width))
    room = torch.empty(height, width)
    for at in range(0, count, height):
        rows = slice(at, min(at + height, count))
        yield rows, room[: rows.stop - at].copy_(weight[rows])
