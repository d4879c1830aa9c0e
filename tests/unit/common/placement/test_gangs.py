"""Several cards for one job: the placement rule by examples, and against all the ways that there are."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need, Parallel, SharedNeed
from loractl.common.placement.cards import Card, Occupant, Reservation, lasts, room_at
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.placement.gangs import gang_of, may_share
from loractl.common.placement.lines import Lines, Waiting
from loractl.common.placement.rule import (
    GANG_FIRST_AFTER_S,
    IDLE_FOR_GANG_S,
    RESERVE_AFTER_S,
    USE_S,
    Decision,
    Placement,
    place,
)
from loractl.common.units import GIB

from .scenes import AUTO, LABELS, NOW, Scene, a_card, a_job, decide, many, random_card, random_job, running


def shared(cards: int, lora: float | None, qlora: float | None = None, how: Parallel = Parallel.SHARDED) -> SharedNeed:
    sizes = [None if size is None else int(size * GIB) for size in (lora, qlora)]
    return SharedNeed(cards=cards, parallel=how, need=Need(lora=sizes[0], qlora=sizes[1]))


def card(node: str, gib: float = 24, **more: object) -> Card:
    return a_card(node, gib, **{"gangs": True, "model": "RTX 4090", **more})


def job(job_id: int = 1, gib: float = 40, *gangs: SharedNeed, age_s: float = 0, **more: object) -> Waiting:
    return a_job(job_id, gib, age_s=age_s, gangs=gangs or (shared(2, 20), shared(4, 12)), **more)


def where(decisions: Sequence[Decision]) -> dict[int, list[str]]:
    return {d.placed.job.job_id: [s.node for s in d.placed.shares] for d in decisions if d.placed is not None}


def test_one_card_goes_before_several_where_one_could_ever_hold_the_job() -> None:
    pair, large = [card("a:0"), card("a:1")], card("b:0", 80, running=(running(9, 60, 600),))
    assert where(decide([job()], pair)) == {1: ["a:0", "a:1"]}
    assert where(decide([job()], [*pair, large])) == {}, "it waits for the one that holds it"
    assert where(decide([job()], [*pair, replace(large, open=False)])) == {1: ["a:0", "a:1"]}
    assert where(decide([job(alone=False)], [*pair, large])) == {1: ["a:0", "a:1"]}


def test_each_card_gives_its_share_and_the_user_is_charged_for_all() -> None:
    cards = [card("a:0"), card("a:1")]
    (decision,) = decide([job()], cards)
    placed = decision.placed
    assert placed is not None
    assert [share.bytes for share in placed.shares] == [20 * GIB, 20 * GIB]
    assert placed.parallel is Parallel.SHARDED
    small = [a_job(2, 8), a_job(3, 8, user="bob")]
    assert list(where(decide([job(), *small], [*cards, card("a:2")], {"bob": 30.0}))) == [1, 3]


def test_the_fewest_cards_of_one_box_that_hold_it_are_taken() -> None:
    small = [card(f"a:{n}", 16) for n in range(4)]
    assert where(decide([job()], small)) == {1: ["a:0", "a:1", "a:2", "a:3"]}
    assert where(decide([job()], [*small[:3], card("b:0"), card("b:1"), card("b:2")])) == {1: ["b:0", "b:1"]}
    assert where(decide([job()], [card("a:0"), card("b:0")])) == {}, "cards of two boxes are no gang"


def test_cards_of_one_speed_go_first_then_idle_ones_then_those_that_are_filled_best() -> None:
    mixed = [card("a:0", 22, model="old"), card("a:1", 24), card("a:2", 48, max_jobs=4)]
    assert where(decide([job(gib=50)], mixed)) == {1: ["a:1", "a:2"]}
    busy = replace(mixed[2], running=(running(9, 28),))
    assert where(decide([job(gib=50)], [mixed[0], mixed[1], busy, card("a:3", 48)])) == {1: ["a:1", "a:3"]}


def test_auto_takes_the_first_method_that_several_cards_hold() -> None:
    ways = shared(2, 30, 14), shared(4, 12, 6)
    wanted = job(1, 60, *ways, methods=(Method.LORA, Method.QLORA), need=Need(lora=60 * GIB, qlora=26 * GIB))
    (decision,) = decide([wanted], [card(f"a:{n}") for n in range(4)])
    assert decision.placed is not None
    assert (decision.placed.method, len(decision.placed.shares)) == (Method.QLORA, 2)


def test_a_box_that_can_t_serve_several_cards_is_given_no_such_job() -> None:
    plain = [card("a:0", gangs=False), card("a:1", gangs=False)]
    assert where(decide([job(age_s=9000)], plain)) == {}
    assert where(decide([job(alone=False, gib=8)], plain)) == {}
    assert where(decide([a_job(1, 8)], plain)) == {1: ["a:0"]}


def test_a_card_that_failed_the_job_is_none_of_its_gang_while_others_could_hold_it() -> None:
    cards = [card("a:0"), card("a:1"), card("a:2")]
    assert where(decide([job(avoids=frozenset({"a:0"}))], cards)) == {1: ["a:1", "a:2"]}
    assert where(decide([job(avoids=frozenset({"a:0"}))], cards[:2])) == {1: ["a:0", "a:1"]}


def test_cards_are_kept_for_the_gang_and_an_idle_one_not_for_long() -> None:
    """One card has room. It stays idle where the other one will have room within the hour, or so soon as the gang has
    waited, or after a day."""
    small = a_job(2, 8, user="bob")

    def starts(ends_in_s: float | None, age_s: float) -> dict[int, list[str]]:
        return where(
            decide([job(age_s=age_s), small], [card("a:0"), card("a:1", running=(running(9, 24, ends_in_s),))])
        )

    assert starts(600, RESERVE_AFTER_S) == {}
    assert starts(600, RESERVE_AFTER_S - 1) == {2: ["a:0"]}
    assert starts(IDLE_FOR_GANG_S + 1, RESERVE_AFTER_S) == {2: ["a:0"]}
    assert starts(None, RESERVE_AFTER_S) == {2: ["a:0"]}
    assert starts(3 * IDLE_FOR_GANG_S, 3 * IDLE_FOR_GANG_S - 1) == {2: ["a:0"]}
    assert starts(3 * IDLE_FOR_GANG_S, 3 * IDLE_FOR_GANG_S) == {}
    assert starts(None, 3 * IDLE_FOR_GANG_S) == {2: ["a:0"]}
    assert starts(IDLE_FOR_GANG_S + 1, GANG_FIRST_AFTER_S) == {}


@pytest.mark.parametrize("age_s", [3 * IDLE_FOR_GANG_S, GANG_FIRST_AFTER_S])
def test_no_card_idles_for_what_a_gang_waited_and_ran_before_it_came_back(age_s: float) -> None:
    cards, small = [card("a:0"), card("a:1", running=(running(9, 24, IDLE_FOR_GANG_S + 1),))], a_job(2, 8, user="bob")
    back, early = NOW - dt.timedelta(minutes=1), NOW - dt.timedelta(seconds=age_s)
    assert where(decide([job(age_s=age_s, again=back), small], cards)) == {2: ["a:0"]}
    assert where(decide([job(age_s=2 * age_s, again=early), small], cards)) == {}


def test_a_stream_of_small_jobs_passes_a_gang_for_half_an_hour_and_the_length_of_what_runs() -> None:
    """And for a day and a half where its user had all the use lately: as long as a job for one card."""
    length, step = dt.timedelta(minutes=40), dt.timedelta(minutes=5)
    assert wait_in_a_stream(length, step, {}) <= dt.timedelta(seconds=RESERVE_AFTER_S) + length + step
    behind = dt.timedelta(days=math.log2((UNKNOWN_S + USE_S) / UNKNOWN_S))
    assert wait_in_a_stream(length, step, {"ada": 99.0}) <= behind + length + step


@pytest.mark.parametrize("hours", [2, 3, 10])
def test_longer_jobs_pass_a_gang_for_twice_their_length_at_most(hours: int) -> None:
    """An hour's idleness is not enough for them: by turns each card would be the one that is busy for longer."""
    length, step = dt.timedelta(hours=hours), dt.timedelta(minutes=10)
    for begun in (1 / 3, 1.1, hours / 2, hours):
        waits = wait_in_a_stream(length, step, {}, first=dt.timedelta(hours=begun))
        assert waits <= 2 * length + step, begun


