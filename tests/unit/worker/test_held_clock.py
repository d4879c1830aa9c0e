"""The clock of a held lab: no time passes while anybody works, and all of it passes when nobody does."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator

import pytest

from ...held_clock import HeldClock
from ...held_lab import _Pipe

HOUR = 3600.0


@pytest.fixture
def clock() -> Iterator[HeldClock]:
    made = HeldClock()
    yield made
    made.close()


def test_hours_pass_at_once_and_in_their_order(clock: HeldClock) -> None:
    began, woken = clock.now(), list[tuple[str, float]]()
    threads = []
    for name, hours in (("late", 3), ("early", 1)):

        def sleep(name: str = name, hours: int = hours) -> None:
            clock.sleep(hours * HOUR)
            woken.append((name, clock.now() - began))

        threads.append(clock.start(sleep, name))
    clock.sleep(2 * HOUR)
    assert woken == [("early", HOUR)]
    assert all(clock.join(thread) for thread in threads)
    assert woken == [("early", HOUR), ("late", 3 * HOUR)] and clock.now() == began + 3 * HOUR


def test_time_stands_still_while_a_thread_works(clock: HeldClock) -> None:
    """Like one that fetches data: a thread that waits for it with a deadline has time enough."""
    done = threading.Event()

    def work() -> None:
        time.sleep(0.1)
        done.set()

    clock.start(work, "work")
    began = clock.now()
    assert clock.wait(done, 0.001) and clock.now() == began
    assert not clock.wait(threading.Event(), HOUR) and clock.now() == began + HOUR


def test_time_stands_still_until_a_line_in_a_pipe_has_been_passed_on(clock: HeldClock) -> None:
    """Its reader is not known to the clock, and hands on what came after a while."""
    end, other = os.pipe()
    pipe, lines = _Pipe(end), queue.SimpleQueue[str]()
    clock.watch(pipe.quiet)

    def read() -> None:
        while line := pipe.readline():
            time.sleep(0.05)
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()

    def write() -> None:
        for number in range(3):
            clock.sleep(1.0)
            os.write(other, b"%d\n" % number)
        os.close(other)

    clock.start(write, "writer")
    began = clock.now()
    for number in range(3):
        assert clock.get(lines, HOUR) == f"{number}\n"
        assert clock.now() - began == number + 1.0
    with pytest.raises(queue.Empty):
        clock.get(lines, HOUR)
    assert clock.now() - began == 3.0 + HOUR


def test_a_thread_that_waits_for_a_condition_or_a_lock_is_woken_when_it_changes(clock: HeldClock) -> None:
    changed, lock, there = threading.Condition(), threading.Lock(), list[str]()

    def change() -> None:
        with clock.holding(lock):
            clock.sleep(60.0)
        with changed:
            there.append("there")
            changed.notify_all()

    began, thread = clock.now(), clock.start(change, "changes")
    with changed:
        assert not clock.wait_for(changed, lambda: there, 1.0) and clock.now() == began + 1.0
    with clock.holding(lock):
        assert clock.now() == began + 60.0, "its holder was waiting, too"
    with changed:
        assert clock.wait_for(changed, lambda: there)
    assert clock.join(thread) and clock.now() == began + 60.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_clock_that_failed_leaves_no_thread_waiting(clock: HeldClock) -> None:
    def look() -> bool:
        raise OSError("a pipe that is no more")

    clock.watch(look)
    with pytest.raises(RuntimeError, match="has ended") as told:
        clock.sleep(HOUR)
    assert isinstance(told.value.__cause__, OSError)
    with pytest.raises(RuntimeError, match="has ended"):
        clock.sleep(HOUR)


def test_a_pipe_that_closes_while_the_clock_looks_at_it_counts_as_empty(clock: HeldClock) -> None:
    for _ in range(200):
        read, write = os.pipe()
        pipe = _Pipe(read)
        reader = threading.Thread(target=pipe.readline)
        reader.start()
        closing = threading.Thread(target=os.close, args=(write,))
        closing.start()
        while not pipe.quiet() or reader.is_alive():
            pass
        reader.join()
        closing.join()
