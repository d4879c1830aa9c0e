"""Queue keys: they sort as a claim reads lines, and differ where the rule looks."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need, Parallel, SharedNeed, Ways
from loractl.common.placement.lines import QueueKey, queue_key
from loractl.common.units import GIB

from .scenes import AUTO, random_job, sizes

labels = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)


def key(priority: int = 0, need: int | None = GIB, **more: Any) -> str:
    asked = {"methods": AUTO, "need": Need(lora=need, qlora=need), "ways": Ways(), "requires": {}, "user": "ada"}
    return queue_key(priority, **{**asked, **more})


@given(st.lists(st.tuples(st.integers(-100, 100), st.none() | sizes), min_size=2, max_size=2))
def test_queue_keys_sort_by_priority_and_then_by_bytes(pair: list[tuple[int, int | None]]) -> None:
    (p, a), (q, b) = pair
    first, second = key(p, a), key(q, b)
    if p != q:
        assert (first < second) == (p > q)
    elif a != b:
        assert (first < second) == ((a or 0) < (b or 0))
    assert (first == second) == ((p, a) == (q, b))


def test_jobs_of_one_line_ask_for_the_same() -> None:
    way = SharedNeed(cards=2, parallel=Parallel.DATA, need=Need(lora=GIB, qlora=None))
    other = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=GIB, qlora=None))
    different = [
        key(), key(methods=AUTO[::-1]), key(methods=AUTO[:1]), key(methods=()), key(user="bob"), key(own=7), key(own=8),
        key(need=None), key(need=GIB + 1), key(1), key(methods=(Method.QLORA,)),
        *(key(ways=Ways(alone=alone, gangs=(one,))) for alone in (True, False) for one in (way, other)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


@given(sizes, labels, st.text(max_size=5), st.booleans())
def test_what_others_read_of_a_key_comes_back(size: int, asked: dict[str, str], user: str, several: bool) -> None:
    ways = Ways(gangs=(SharedNeed(cards=2, parallel=Parallel.DATA, need=Need(lora=size, qlora=size)),) * several)
    text = key(need=size, requires=asked, ways=ways, user=user, own=3)
    parsed = QueueKey.parse(text)
    assert (parsed.bound, parsed.requires, parsed.is_whole) == (size, frozenset(asked.items()), False)
    assert text == key(need=size, requires=dict(reversed(asked.items())), ways=ways, user=user, own=3)
    assert text != key(need=size, requires={**asked, "more": "y"}, ways=ways, user=user, own=3)


@given(st.integers(0, 10**6))
def test_the_key_of_a_job_that_has_not_run_says_all_of_it(seed: int) -> None:
    job = random_job(random.Random(seed), 7, 60)
    fresh = replace(job, only_host=None, avoids=frozenset(), bf16=None, checkpoint_s=None)
    text = queue_key(job.priority, job.methods, job.need, Ways(), dict(job.requires), job.user)
    key = QueueKey.parse(text)
    assert key.is_whole
    assert key.job(7, job.user, job.since, job.left_s) == fresh
