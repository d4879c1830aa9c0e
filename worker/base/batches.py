"""Batches that shrink until memory holds them, and what computes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from .gauge import in_own_thread, is_out_of_memory, release

Answer = TypeVar("Answer")


class Computer(Protocol):
    """Does pieces of work: the engine if trainings share the process, else the caller."""

    def run(self, work: Callable[[], Answer]) -> Answer:
        """What a piece of work returns or raises."""
        ...

    def run_long(self, work: Callable[[], Answer], meanwhile: Callable[[], None]) -> Answer:
        """The same for work that calls `pause`; while it waits for its turn, `meanwhile` is called."""
        ...

    def pause(self) -> None:
        """Within a long piece: let others go first."""


class Here:
    """The caller does the work, with the process to itself."""

    def run(self, work: Callable[[], Any]) -> Any:
        return in_own_thread(work)

    def run_long(self, work: Callable[[], Any], meanwhile: Callable[[], None]) -> Any:
        return in_own_thread(work)

    def pause(self) -> None:
        """Nobody waits."""


HERE = Here()


def in_batches(
    order: list[int],
    batch: int,
    work: Callable[[list[int]], None],
    run: Callable[[Callable[[], None]], None] = HERE.run,
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
