"""Joins: who trains beside others on their base, and what that takes of a card."""

from __future__ import annotations

import datetime as dt
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import Card, Leaver, Occupant, WarmBase
from loractl.common.placement.hosts import PACK_MEMBERS, Newcomer, RefusedJoin, joined, looked_at, own_part
from loractl.common.placement.lines import JoinedLine, JoinOpening, ListedLine, Openings, Waiting
from loractl.common.placement.pack_rule import MeasuredPass, PackedJob, PassLaw
from loractl.common.placement.preemption import give_way
from loractl.common.placement.rule import Decision, place
from loractl.common.units import GIB

from ...fleets import levels_of
from .scenes import NOW, a_job, many, random_card, random_job, started

SHORT = PackedJob(tokens=64, sweep="s")
TWO_HOSTS = (("a:0", "h1"), ("b:0", "h2"))


def base(mark: str = "h1", gib: float = 5, *, members: Sequence[PackedJob] = (SHORT,), **more: Any) -> WarmBase:
    return WarmBase(
        **{
            "host": mark, "key": "a", "base_model": "org/a", "method": Method.LORA, "bytes": int(gib * GIB),
            "since": NOW, "open": True, "members": tuple(members), **more,
        }
    )  # fmt: skip


def member(job_id: int, gib: float, **more: Any) -> Occupant:
    return Occupant(job_id=job_id, user="bob", reserved=int(gib * GIB), host="h1", **more)


def packed_card(gib: float = 12, *others: Occupant, anchor: float = 7, **more: Any) -> Card:
    """A card with one host, whose first job reserves the base too."""
    first = Occupant(job_id=90, user="bob", reserved=int(anchor * GIB))
    own = {"hosts": (base(job_id=90, members=[SHORT] * (1 + len(others))),), "max_jobs": 1, **more}
    return Card(node="a:0", total=int(gib * GIB), running=(first, *others), **own)


def waits(job_id: int, gib: float = 7, **more: Any) -> Waiting:
    return a_job(job_id, gib, **{"base_model": "org/a", **more})


def newcomers(packed: PackedJob = SHORT) -> Any:
    return lambda _: Newcomer(keys={Method.LORA: "a", Method.QLORA: "b"}, packed=packed)


def decide(jobs: Sequence[Waiting], cards: Sequence[Card], asked: Any = None) -> list[Decision]:
    found = place(levels_of(jobs), cards, {}, NOW, None, newcomers() if asked is None else asked)
    return list(found)


def joins(decisions: Sequence[Decision]) -> dict[int, str]:
    return {d.placed.job.job_id: d.placed.join.base.host for d in decisions if d.placed and d.placed.join}


def test_a_host_s_jobs_hold_one_base_and_it_stays_when_the_first_has_left() -> None:
    card = packed_card(24, member(2, 2), member(3, 1))
    assert card.taken == 10 * GIB and card.trainers == 1
    assert card.without([90]).taken == 8 * GIB, "the base, and the own parts of two"
    assert card.without([90, 2, 3]).taken == 0 and len(card.without([90, 2, 3]).waiting_bases) == 1
    held = replace(card, running=(), hosts=(replace(card.hosts[0], leavers=(Leaver(job_id=5, bytes=2 * GIB),)),))
    assert held.taken == 7 * GIB and not held.waiting_bases, "one has ended and is not out of it"
    measured = replace(card, hosts=(replace(card.hosts[0], used=15 * GIB),))
    assert measured.taken == 15 * GIB, "one process: what is measured is the group's"


def test_a_sweep_s_jobs_join_their_host_on_a_small_card_by_their_own_parts() -> None:
    found = decide([waits(1), waits(2), waits(3)], [packed_card(12)])
    assert joins(found) == {1: "h1", 2: "h1"}, "the third's own part does not fit"
    assert [d.placed.reserved for d in found if d.placed] == [2 * GIB, 2 * GIB]
    assert not joins(decide([waits(1, base_model="org/b")], [packed_card(12)]))
    assert not joins(decide([waits(1)], [packed_card(12)], lambda _: None)), "it trains alone"
    assert not list(place(levels_of([waits(1)]), [packed_card(12)], {}, NOW)), "nobody asks for joins"


