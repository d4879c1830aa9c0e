"""The fit: how large a micro-batch, or how long a row, a card holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec

from .plan import plan
from .shape import Shape
from .step import Lengths, Stack

MOST = 2**24
"""Where the search for the largest length or micro-batch ends: more than any model takes."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest values that fit, each with the job's other key as it is; None where nothing fits."""

    micro_batch: int | None
    max_length: int | None
    all_rows: bool = False  # the micro-batch holds every row to train on: rows are the limit, not memory


def largest_fit(
    shape: Shape,
    spec: JobSpec,
    method: Method,
    limit: int,
    lengths: Lengths | None = None,
    *,
    stack: Stack | None = None,
) -> Fit:
    """The largest micro-batch at the job's length, and the largest max_length at its micro-batch, in `limit` bytes.

    A max_length beyond the longest row changes nothing, so the search takes rows of any length.
    """

    def batch_fits(size: int) -> bool:
        training = spec.training.model_copy(update={"per_device_train_batch_size": size})
        return (
            plan(shape, spec.model_copy(update={"training": training}), method, lengths, stack=stack).need_bytes
            <= limit
        )

    def length_fits(size: int) -> bool:
        dataset = spec.dataset.model_copy(update={"max_length": size})
        return plan(shape, spec.model_copy(update={"dataset": dataset}), method, stack=stack).need_bytes <= limit

    rows = lengths.rows if lengths else None
    batch = _largest(batch_fits, 1, rows or MOST)
    all_rows = batch is not None and batch == rows
    return Fit(micro_batch=batch, max_length=_largest(length_fits, 8, MOST), all_rows=all_rows)


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number up to `most` for which a monotone condition holds, by doubling and halving; None if `least`
    is too much."""
    if not fits(least):
        return None
    low, high = least, 2 * least
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