def test_jobs_whose_ends_are_not_known_yet_pass_a_gang_no_longer() -> None:
    """Their ends are known after their first steps. With two cards, one has always just begun."""
    length, step = dt.timedelta(minutes=40), dt.timedelta(minutes=5)
    bound = dt.timedelta(seconds=RESERVE_AFTER_S) + length + step
    assert wait_in_a_stream(length, step, {}, known_after=dt.timedelta(minutes=25)) <= bound
    assert wait_in_a_stream(length, step, {}, known_after=length) <= bound


def test_a_card_idles_no_hour_for_an_end_that_stays_unknown() -> None:
    small = a_job(2, 8, user="bob")

    def starts(began_s_ago: float) -> dict[int, list[str]]:
        other = replace(running(9, 24), began=NOW - dt.timedelta(seconds=began_s_ago))
        return where(decide([job(age_s=RESERVE_AFTER_S), small], [card("a:0"), card("a:1", running=(other,))]))

    assert starts(60) == {}
    assert starts(IDLE_FOR_GANG_S + 1) == {2: ["a:0"]}


def test_a_job_that_begins_at_this_moment_counts_as_one_that_ends_soon() -> None:
    """Two cards become free together, and small jobs come before and after the gang."""
    before, after = a_job(2, 8, user="bob", priority=1), a_job(3, 8, user="bob", priority=-1)
    cards = [card("a:0"), card("a:1")]
    assert where(decide([before, job(age_s=RESERVE_AFTER_S), after], cards)) == {2: ["a:0"]}
    assert where(decide([before, job(), after], cards)) == {2: ["a:0"], 3: ["a:1"]}


