"""Threads that compute for a thread: whoever lets others compute has none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from loractl.worker.engine.helpers import give_up_helpers
from loractl.worker.engine.relay import Relay


def in_thread(work: Callable[[], list[int]]) -> list[int]:
    """What `work` returns, done in a thread of its own."""
    said: list[list[int]] = []
    thread = threading.Thread(target=lambda: said.append(work()))
    thread.start()
    thread.join()
    return said[0]


def tasks_after_computing() -> int:
    """Threads of this process, as the system counts them, once this one has computed with a helper."""
    torch.ones(1 << 20).add_(1)
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def test_a_training_that_lets_others_compute_has_no_helpers() -> None:
    def work() -> list[int]:
        torch.set_num_threads(2)
        with Relay().leg(torch.device("cpu")) as leg:
            before = tasks_after_computing()
            with leg.aside():
                idle = len(os.listdir("/proc/self/task"))  # noqa: PTH208
            return [before, idle, tasks_after_computing()]

    before, idle, again = in_thread(work)
    assert idle == before - 1 and again == before


def test_a_thread_that_has_not_computed_has_nothing_to_give_up() -> None:
    def work() -> list[int]:
        give_up_helpers()
        return [0]

    assert in_thread(work) == [0]
