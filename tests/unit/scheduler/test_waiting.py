"""Why a job waits: each word, and the sentence with the numbers behind it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from loractl.common.status import Status
from loractl.common.store import NODE_STALE_S
from loractl.common.units import GIB
from loractl.scheduler.waiting import wait_reason

from ..factories import NOON, job, node


def seconds(number: float) -> dt.timedelta:
    return dt.timedelta(seconds=number)


def running_on(name: str, job_id: int) -> Any:
    return job(job_id=job_id, status=Status.RUNNING, node=name)


def test_a_held_job_waits_for_a_person_whatever_is_free() -> None:
    held = job(held=True, message="held: its worker was lost 3 times")
    assert wait_reason(held, [node()], [], NOON) == ("held", "held: its worker was lost 3 times")
    assert wait_reason(job(held=True), [node()], [], NOON) == ("held", "until loractl retry")


def test_a_failed_attempt_waits_for_its_time_and_then_like_any_other() -> None:
    failed = job(attempt=2, not_before=NOON + seconds(40))
    assert wait_reason(failed, [node()], [], NOON) == ("retry", "attempt 3 in 40 s")
    assert wait_reason(failed, [node(seen_at=NOON + seconds(40))], [], NOON + seconds(40))[0] == "order"


@pytest.mark.parametrize(
    "nodes",
    [[], [node(draining=True)], [node(seen_at=NOON - seconds(NODE_STALE_S + 1))]],
    ids=["none", "draining", "silent"],
)
def test_without_a_node_that_is_online_a_job_waits_for_a_worker(nodes: list[Any]) -> None:
    word, sentence = wait_reason(job(), nodes, [], NOON)
    assert (word, sentence) == ("worker", "no worker is online: start loractl worker on a box")


def test_a_node_counts_as_online_for_a_whole_minute() -> None:
    assert wait_reason(job(), [node(seen_at=NOON - seconds(NODE_STALE_S))], [], NOON)[0] == "order"


def test_a_job_larger_than_every_card_says_by_how_much() -> None:
    nodes = [node("a:0", total=24 * GIB), node("b:0", total=48 * GIB), node("off:0", total=80 * GIB, draining=True)]
    waits = wait_reason(job(vram_needed=60 * GIB), nodes, [], NOON)
    assert waits == ("memory", "needs 60.0, the largest card online has 48.0")


def test_an_idle_card_that_somebody_else_uses_says_what_is_free_now() -> None:
    nodes = [node("a:0", free=2 * GIB), node("b:0", free=6 * GIB)]
    assert wait_reason(job(vram_needed=8 * GIB), nodes, [], NOON) == ("memory", "needs 8.0, b:0 has 6.0 free now")


def test_a_job_that_fits_an_idle_card_is_about_to_be_claimed() -> None:
    nodes = [node("a:0"), node("b:0")]
    assert wait_reason(job(), nodes, [running_on("a:0", 3)], NOON) == ("order", "a worker is about to look at it")


def test_a_job_of_unknown_need_fits_any_idle_card_however_full() -> None:
    assert wait_reason(job(vram_needed=None), [node(free=0)], [], NOON)[0] == "order"


def test_busy_cards_are_named_with_the_job_that_runs_there() -> None:
    nodes = [node("small:0", total=4 * GIB, free=4 * GIB), node("a:0"), node("b:0"), node("c:0")]
    running = [running_on(f"{n}:0", number) for number, n in enumerate("abc", start=11)]
    assert wait_reason(job(), nodes, running, NOON) == ("busy", "a:0 runs 11 and 2 more")
    assert wait_reason(job(), nodes[:2], running, NOON) == ("busy", "a:0 runs 11"), "the idle one is too small"
