"""The optimizer: which one a job takes, and the bytes of its state."""

from __future__ import annotations

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec

BLOCK_8BIT = 256
"""Values that share one fp32 scale in bitsandbytes' 8-bit optimizers."""

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep 32-bit state in them (bitsandbytes, min_8bit_size)."""


PAGED, FUSED, PLAIN = "paged_adamw_8bit", "adamw_torch_fused", "adamw_torch"
"""Those that a worker takes if the job asks for none: they are all AdamW, with different states."""


def optimizer_name(spec: JobSpec, method: Method, *, on_gpu: bool = True) -> str:
    """The optimizer that the worker takes for a job: where none is asked for, paged 8-bit AdamW where memory is scarce;
    on a processor there is nothing to page."""
    if spec.training.optim != "auto":
        return spec.training.optim
    if method is Method.QLORA and on_gpu:
        return PAGED
    return PLAIN if spec.training.exact else FUSED


def state_bytes(optimizer: str, elements: int) -> int:
    """An optimizer's state for one tensor. Paged state counts in full: it is on the card while it is used.

    Moments: two of Adam (arXiv:1412.6980), one of Lion (2302.06675), RMSprop and Adagrad, three of AdEMAMix
    (2409.03137); in 8 bit each has an fp32 scale a block (2110.02861).
    """
    name = optimizer.removeprefix("paged_")
    moments = {"adamw": 2, "lion": 1, "ademamix": 3, "adagrad": 1, "rmsprop": 1}.get(name.partition("_")[0], 0)
    if name.endswith("_8bit") and elements >= SMALLEST_8BIT:
        return moments * (elements + 4 * -(-elements // BLOCK_8BIT))
    return 4 * moments * elements  # none of sgd without momentum; adafactor's sums are a few kilobytes (1804.04235)


def update_bytes(optimizer: str, adapter: int, tensors: list[tuple[int, int]]) -> float:
    """What the optimizer's step takes for itself: torch's AdamW works on all tensors at once and holds a root of the
    second moments; bitsandbytes' kernels work in place; adafactor squares one gradient after the other."""
    if optimizer == "adamw_torch":
        return adapter
    return 8 * max(size for size, _ in tensors) if optimizer == "adafactor" else 0