@pytest.mark.parametrize("cards", [1, 2])
def test_what_a_job_has_beside_the_room_of_those_that_give_way_is_not_taken_by_others(cards: int) -> None:
    leaving = replace(running(9, 24, 0), gives_way_to=1)
    fleet = [card("a:0"), card("a:1", running=(leaving,))]
    first, small = job(1, priority=5), a_job(2, 8, user="bob")
    if cards == 1:
        fleet, first = [card("a:0", 48, max_jobs=4, running=(leaving,))], a_job(1, 44, priority=5)
    assert where(decide([first, small], fleet)) == {}
    assert where(decide([small], fleet)) == {2: ["a:0"]}


def test_a_job_that_others_give_way_to_is_seen_behind_one_of_its_user_that_no_plan_knows() -> None:
    leaving = replace(running(9, 24, 0), gives_way_to=2)
    whole, awaited, small = a_job(1, None, priority=5), a_job(2, 44, priority=5), a_job(3, 8, user="bob")
    assert where(decide([whole, awaited, small], [card("a:0", 48, max_jobs=4, running=(leaving,))])) == {}


def wait_in_a_stream(
    length: dt.timedelta,
    step: dt.timedelta,
    charges: dict[str, float],
    known_after: dt.timedelta = dt.timedelta(),
    first: dt.timedelta = dt.timedelta(minutes=20),
) -> dt.timedelta:
    """How long a gang waits for two cards, with small jobs of `length` for every place that gets free. Their ends are
    known once they have run for `known_after`. One of them runs already, for as long as `first`."""
    cards, now, numbers = {c.node: c for c in (card("a:0"), card("a:1"))}, NOW, itertools.count(2)
    begun = replace(running(1000, 10, first.total_seconds()), began=NOW - known_after)
    cards["a:1"] = replace(cards["a:1"], running=(begun,))
    while now < NOW + dt.timedelta(days=3):
        for node, each in cards.items():
            cards[node] = replace(each, running=tuple(j for j in each.running if j.ends and j.ends > now))
        wanted = [job(1, since=NOW), *(a_job(next(numbers), 8, user=f"u{n}", since=now) for n in range(3))]
        seen = [as_known(each, now - known_after) for each in cards.values()]
        for d in place(Lines(wanted), seen, charges, now):
            if d.placed and d.placed.job.job_id == 1:
                return now - NOW
            for share in d.placed.shares if d.placed else ():
                occupant = Occupant(job_id=next(numbers), user="x", reserved=share.bytes, ends=now + length, began=now)
                cards[share.node] = cards[share.node].with_job(occupant)
        now += step
    raise AssertionError("it never started")


