"""Batches that shrink until memory holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .gauge import in_own_thread, is_out_of_memory, release


def in_batches(
    order: list[int],
    batch: int,
    work: Callable[[list[int]], None],
    run: Callable[[Callable[[], None]], None] = in_own_thread,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Do the work on `batch` items at a time; out of memory halves the batch, down to one. Returns the last size.

    A training must not be lost because its evaluation uses larger batches than the training did. `run` does a batch,
    and `done` is called after it.
    """
    start = 0
    while start < len(order):
        chosen = order[start : start + batch]
        try:
            run(partial(work, chosen))
        except Exception as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            batch = len(chosen) // 2
        else:
            start += len(chosen)
            done(len(chosen))
            continue
        run(release)  # outside the handler: until it ends, the error's traceback holds the tensors
    return batch