def test_jobs_of_others_join_where_the_mean_gains_or_processes_would_share_the_card() -> None:
    stranger = newcomers(PackedJob(tokens=64))
    assert not joins(decide([waits(1)], [packed_card(24)], stranger))
    short = packed_card(24, hosts=(base(job_id=90, members=[PackedJob(tokens=8)]),))
    assert joins(decide([waits(1)], [short], newcomers(PackedJob(tokens=8)))) == {1: "h1"}
    shared = packed_card(24, max_jobs=4)
    assert joins(decide([waits(1)], [replace(shared, contention=1.0)], stranger)) == {1: "h1"}, "they would take turns"
    assert not joins(decide([waits(1)], [replace(shared, contention=0.5)], stranger)), "processes are as fast"
    assert started(decide([waits(1)], [shared], stranger)) == {1: "a:0"}, "in a process of its own"
    (refused,) = looked_at([packed_card(24)], waits(1), Method.LORA, stranger)
    assert isinstance(refused, RefusedJoin) and "less than 1.33" in refused.why


def test_an_idle_card_goes_before_a_join_and_a_join_before_a_shared_card() -> None:
    packed = packed_card(24, max_jobs=4)
    idle, shared = (
        Card(node="b:0", total=80 * GIB),
        Card(node="b:0", total=80 * GIB, max_jobs=4, running=(member(7, 3),)),
    )
    assert not joins(decide([waits(1)], [packed, idle]))
    assert joins(decide([waits(1)], [packed, shared])) == {1: "h1"}


def test_jobs_spread_over_hosts_of_their_base_and_faster_cards_get_more() -> None:
    cards = [replace(packed_card(24), node=node, hosts=(base(mark, job_id=90),)) for node, mark in TWO_HOSTS]
    assert sorted(joins(decide([waits(n) for n in range(1, 5)], cards)).values()) == ["h1", "h1", "h2", "h2"]
    passes = ((32, 1), (64, 1), (128, 2), (256, 4))
    slow, fast = (
        reduce(
            lambda law, one: law.learn(MeasuredPass(tokens=one[0], members=one[1], seconds=speed * (40 + one[0]))),
            passes,
            PassLaw.start(quantised=False),
        )
        for speed in (1e-2, 1e-3)
    )
    mixed = [replace(c, hosts=(replace(c.hosts[0], law=law),)) for c, law in zip(cards, (slow, fast), strict=True)]
    assert set(joins(decide([waits(n) for n in range(1, 5)], mixed)).values()) == {"h2"}


def measured(speed: float, fixed: float = 40) -> PassLaw:
    law = PassLaw.start(quantised=False)
    for tokens, members in ((32, 1), (64, 1), (128, 2), (256, 4)):
        law = law.learn(MeasuredPass(tokens=tokens, members=members, seconds=speed * (fixed + tokens)))
    return law


def test_a_job_waits_for_a_card_that_will_be_idle_where_it_ends_sooner_there() -> None:
    host = base(job_id=90, members=[PackedJob(tokens=64, passes=500, sweep="s")], law=measured(1e-2))
    packed = replace(packed_card(24), hosts=(host,))
    asked = newcomers(PackedJob(tokens=64, passes=500, sweep="s"))  # alone 520 s, beside one 840 s

    def other(seconds: float | None, **more: Any) -> Card:
        ends = None if seconds is None else NOW + dt.timedelta(seconds=seconds)
        return Card(node="b:0", total=24 * GIB, running=(replace(member(7, 7), host=None, ends=ends),), **more)

    jobs = [waits(n) for n in (1, 2, 3)]
    found = decide(jobs, [packed, other(60)], asked)
    declined = [d.declined for d in found if d.declined is not None]
    assert [(one.job_id, one.refused.node, one.refused.why) for one in declined] == [
        (1, "a:0", "it would end sooner on b:0, once that is free")
    ]
    assert joins(found) == {2: "h1", 3: "h1"}, "the second would wait for the first there, too"
    for card in (other(None), other(-5), other(400), other(60, open=False), other(60, model="another")):
        assert joins(decide(jobs[:1], [packed, card], asked)) == {1: "h1"}
    long_waited = [replace(jobs[0], since=NOW - dt.timedelta(seconds=900))]
    assert joins(decide(long_waited, [packed, other(60)], asked)) == {1: "h1"}, "an end that is always near is none"