def as_known(each: Card, before: dt.datetime) -> Card:
    """The card without the ends of jobs that began later than that."""
    return replace(
        each, running=tuple(replace(j, ends=j.ends if j.began and j.began <= before else None) for j in each.running)
    )


def gang_scenes() -> st.SearchStrategy[Scene]:
    return st.integers(0, 2**32).map(_scene)


def _scene(seed: int) -> Scene:
    rng = random.Random(seed)
    boxes = [
        replace(random_card(rng, n, None), model=rng.choice("xxy"), gangs=rng.random() < 0.9)
        for n in range(rng.randint(2, 7))
    ]
    ages = sorted(rng.choices((0, 60, 1800, 4000, 90_000), k=rng.randint(1, 6)), reverse=True)
    jobs = [random_job(rng, number, age) for number, age in enumerate(ages, start=1)]
    return Scene(jobs=[_with_gangs(rng, each) for each in jobs], cards=boxes, charges={"a": 5.0})


def _with_gangs(rng: random.Random, each: Waiting) -> Waiting:
    if rng.random() < 0.3:
        return each
    sizes = [rng.randint(1, 60) for _ in range(2)]
    ways = [
        shared(cards, size, size // 2 + 1, rng.choice(list(Parallel)[1:]))
        for cards, size in zip((2, 3), sizes, strict=True)
    ]
    return replace(each, gangs=tuple(ways[: rng.randint(1, 2)]), alone=rng.random() < 0.6)


def all_groups(each: Waiting, way: SharedNeed, cards: Collection[Card]) -> Iterator[tuple[Card, ...]]:
    """Every group of the cards that may share the job."""
    for group in itertools.combinations(sorted(cards, key=lambda c: c.node), way.cards):
        if len({c.host for c in group}) == 1 and all(may_share(c, each) for c in group):
            yield group


def allowed_groups(each: Waiting, way: SharedNeed, cards: Collection[Card]) -> list[tuple[Card, ...]]:
    """Without those that failed the job or compute in another format than its checkpoint, where others could hold
    it."""
    every = list(all_groups(each, way, cards))
    sound = [g for g in every if not any({c.node, c.host} & each.avoids for c in g)]
    alike = [g for g in sound if each.bf16 is None or all(c.bf16 in (None, each.bf16) for c in g)]
    sizes = [way.need.of(method) for method in each.methods]
    for some in (alike, sound):
        able = (
            all(c.capacity > 0 and c.max_jobs and (size or 0) <= c.capacity for c in g) for g in some for size in sizes
        )
        if any(able):
            return some
    return every


def unpromised(groups: Iterable[tuple[Card, ...]], promised: Collection[str]) -> list[tuple[Card, ...]]:
    """Those without a card that is kept until it is empty."""
    return [group for group in groups if not any(c.node in promised for c in group)]


def rooms_of(each: Card, kept: Reservation | None) -> int:
    held = None if kept is None else kept.on(each.node)
    if not each.slots:
        return 0
    return each.free if held is None else max(0, min(each.free, held.spare)) if held.spare_slots > 0 else 0


def best_by_all(
    each: Waiting, way: SharedNeed, cards: Collection[Card], promised: Collection[str], kept: Reservation | None = None
) -> list[str] | None:
    """The cards of the best of all groups that hold the job now. Nothing starts on `promised` cards."""
    for method in each.methods:
        size = way.need.of(method)
        options = []
        for group in unpromised(allowed_groups(each, way, cards), promised):
            if all(size is not None and size <= rooms_of(c, kept) and rooms_of(c, kept) > 0 for c in group):
                busy, mixed = sum(bool(c.running) for c in group), len({c.model for c in group}) > 1
                options.append((mixed, busy, sum(c.free for c in group), [c.node for c in group]))
        if options:
            return min(options)[-1]
    return None


def seconds(at: dt.datetime) -> float:
    return (at - NOW).total_seconds()


def soonest_by_all(
    each: Waiting, way: SharedNeed, cards: Collection[Card], promised: Collection[str]
) -> tuple[bool, dt.datetime, bool]:
    """When the first of all groups has room, and whether its cards are of several speeds."""
    options = []
    for group in unpromised(allowed_groups(each, way, cards), promised):
        for method in each.methods:
            rooms = [room_at(c, way.need.of(method) or 1, NOW) for c in group]
            if all(room is not None for room in rooms):
                moments = [room.at for room in rooms if room is not None]
                last = max((at for at in moments if at is not None), default=NOW)
                if any(c.left_s is not None and (None in moments or not lasts(c, each, seconds(last))) for c in group):
                    continue  # a worker stops before the last of them has room
                options.append((None in moments, NOW if None in moments else last, len({c.model for c in group}) > 1))
    return min(options)


def after(cards: dict[str, Card], kept: Reservation | None, placed: Placement) -> Reservation | None:
    """Put the job on its cards; what is kept then."""
    for share in placed.shares:
        occupant = Occupant(job_id=placed.job.job_id, user=placed.job.user, reserved=share.bytes, began=NOW)
        cards[share.node] = cards[share.node].with_job(occupant)
        kept = None if kept is None else kept.without(share.node, share.bytes)
    return kept


@many
@given(gang_scenes())
@example(_scene(219195567))  # a card that two of them need is kept for another job until it is empty
@example(_scene(22618385))  # two cards would be ready at an unknown time, and one of them stops
def test_the_rule_finds_what_trying_all_groups_finds(scene: Scene) -> None:
    cards, kept, begun = {c.node: c for c in scene.cards}, None, set()
    promised: set[str] = set()
    for d in scene.decide():
        each = d.placed.job if d.placed is not None else d.reserved.job if d.reserved is not None else None
        assert each is not None
        way = gang_of(each, cards.values())
        if d.placed is not None:
            begun.add(each.job_id)
            nodes = [share.node for share in d.placed.shares]
            assert (len(nodes) == 1) == (way is None), "all or nothing"
            if way is not None:
                assert nodes == best_by_all(each, way, cards.values(), promised, kept)
                assert {share.bytes for share in d.placed.shares} == {way.need.of(d.placed.method)}
            kept = after(cards, kept, d.placed)
        elif d.declined is not None and d.reserved is not None:
            promised.add(d.reserved.node)
        elif d.reserved is not None:
            kept = d.reserved
            assert not promised & {one.node for one in kept.cards}, "a card is kept for one job"
            if way is not None:
                assert best_by_all(each, way, cards.values(), promised) is None
                _check_kept(each, way, cards, promised, kept)
    for c in cards.values():
        if c.running != {x.node: x for x in scene.cards}[c.node].running:
            assert c.outside + c.margin + c.taken <= c.total, "no ledger is over its card"
            assert len(c.running) <= c.max_jobs
    for each in scene.jobs:
        way = gang_of(each, cards.values())
        if each.job_id not in begun and way is not None:
            assert best_by_all(each, way, cards.values(), promised, kept) is None, "no group idles while it waits"


def _check_kept(
    each: Waiting, way: SharedNeed, cards: dict[str, Card], promised: Collection[str], kept: Reservation
) -> None:
    none, at, mixed = soonest_by_all(each, way, cards.values(), promised)
    group = [cards[k.node] for k in kept.cards]
    assert len({c.host for c in group}) == 1
    waited_s = (NOW - each.since).total_seconds()
    waits = not none and (at - NOW).total_seconds() <= max(IDLE_FOR_GANG_S, waited_s)
    idle = waits or waited_s >= GANG_FIRST_AFTER_S
    if idle:
        assert len(group) == way.cards
        assert (len({c.model for c in group}) > 1) == mixed
    sizes = [size for method in each.methods if (size := way.need.of(method)) is not None]
    rooms = {k: [r for size in sizes if (r := room_at(cards[k.node], size, NOW)) is not None] for k in kept.cards}
    begun = any(one.began is not None for found in rooms.values() for r in found for one in r.after)
    idle = idle or (begun and len(group) == way.cards)  # whose end is not known: it counts as one that is near
    for k, found in rooms.items():
        assert any((r.spare, r.spare_slots) == (k.spare, k.spare_slots) for r in found)
        assert idle or any(r.after for r in found), "a card with room is lent"


def test_cards_that_take_nothing_now_are_kept_for_the_first_gang_that_they_could_hold() -> None:
    cards = [card(f"a:{n}", running=(running(9 + n, 20),), max_jobs=2, stuck=True) for n in range(2)]
    jobs = [
        job(1, 40, shared(2, 20, 10), age_s=7200, methods=AUTO, alone=False),
        job(2, 40, shared(2, 20), age_s=7200, methods=AUTO, alone=False, priority=-1),
    ]
    (kept,) = (one.reserved for one in decide(jobs, [*cards, card("b:0", 2)]))
    assert kept is not None and kept.job.job_id == 1 and {one.node for one in kept.cards} == {"a:0", "a:1"}


def test_no_card_idles_for_a_gang_until_another_job_s_card_is_empty() -> None:
    """That may be hours from now: the job would be slower for longer next to what runs there."""
    cards = [
        card(f"a:{n}", 80, running=(running(9 + n, 20, ends),), max_jobs=4) for n, ends in enumerate((20_000, None))
    ]
    alone = job(1, 10, left_s=90_000.0, priority=1)
    gang = job(2, 90, shared(2, 55), age_s=7200, alone=False, left_s=90_000.0)
    short = job(3, 10, left_s=60.0, priority=-9)
    decisions = decide([alone, gang, short], cards)
    kept = [[one.node for one in d.reserved.cards] for d in decisions if d.reserved is not None]
    assert kept == [["a:0"]], "for the job that will have it alone"
    assert where(decisions) == {3: ["a:1"]}


def test_a_gang_starts_by_lora_on_shared_cards_though_its_part_by_qlora_is_not_known() -> None:
    cards = [card(f"a:{n}", running=(running(9 + n, 10),), max_jobs=2) for n in range(2)]
    assert where(decide([job(1, 20, shared(2, 12), methods=AUTO, alone=False)], cards)) == {1: ["a:0", "a:1"]}


def test_a_gang_keeps_to_the_labels_that_its_job_asks_for() -> None:
    cards = [card("a:0"), card("a:1"), card("b:0", labels=LABELS), card("b:1", labels=LABELS)]
    assert where(decide([job(requires=LABELS)], cards)) == {1: ["b:0", "b:1"]}
