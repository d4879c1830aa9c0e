"""Findings about a base: each is found out once, and who waits for another's is not lost with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from loractl.worker.base.kept.findings import KEPT, Finding, Findings


class Ended(Exception):
    """A training that was told to stop, or failed."""


def ask(
    findings: Findings, job_id: int, find_out: Callable[[], str], stop: Callable[[], None] = lambda: None
) -> Finding[str]:
    return findings.once("what?", job_id, find_out, check_stop=stop, aside=contextlib.nullcontext)


def never() -> str:
    raise AssertionError("it is known already")


def test_what_was_found_out_is_not_found_out_again() -> None:
    findings = Findings()
    assert ask(findings, 1, lambda: "that") == ask(findings, 2, never) == Finding("that", 1)
    for n in range(KEPT):
        findings.once(str(n), 3, lambda: "more", check_stop=lambda: None, aside=contextlib.nullcontext)
    assert ask(findings, 4, lambda: "anew").job_id == 4, "old ones go"


def test_others_wait_aside_and_one_of_them_goes_on_where_it_fails() -> None:
    findings, seeking, fail = Findings(), threading.Event(), threading.Event()
    asides: list[int] = []

    def fails() -> str:
        seeking.set()
        assert fail.wait(30)
        raise Ended

    def first() -> None:
        with contextlib.suppress(Ended):
            ask(findings, 1, fails)

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        asides.append(1)
        if len(asides) == 1:
            fail.set()
        yield

    thread = threading.Thread(target=first)
    thread.start()
    assert seeking.wait(30)
    found = findings.once("what?", 2, lambda: "mine", check_stop=lambda: None, aside=aside)
    thread.join()
    assert found == Finding("mine", 2) and asides


def test_who_waits_can_be_stopped() -> None:
    findings, seeking, go_on = Findings(), threading.Event(), threading.Event()

    def slow() -> str:
        seeking.set()
        assert go_on.wait(30)
        return "that"

    def stop() -> None:
        raise Ended

    thread = threading.Thread(target=ask, args=(findings, 1, slow))
    thread.start()
    assert seeking.wait(30)
    with pytest.raises(Ended):
        ask(findings, 2, never, stop)
    go_on.set()
    thread.join()
    assert ask(findings, 3, never) == Finding("that", 1)