def declining(asked: PackedJob, *others: Card) -> list[Card]:
    """Cards where a job, rather than join its like on a:0, waits for b:0; and others."""
    soon = replace(member(7, 7), host=None, ends=NOW + dt.timedelta(seconds=60))
    packed = replace(packed_card(24), hosts=(base(job_id=90, members=[asked], law=measured(1e-2)),))
    return [packed, Card(node="b:0", total=24 * GIB, running=(soon,)), *others]


def test_a_job_that_joins_nowhere_starts_by_its_other_method_where_that_has_room() -> None:
    either = waits(1, methods=(Method.LORA, Method.QLORA), need=Need(lora=7 * GIB, qlora=3 * GIB))
    asked = PackedJob(tokens=64, passes=500, sweep="s")
    found = decide([either], declining(asked, Card(node="c:0", total=4 * GIB)), newcomers(asked))
    assert started(found) == {1: "c:0"}
    assert not [d for d in found if d.declined is not None]


def test_no_card_is_kept_for_a_job_that_could_join_since_another_one_waits_in_vain() -> None:
    asked = PackedJob(tokens=64, passes=5000, sweep="s")
    mine, large = waits(1, age_s=2000), waits(2, 20, age_s=2000, base_model="org/b")
    ends = NOW + dt.timedelta(seconds=900)
    free = Card(node="c:0", total=24 * GIB, max_jobs=2, running=(replace(member(8, 20), host=None, ends=ends),))
    found = decide([mine, large], declining(asked, free), newcomers(asked))
    assert [d.declined.job_id for d in found if d.declined is not None] == [1]
    assert [d.reserved.job.job_id for d in found if d.reserved is not None] == [2]


def test_a_full_or_leaving_host_is_not_joined() -> None:
    full = packed_card(80, *(member(n, 1) for n in range(1, PACK_MEMBERS)))
    assert not joins(decide([waits(50)], [full]))
    one_less = replace(full, running=full.running[:-1])
    assert joins(decide([waits(50), waits(51)], [one_less])) == {50: "h1"}
    for change in ({"leaving": True}, {"open": False}):
        card = replace(packed_card(24), hosts=(replace(packed_card(24).hosts[0], **change),))
        assert not joins(decide([waits(1)], [card]))
    assert not joins(decide([waits(1)], [packed_card(24, open=False)]))


def test_a_host_of_whose_members_not_all_are_known_is_not_joined() -> None:
    """One has ended between two looks; or the host was full, and its members were not read."""
    for known, slots in itertools.product((0, 1), (1, 4)):
        card = packed_card(80, member(2, 2), hosts=(base(job_id=90, members=[SHORT] * known),), max_jobs=slots)
        for asked in (SHORT, PackedJob(tokens=64)):
            (refused,) = looked_at([card], waits(1), Method.LORA, newcomers(asked))
            assert isinstance(refused, RefusedJoin) and "not all" in refused.why
        assert started(decide([waits(1)], [card])) == ({1: "a:0"} if slots > 1 else {})


def test_nothing_joins_on_a_card_that_is_kept_for_a_larger_job() -> None:
    large = waits(1, 20, age_s=4000, base_model="org/b")
    found = decide([large, waits(2)], [packed_card(24)])
    assert not joins(found) and [d.reserved.job.job_id for d in found if d.reserved] == [1]
    assert joins(decide([replace(large, since=NOW), waits(2)], [packed_card(24)])) == {2: "h1"}


def test_a_join_sends_off_idle_bases_for_its_own_part_alone() -> None:
    idle = base("idle", 4, members=())
    card = packed_card(12, hosts=(packed_card().hosts[0], idle), max_jobs=2)
    assert joined(card, card.hosts[0], GIB).leaving == ()
    assert joined(card, card.hosts[0], 2 * GIB).leaving == (idle,)


def test_members_give_way_by_what_they_leave() -> None:
    members = (member(2, 2, preemptible=True), member(3, 4, preemptible=True))
    card = packed_card(16, *members, max_jobs=2)
    assert give_way(waits(1, 5, priority=1), [card]) == ("a:0", (2,))
    assert give_way(waits(1, 10, priority=1), [card]) is None, "the first job and the base stay"


