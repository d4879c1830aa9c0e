"""Batches that shrink until memory holds them."""

from __future__ import annotations

from collections.abc import Callable

from .gauge import is_out_of_memory, release


def in_batches(order: list[int], batch: int, work: Callable[[list[int]], None]) -> int:
    """Do the work on `batch` items at a time; out of memory halves the batch, down to one. Returns the last size.

    A training must not be lost because its evaluation takes larger batches than the training did.
    """
    start = 0
    while start < len(order):
        chosen = order[start : start + batch]
        try:
            work(chosen)
        except Exception as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
        else:
            start += batch
            continue
        batch = len(chosen) // 2
        release()  # outside of the handler: until it ends, the error's traceback holds the tensors
    return batch
