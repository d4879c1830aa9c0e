"""bitsandbytes, loaded without torch's compiler, and with a faster way to NF4 on a processor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

QUANTISE = "bitsandbytes::quantize_4bit"

PIECE = 7 * 2**12
"""Elements of a weight that are quantised at a time: they stay in a core's cache, and torch divides none below 2**15
among threads, so that no thread of a busy processor is waited for after each operation."""


def load_kernels() -> None:
    """Import bitsandbytes; call it before peft, which does the same. It asks for the device's capability.

    It hands five functions to torch.compile, for devices that it has no kernels for. None of them is compiled, but for
    that torch loads its compiler: a tenth of what a trainer's start takes. Here they stay as they are written.
    """
    import torch

    compiler = torch.compile
    torch.compile = _as_written
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler
    if not torch._C._dispatch_has_kernel_for_dispatch_key(QUANTISE, "CPU"):  # a later one may bring its own
        torch.library.register_kernel(QUANTISE, "cpu", _quantiser())


def _as_written(function: Any = None, **_: Any) -> Any:
    """In torch.compile's place: as a call, or as a decorator with options."""
    return function if function is not None else _as_written


def _quantiser() -> Callable[[Any, int, str, Any], tuple[Any, Any]]:
    """A kernel that packs a weight into 4 bits as bitsandbytes 0.50 does for devices without one, bit for bit.

    That looks up each element among the 15 borders between NF4's values, which takes a processor 26 ns; to count the
    borders below it takes 5. What is not in whole blocks of NF4 is left to it.
    """
    import torch
    from bitsandbytes.functional import get_4bit_type

    general = torch.library.get_kernel(QUANTISE, "CPU")
    values = get_4bit_type("nf4", device="cpu")
    borders = ((values[:-1] + values[1:]) / 2).tolist()
    own = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def quantise(weight: Any, blocksize: int, quant_type: str, quant_storage: Any) -> tuple[Any, Any]:
        flat, count = weight.reshape(-1), weight.numel()
        if quant_type != "nf4" or count % blocksize or PIECE % blocksize:
            packed, scales = general.call_boxed(own, weight, blocksize, quant_type, quant_storage)
            return packed, scales
        packed = torch.empty(count // 2, dtype=torch.uint8)
        scales = torch.empty(count // blocksize)

        def work(begins: range) -> None:
            below, code = torch.empty(PIECE), torch.empty(PIECE)
            for at in begins:
                piece = flat[at : at + PIECE].float().view(-1, blocksize)
                most = piece.abs().amax(-1)
                scales[at // blocksize :][: len(most)] = most
                scaled = (piece * (1.0 / most.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1).view(-1)
                counted, one = code[: len(scaled)].fill_(len(borders)), below[: len(scaled)]
                for border in borders:
                    counted.sub_(torch.le(scaled, border, out=one))
                pairs = counted.view(-1, 2)
                packed[at // 2 :][: len(pairs)] = (pairs[:, 0] * 16).add_(pairs[:, 1])

        begins, threads = range(0, count, PIECE), torch.get_num_threads()
        if threads == 1 or len(begins) == 1:
            work(begins)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, [begins[n::threads] for n in range(threads)]))
        return packed.view(quant_storage).unsqueeze(1), scales

    return quantise
