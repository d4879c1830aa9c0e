"""Knowledge about a base: each is found out once, and who waits for another's is not lost with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest

from loractl.worker.base.kept.knowledge import KEPT, Knowledge, Known


class Ended(Exception):
    """A training that was told to stop, or failed."""


def ask(
    knowledge: Knowledge, job_id: int, find_out: Callable[[], str], stop: Callable[[], None] = lambda: None
) -> Known[str]:
    return knowledge.once("what?", job_id, find_out, check_stop=stop)


def never() -> str:
    raise AssertionError("it is known already")


def test_what_was_found_out_is_not_found_out_again() -> None:
    knowledge = Knowledge()
    assert ask(knowledge, 1, lambda: "that") == ask(knowledge, 2, never) == Known("that", 1)
    for n in range(KEPT):
        knowledge.once(str(n), 3, lambda: "more", check_stop=lambda: None)
    assert ask(knowledge, 4, lambda: "anew").job_id == 4, "old ones go"


def test_what_one_job_found_only_for_itself_is_found_out_again_by_the_next() -> None:
    knowledge, unsure = Knowledge(), {"keeps": lambda found: found != "in halves"}
    for job_id, found in ((1, "in halves"), (2, "whole")):
        known = knowledge.once("what?", job_id, lambda found=found: found, check_stop=lambda: None, **unsure)
        assert known == Known(found, job_id)
    assert ask(knowledge, 3, never) == Known("whole", 2)


def test_others_wait_and_one_of_them_takes_over_if_the_first_fails() -> None:
    knowledge, seeking, fail = Knowledge(), threading.Event(), threading.Event()

    def fails() -> str:
        seeking.set()
        assert fail.wait(30)
        raise Ended

    def first() -> None:
        with contextlib.suppress(Ended):
            ask(knowledge, 1, fails)

    thread = threading.Thread(target=first)
    thread.start()
    assert seeking.wait(30)
    found = ask(knowledge, 2, lambda: "mine", stop=fail.set)  # it is called once this one waits
    thread.join()
    assert found == Known("mine", 2) and fail.is_set()


def test_a_job_that_waits_for_an_answer_can_be_stopped() -> None:
    knowledge, seeking, go_on = Knowledge(), threading.Event(), threading.Event()

    def slow() -> str:
        seeking.set()
        assert go_on.wait(30)
        return "that"

    def stop() -> None:
        raise Ended

    thread = threading.Thread(target=ask, args=(knowledge, 1, slow))
    thread.start()
    assert seeking.wait(30)
    with pytest.raises(Ended):
        ask(knowledge, 2, never, stop)
    go_on.set()
    thread.join()
    assert ask(knowledge, 3, never) == Known("that", 1)
