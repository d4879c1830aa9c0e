"""Which job comes into which host, and which bases go for it."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import Card, Occupant, WarmBase
from loractl.common.placement.hosts import base_key, beyond, seat, why_alone

from ...factories import NOON, spec
from .scenes import a_job, decide, started

sizes = st.integers(1, 12)


def base(host: str, size: int, key: str = "a", minutes: int = 0, **more: Any) -> WarmBase:
    since = NOON + dt.timedelta(minutes=minutes)
    return WarmBase(host=host, key=key, base_model="org/a", method=Method.LORA, bytes=size, since=since, **more)


def card(*hosts: WarmBase, running: tuple[int, ...] = (), total: int = 24, **more: Any) -> Card:
    jobs = tuple(Occupant(job_id=n, user="ada", reserved=size) for n, size in enumerate(running, 1))
    return Card(**{"node": "box:0", "total": total, "running": jobs, "hosts": hosts, "max_jobs": 4, **more})


def test_a_job_joins_the_newest_host_of_its_base_and_the_others_stay_where_there_is_room() -> None:
    old, new, other = base("old", 3), base("new", 3, minutes=5), base("other", 3, key="b", minutes=1)
    found = seat(card(old, new, other), "a", 6)
    assert found.host == new and found.leaving == ()
    assert seat(card(old, new, other), None, 6).host is None, "a job of its own joins none"


def test_the_oldest_bases_go_until_the_job_has_room() -> None:
    one, two, three = (base(str(n), 6, key=str(n), minutes=n) for n in (1, 2, 3))
    assert seat(card(three, one, two), "x", 10).leaving == (one,)
    assert seat(card(three, one, two), "x", 13).leaving == (one, two)
    assert seat(card(one, two, max_jobs=1), "x", 1).leaving == (one, two), "no more trainers than the card may have"


def test_a_base_with_a_job_or_on_its_way_out_is_nobody_s_seat() -> None:
    busy, going = base("busy", 6, job_id=1), base("going", 6, leaving=True)
    found = seat(card(busy, going, running=(8,)), "a", 4)
    assert found.host is None and found.leaving == ()


def test_bases_go_when_others_take_the_card() -> None:
    one, two = base("one", 6), base("two", 6, minutes=1)
    assert beyond(card(one, two, running=(10,))) == ()
    assert beyond(card(one, two, running=(10,), outside=4)) == (one,)
    assert beyond(card(one, two, running=(10,), outside=20)) == (one, two)


@given(st.lists(sizes, max_size=5), st.lists(st.tuples(sizes, st.sampled_from("abc")), max_size=4), sizes)
def test_what_stays_has_room_beside_every_job(running: list[int], bases: list[tuple[int, str]], size: int) -> None:
    hosts = tuple(base(str(n), bytes_, key, n) for n, (bytes_, key) in enumerate(bases))
    full = card(*hosts, running=tuple(running), max_jobs=9)
    if size > full.free:
        return
    found = seat(full, "a", size)
    staying = [b for b in hosts if b not in found.leaving and b != found.host]
    own = size if found.host is None else max(size, found.host.bytes)
    assert not staying or full.taken + own + sum(b.bytes for b in staying) <= full.capacity
    assert found.host not in found.leaving


def test_bases_that_differ_in_what_is_loaded_have_other_keys() -> None:
    plain = base_key(spec(), Method.LORA)
    others = [
        base_key(spec(), Method.QLORA), base_key(spec(base_model="org/other"), Method.LORA),
        base_key(spec(revision="a" * 40), Method.LORA), base_key(spec(training={"dtype": "float32"}), Method.LORA),
        base_key(spec(training={"attn_implementation": "eager"}), Method.LORA),
        base_key(spec(training={"exact": True}), Method.LORA),
    ]  # fmt: skip
    assert plain is not None and len({plain, *others}) == 7
    assert base_key(spec(lora={"r": 4}, training={"seed": 3}, name="other"), Method.LORA) == plain


@pytest.mark.parametrize(
    "keys",
    [
        {"resources": {"exclusive": True}}, {"lora": {"modules_to_save": ["embed_tokens"]}},
        {"lora": {"init_lora_weights": "loftq"}, "method": "qlora"}, {"training": {"torch_compile": True}},
        {"training": {"report_to": ["wandb"]}}, {"evaluation": {"lm_eval": ["arc_easy"]}},
        {"task_type": "SEQ_CLS"},
    ],
)  # fmt: skip
def test_jobs_that_start_or_change_what_others_would_meet_are_alone(keys: dict[str, Any]) -> None:
    assert why_alone(spec(**keys)) is not None
    assert base_key(spec(**keys), Method.QLORA) is None


def test_among_idle_cards_the_one_with_the_base_goes_first() -> None:
    warm = card(base("warm", 6), node="warm:0", total=80)
    small = card(node="small:0", total=12)
    job = replace(a_job(1), need=Need(lora=8, qlora=None), base_model="org/a")
    assert started(decide([job], [warm, small])) == {1: "warm:0"}
    assert started(decide([replace(job, base_model="org/b")], [warm, small])) == {1: "small:0"}
    shared = card(base("warm", 6), node="warm:0", total=80, running=(5,))
    assert started(decide([job], [shared, small])) == {1: "small:0"}, "it would share the compute"
    both = card(node="other:0", total=70, running=(5,))
    assert started(decide([job], [shared, both])) == {1: "warm:0"}


def test_a_base_that_waits_counts_as_room() -> None:
    full = card(base("warm", 20), total=24)
    assert full.free == 24
    assert started(decide([replace(a_job(1), need=Need(lora=22, qlora=None))], [full])) == {1: "box:0"}
