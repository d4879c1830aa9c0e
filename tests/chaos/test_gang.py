"""The stand-in's several cards are real enough: a rank that is gone, stands still or answers wrongly shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.worker.protocol.messages import Rank, Start

from ..integration.test_out_of_memory import make_order
from .gang import Gang, follow
from .trainer import first_link, last_link, next_link


@pytest.fixture
def order(tmp_path: Path) -> Start:
    ranks = [Rank(rank=rank, node=f"n:{rank}", gpu="cpu", device="cpu") for rank in range(2)]
    made = make_order(tmp_path, tmp_path / "model", tmp_path / "data.jsonl")
    return made.model_copy(update={"ranks": ranks, "meeting": str(tmp_path / "meeting")})


def lead(order: Start, make: Callable[[bytes, int], bytes], steps: int = 4) -> bytes:
    """The link that a leader has at the end, with a rank that makes its links so."""
    other = threading.Thread(target=_follow, args=(order, make))
    other.start()
    link = first_link("spec", "data")
    try:
        with Gang(order, next_link) as ranks:
            for step in range(1, steps + 1):
                link = ranks.next_link(link, step)
    finally:
        other.join(timeout=10)
    assert not other.is_alive()
    return link


def _follow(order: Start, make: Callable[[bytes, int], bytes]) -> None:
    try:
        follow(order, make)
    except OSError:
        return


def test_two_ranks_make_the_chain_of_one(order: Start) -> None:
    assert lead(order, next_link) == last_link("spec", "data", 4)


def test_a_rank_that_answers_wrongly_shows_in_the_weights(order: Start) -> None:
    assert lead(order, lambda link, step: next_link(link, step + 1)) != last_link("spec", "data", 4)


def test_a_rank_that_is_gone_ends_the_leader(order: Start) -> None:
    def go(link: bytes, step: int) -> bytes:
        raise ConnectionAbortedError

    with pytest.raises(OSError):
        lead(order, go)


def test_no_step_is_done_while_a_rank_stands_still(order: Start) -> None:
    def stand(link: bytes, step: int) -> bytes:
        time.sleep(0.3)
        return next_link(link, step)

    began = time.monotonic()
    lead(order, stand, steps=2)
    assert time.monotonic() - began > 0.6