@many
@given(st.integers(0, 2**32))
def test_no_decision_brings_a_card_above_its_size_or_starves_whom_it_is_kept_for(seed: int) -> None:
    rng = random.Random(seed)
    cards = [with_hosts(rng, random_card(rng, number, None)) for number in range(rng.randint(1, 3))]
    jobs = [random_job(rng, n, rng.choice((0, 60, 4000))) for n in range(1, rng.randint(2, 12))]
    jobs = [replace(job, base_model=rng.choice(("org/a", "org/a", "org/b"))) for job in jobs]
    tokens = {job.job_id: random_member(rng) for job in jobs}
    now = {card.node: card for card in cards}
    kept: set[str] = set()
    asked = lambda job: Newcomer(keys={m: m.value for m in Method}, packed=tokens[job.job_id])  # noqa: E731
    for decision in place(levels_of(jobs), cards, {}, NOW, ListedLine(jobs), asked):
        if decision.reserved is not None:
            kept.add(decision.reserved.node)
        if (placed := decision.placed) is None:
            continue
        before, join = now[placed.node], placed.join
        host, packed = (None, None) if join is None else (join.base.host, join.packed)
        job = Occupant(job_id=placed.job.job_id, user=placed.job.user, reserved=placed.reserved, host=host)
        card = now[placed.node] = before.with_job(job, packed)
        assert card.taken <= card.capacity and before.open
        if join is None:
            assert card.trainers == before.trainers + 1 <= card.max_jobs
            continue
        assert card.trainers == before.trainers and placed.node not in kept
        (grown,) = (b for b in card.hosts if b.host == host)
        assert len(card.inside(grown)) <= PACK_MEMBERS and grown.base_model == placed.job.base_model
        assert placed.reserved == own_part(placed.job.need.of(placed.method) or 0, join.base.bytes)
        assert_in_time(next(b for b in before.hosts if b.host == host), grown)


def assert_in_time(before: WarmBase, after: WarmBase) -> None:
    """No member is past its own time limit by the join."""
    law = after.law or PassLaw.start(quantised=after.method is Method.QLORA)
    for one in before.members:
        if one.left_seconds is not None and one.limit_seconds is not None:
            slower = law.seconds(sum(m.tokens for m in after.members), len(after.members))
            slower /= law.seconds(sum(m.tokens for m in before.members), len(before.members))
            assert one.left_seconds * slower <= one.limit_seconds + 1e-6


def random_member(rng: random.Random) -> PackedJob:
    seconds = rng.choice((None, 100.0, 5000.0))
    return PackedJob(
        tokens=rng.choice((8, 64, 512)),
        sweep=rng.choice((None, "s", "s")),
        left_seconds=seconds,
        limit_seconds=rng.choice((None, None, 2000.0)),
        promised_seconds=seconds,
    )


def with_hosts(rng: random.Random, card: Card) -> Card:
    """The card with a host around some of its jobs."""
    inside = [replace(job, host="h") for job in card.running[: rng.randint(0, 3)]]
    if not inside:
        return card
    method = rng.choice((Method.LORA, Method.QLORA))
    anchor = rng.choice((None, inside[0].job_id))
    host = base(
        "h", rng.choice((1, 4)), key=method.value, method=method, job_id=anchor,
        members=[random_member(rng) for _ in inside], open=rng.random() < 0.9,
        leavers=rng.choice(((), (), (Leaver(job_id=99, bytes=GIB),))),
    )  # fmt: skip
    return replace(card, running=(*inside, *card.running[len(inside) :]), hosts=(host,))


@given(st.sets(st.integers(1, 12)), st.sets(st.integers(1, 12)), st.booleans())
def test_a_joined_line_gives_every_job_once_by_age(own: set[int], joiners: set[int], rooms: bool) -> None:
    line = JoinedLine(ListedLine(waits(n, base_model="org/b") for n in sorted(own)), [waits(n) for n in joiners])
    opening = JoinOpening(base_model="org/a", bytes=9 * GIB, labels=frozenset())
    openings = Openings(
        gpu=9 * GIB if rooms else 0, processor=(0, 0), unknown=False, labels=frozenset({frozenset()}), joins=(opening,)
    )
    given_ = []
    while (job := line.next(openings)) is not None:
        given_.append(job.job_id)
    assert given_ == sorted(joiners | (own if rooms else set()))
