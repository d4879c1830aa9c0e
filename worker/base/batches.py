"""Batches that shrink until memory holds them."""

from __future__ import annotations

from collections.abc import Callable

from .gauge import in_own_thread, is_out_of_memory, release


def in_batches(order: list[int], batch: int, work: Callable[[list[int]], None]) -> int:
    """Do the work on `batch` items at a time; out of memory halves the batch, down to one. Returns the last size.

    A training must not be lost because its evaluation takes larger batches than the training did.
    """
    start = 0

    def go_on() -> None:
        nonlocal start
        while start < len(order):
            work(order[start : start + batch])
            start += batch

    while True:
        try:
            in_own_thread(go_on)
            return batch
        except Exception as error:
            tried = len(order[start : start + batch])
            if tried == 1 or not is_out_of_memory(error):
                raise
        batch = tried // 2
        release()  # outside of the handler: until it ends, the error's traceback holds the tensors
