"""The placement rule: against a plain reference, and what must hold of it on any fleet."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from loractl.common.job.method import Method
from loractl.common.job.need import Need, choose_method, least_need, permitted_methods, within
from loractl.common.placement.cards import (
    SHARED_FROM_BYTES,
    Card,
    Occupant,
    could_start,
    default_max_jobs,
    largest_gpu,
    room_at,
    suits,
)
from loractl.common.placement.keys import queue_key
from loractl.common.placement.lines import ListedLine, Waiting, levels_of
from loractl.common.placement.rule import OLDEST_FIRST_AFTER_S, RESERVE_AFTER_S, Decision, place
from loractl.common.placement.shares import HALF_LIFE_S, START_CHARGE_S, charge, decayed
from loractl.common.placement.sizes import VRAM_CLASSES, served_classes, size_step, vram_class
from loractl.common.queue.hints import queue_name
from loractl.common.units import GIB

NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
AUTO = (Method.LORA, Method.QLORA)
LABELS = frozenset({("nvlink", "yes")})
sizes = st.integers(1, 400 * GIB)


# --- examples ---


def a_card(node: str = "a:0", gib: float = 24, **more: object) -> Card:
    return replace(Card(node=node, total=int(gib * GIB)), **more)  # type: ignore[arg-type]


def a_job(job_id: int, gib: float | None = 8, *, age_s: float = 0, **more: object) -> Waiting:
    size = None if gib is None else int(gib * GIB)
    base = Waiting(
        job_id=job_id,
        user="ada",
        priority=0,
        since=NOW - dt.timedelta(seconds=age_s),
        methods=(Method.LORA,),
        need=Need(lora=size, qlora=None),
    )
    return replace(base, **more)  # type: ignore[arg-type]


def running(job_id: int, gib: float, ends_in_s: float | None = None, user: str = "bob") -> Occupant:
    ends = None if ends_in_s is None else NOW + dt.timedelta(seconds=ends_in_s)
    return Occupant(job_id=job_id, user=user, reserved=int(gib * GIB), ends=ends)


def decide(
    jobs: Sequence[Waiting], cards: Sequence[Card], charges: dict[str, float] | None = None
) -> tuple[Decision, ...]:
    by_age = ListedLine(sorted(jobs, key=lambda job: job.job_id))
    return tuple(place(levels_of(jobs), cards, charges or {}, NOW, by_age))


def started(decisions: Sequence[Decision]) -> dict[int, str]:
    return {d.placed.job.job_id: d.placed.node for d in decisions if d.placed is not None}


def order(decisions: Sequence[Decision]) -> list[int]:
    return [d.placed.job.job_id for d in decisions if d.placed is not None]


def test_auto_takes_lora_where_some_card_has_room_for_it_and_else_qlora() -> None:
    job = a_job(1, methods=AUTO, need=Need(lora=20 * GIB, qlora=8 * GIB))
    small, large = a_card("a:0", 12), a_card("a:1", 24)
    (first,) = decide([job], [small, large])
    assert first.placed is not None
    assert (first.placed.node, first.placed.method, first.placed.reserved) == ("a:1", Method.LORA, 20 * GIB)
    (second,) = decide([job], [small, replace(large, running=(running(9, 20),))])
    assert second.placed is not None
    assert (second.placed.node, second.placed.method, second.placed.reserved) == ("a:0", Method.QLORA, 8 * GIB)


def test_a_job_may_prefer_qlora() -> None:
    job = a_job(1, methods=(Method.QLORA, Method.LORA), need=Need(lora=20 * GIB, qlora=8 * GIB))
    (decision,) = decide([job], [a_card(gib=80)])
    assert decision.placed is not None
    assert decision.placed.method is Method.QLORA


def test_priority_goes_before_share_and_share_before_age() -> None:
    jobs = [
        a_job(1, user="ada"),
        a_job(2, user="bob"),
        a_job(3, user="cyd", priority=1),
    ]
    cards = [a_card(f"a:{n}", 8) for n in range(3)]
    assert order(decide(jobs, cards, {"ada": 5.0, "bob": 1.0, "cyd": 9.0})) == [3, 2, 1]
    assert order(decide(jobs, cards)) == [3, 1, 2]


def test_a_second_job_of_one_user_comes_after_the_first_one_of_another() -> None:
    jobs = [a_job(1, user="ada"), a_job(2, user="ada"), a_job(3, user="bob")]
    assert order(decide(jobs, [a_card(f"a:{n}", 8) for n in range(2)])) == [1, 3]


def test_small_jobs_go_to_small_idle_cards_and_to_a_shared_one_last() -> None:
    shared = a_card("a:0", 80, max_jobs=4, running=(running(9, 60),))
    cards = [shared, a_card("a:1", 48, max_jobs=4), a_card("a:2", 12)]
    assert started(decide([a_job(n) for n in (1, 2, 3)], cards)) == {1: "a:2", 2: "a:1", 3: "a:0"}


def test_a_card_is_kept_for_the_first_that_waited_half_an_hour_where_it_can_start_first() -> None:
    soon = a_card("a:0", 80, max_jobs=4, running=(running(8, 60, 600),))
    late = a_card("a:1", 80, max_jobs=4, running=(running(9, 60, 6000),))
    large, small = a_job(1, 70, age_s=RESERVE_AFTER_S), a_job(2, 15, user="bob")
    kept, placed = decide([large, small], [soon, late])
    assert kept.reserved is not None
    assert (kept.reserved.job.job_id, kept.reserved.node, kept.reserved.spare) == (1, "a:0", 10 * GIB)
    assert placed.placed is not None
    assert placed.placed.node == "a:1"
    young = replace(large, since=NOW - dt.timedelta(seconds=RESERVE_AFTER_S - 1))
    assert [d.reserved for d in decide([young, small], [soon, late])] == [None]


def test_what_the_kept_job_leaves_over_may_be_used() -> None:
    card = a_card("a:0", 80, max_jobs=4, running=(running(8, 60, 600),))
    jobs = [a_job(1, 70, age_s=RESERVE_AFTER_S), a_job(2, 11, user="bob"), a_job(3, 10, user="cyd"), a_job(4, 1)]
    assert started(decide(jobs, [card])) == {3: "a:0"}


def test_the_oldest_that_could_run_goes_first_after_a_day_whatever_its_priority_and_share() -> None:
    """One that no card could ever hold does not stand in its way."""
    day = OLDEST_FIRST_AFTER_S
    jobs = [a_job(1, 200, age_s=day + 2), a_job(2, age_s=day, user="bob"), a_job(3, user="cyd", priority=5)]
    assert started(decide(jobs, [a_card(gib=8)], {"bob": 99.0})) == {2: "a:0"}
    jobs[1] = a_job(2, age_s=day - 1, user="bob")
    assert started(decide(jobs, [a_card(gib=8)], {"bob": 99.0})) == {3: "a:0"}


def test_the_oldest_of_a_user_at_the_limit_is_passed_over() -> None:
    day = OLDEST_FIRST_AFTER_S
    card = a_card(gib=80, max_jobs=2, user_limit=1, running=(running(9, 8, user="ada"),))
    jobs = [a_job(1, age_s=day + 1), a_job(2, age_s=day, user="bob"), a_job(3, user="cyd", priority=5)]
    assert started(decide(jobs, [card])) == {2: "a:0"}


def test_a_job_that_could_never_run_keeps_its_user_from_no_reservation() -> None:
    card = a_card("a:0", 80, max_jobs=4, running=(running(8, 60, 600),))
    jobs = [a_job(1, 200, age_s=9000), a_job(2, 80, age_s=RESERVE_AFTER_S), a_job(3, 15, user="bob")]
    decisions = decide(jobs, [card], {"bob": 9.0})
    assert [d.reserved.job.job_id for d in decisions if d.reserved is not None] == [2]
    assert started(decisions) == {}


def test_a_job_of_unknown_need_gets_a_whole_empty_card() -> None:
    shared = a_card("a:0", 80, max_jobs=4, running=(running(9, 1),))
    assert started(decide([a_job(1, None)], [shared])) == {}
    (decision,) = decide([a_job(1, None)], [shared, a_card("a:1", 24, margin=GIB, outside=2 * GIB)])
    assert decision.placed is not None
    assert (decision.placed.node, decision.placed.reserved) == ("a:1", 21 * GIB)


def test_a_processor_takes_what_no_gpu_could_ever_hold_or_all_where_there_is_none() -> None:
    processor = a_card("a:cpu", 64, processor=True)
    busy = a_card("a:0", 24, running=(running(9, 24),))
    assert started(decide([a_job(1, 24)], [processor, busy])) == {}
    assert started(decide([a_job(1, 25)], [processor, busy])) == {1: "a:cpu"}
    assert started(decide([a_job(1, 24)], [processor])) == {1: "a:cpu"}
    assert started(decide([a_job(1, None)], [processor, busy])) == {}
    assert started(decide([a_job(1, None)], [processor])) == {1: "a:cpu"}


def test_labels_of_a_job_must_all_be_the_nodes() -> None:
    job = a_job(1, requires=LABELS)
    assert started(decide([job], [a_card("a:0"), a_card("a:1", 80, labels=LABELS | {("room", "2")})])) == {1: "a:1"}
    assert started(decide([job], [a_card("a:0")])) == {}


def test_a_user_runs_no_more_than_the_limit() -> None:
    cards = [a_card("a:0", 8, user_limit=2, running=(running(9, 8, user="ada"),)), a_card("a:1"), a_card("a:2")]
    assert started(decide([a_job(1), a_job(2), a_job(3, user="bob")], cards)) == {1: "a:1", 3: "a:2"}


def test_a_closed_card_takes_nothing() -> None:
    assert decide([a_job(1)], [a_card(open=False)]) == ()


# --- what holds on any fleet ---


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A fleet, what waits for it, and what its users have had. Drawn by a seed: one draw instead of a hundred."""

    jobs: list[Waiting]
    cards: list[Card]
    charges: dict[str, float]

    def decide(self) -> tuple[Decision, ...]:
        return decide(self.jobs, self.cards, self.charges)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    rng = random.Random(draw(st.integers(0, 2**32)))
    limit = rng.choice((None, None, None, 3, 1))
    ages = sorted(rng.choices((0, 60, 1800, 4000, 90_000), k=draw(st.integers(1, 10))), reverse=True)
    return Scene(
        jobs=[random_job(rng, number, age) for number, age in enumerate(ages, start=1)],
        cards=[random_card(rng, number, limit) for number in range(draw(st.integers(1, 4)))],
        charges={user: rng.choice((0.0, 5.0, 80.0)) for user in rng.sample("abc", 2)},
    )


def random_card(rng: random.Random, number: int, limit: int | None) -> Card:
    """One that is mostly open and partly taken."""
    return Card(
        node=f"n:{number}",
        total=rng.choice((80, 80, 48, 24, 8)) * GIB,
        outside=rng.choice((0, 0, 0, 5, 30)) * GIB,
        margin=rng.choice((0, 1)) * GIB,
        running=tuple(
            Occupant(
                job_id=100 + 10 * number + n,
                user=rng.choice("abcd"),
                reserved=rng.randint(1, 30) * GIB,
                used=rng.choice((0, 0, 0, 20)) * GIB,
                ends=rng.choice((None, NOW + dt.timedelta(seconds=rng.randint(-100, 9000)))),
            )
            for n in range(rng.randint(0, 3))
        ),
        max_jobs=rng.choice((4, 4, 3, 2, 1, 0)),
        labels=rng.choice((frozenset(), LABELS)),
        open=rng.random() < 0.9,
        processor=rng.random() < 0.15,
        user_limit=limit,
    )


def random_job(rng: random.Random, number: int, age_s: float) -> Waiting:
    need = rng.choice((None, 90, 79, 70, 60, 50, 40, 25, 20, 12, 6, 3, 1))
    smaller = rng.choice((None, need and need // 2 + 1))
    return Waiting(
        job_id=number,
        user=rng.choice("abc"),
        priority=rng.choice((0, 0, 1, -1)),
        since=NOW - dt.timedelta(seconds=age_s),
        methods=rng.choice((AUTO[:1], AUTO, AUTO[::-1])),
        need=Need(lora=need and need * GIB, qlora=smaller and smaller * GIB),
        requires=rng.choice((frozenset(), frozenset(), LABELS)),
    )


many = settings(max_examples=1000)


def after(cards: Sequence[Card], decisions: Sequence[Decision]) -> dict[str, Card]:
    """The cards with what has started."""
    left = {card.node: card for card in cards}
    for d in decisions:
        if d.placed is not None:
            job = d.placed.job
            occupant = Occupant(job_id=job.job_id, user=job.user, reserved=d.placed.reserved)
            left[d.placed.node] = left[d.placed.node].with_job(occupant)
    return left


@given(scenes())
def test_no_card_is_ever_promised_twice(scene: Scene) -> None:
    decisions = scene.decide()
    before = {card.node: card for card in scene.cards}
    assert len(order(decisions)) == len(set(order(decisions)))
    for node, card in after(scene.cards, decisions).items():
        if card.running != before[node].running:
            assert card.open
            assert card.outside + card.margin + card.taken <= card.total
            assert len(card.running) <= card.max_jobs


@given(scenes())
def test_each_job_runs_as_it_may(scene: Scene) -> None:
    by_node, largest = {card.node: card for card in scene.cards}, largest_gpu(scene.cards)
    for d in scene.decide():
        if d.placed is None:
            continue
        job, card, size = d.placed.job, by_node[d.placed.node], d.placed.job.need.of(d.placed.method)
        assert d.placed.method in job.methods
        assert d.placed.reserved == size or size is None
        assert job.requires <= card.labels
        assert not card.processor or largest == 0 or (job.least is not None and job.least > largest)
        assert job.least is not None or not card.running


@given(scenes())
def test_no_user_passes_the_limit(scene: Scene) -> None:
    limits = [card.user_limit for card in scene.cards if card.open and card.user_limit is not None]
    assume(limits)
    decisions = scene.decide()
    users = [job.user for card in after(scene.cards, decisions).values() for job in card.running]
    newly = {d.placed.job.user for d in decisions if d.placed is not None}
    assert all(users.count(user) <= min(limits) for user in newly)


@many
@given(scenes())
def test_no_card_idles_while_a_job_that_it_should_take_waits(scene: Scene) -> None:
    decisions = scene.decide()
    left = after(scene.cards, decisions)
    kept = {d.reserved.node for d in decisions if d.reserved is not None}
    limit = min((c.user_limit for c in scene.cards if c.open and c.user_limit is not None), default=99)
    users = [job.user for card in left.values() for job in card.running]
    for job in scene.jobs:
        if job.job_id in started(decisions) or users.count(job.user) >= limit:
            continue
        for card in left.values():
            assert card.node in kept or not card.open or not could_start(job, card, scene.cards), (job, card)


@many
@given(scenes())
def test_what_starts_on_a_kept_card_does_not_delay_the_job_for_which_it_is_kept(scene: Scene) -> None:
    decisions = scene.decide()
    numbers = [n for n, d in enumerate(decisions) if d.reserved is not None]
    assert len(numbers) <= 1
    for number in numbers:
        kept = decisions[number].reserved
        assert kept is not None
        assert (NOW - kept.job.since).total_seconds() >= RESERVE_AFTER_S
        before, then = (after(scene.cards, part)[kept.node] for part in (decisions[:number], decisions))
        assert could_wait(kept.job, before), "it is kept where the job can start"
        for size in sizes_on(kept.job, before):
            then_room, room = room_at(then, size, NOW), room_at(before, size, NOW)
            if room is None or room.spare != kept.spare:
                continue  # not the method for which it is kept
            assert then_room is not None
            assert then_room.at == room.at


@many
@given(scenes())
def test_a_kept_card_is_the_one_with_the_earliest_room(scene: Scene) -> None:
    decisions = scene.decide()
    for number, d in enumerate(decisions):
        if d.reserved is None:
            continue
        left, job = after(scene.cards, decisions[:number]), d.reserved.job
        far = NOW + dt.timedelta(days=999)
        at = {
            node: [room.at or far for size in sizes_on(job, card) if (room := room_at(card, size, NOW)) is not None]
            for node, card in left.items()
            if card.open and suits(card, job, largest_gpu(scene.cards))
        }
        assert min(at[d.reserved.node]) == min(moment for moments in at.values() for moment in moments)


def sizes_on(job: Waiting, card: Card) -> list[int]:
    """Bytes with which the job could run there, by method."""
    needs = [job.need.of(method) for method in job.methods]
    return [max(1, card.capacity) if need is None or job.least is None else need for need in needs]


def could_wait(job: Waiting, card: Card) -> bool:
    return any(room_at(card, size, NOW) is not None for size in sizes_on(job, card))


# --- a plain reference ---


@dataclass
class Reference:
    """The rule once more without laziness: every job is tried in its order."""

    cards: dict[str, Card]
    charges: dict[str, float]
    placed: list[tuple[int, str, Method, int]]
    kept: tuple[int, str, int, int] | None = None

    def run(self, jobs: Sequence[Waiting]) -> None:
        tried: set[int] = set()
        ages = [job for job in sorted(jobs, key=lambda job: job.job_id) if self.age(job) >= OLDEST_FIRST_AFTER_S]
        for job in ages:
            if not self.at_limit(job.user) and self.rooms(job):
                self.attempt(job)
                tried.add(job.job_id)
                break
        for priority in sorted({job.priority for job in jobs}, reverse=True):
            while heads := self.heads([j for j in jobs if j.priority == priority and j.job_id not in tried]):
                job = min(heads, key=lambda j: (self.charges.get(j.user, 0.0), j.job_id))
                self.attempt(job)
                tried.add(job.job_id)

    def heads(self, jobs: Sequence[Waiting]) -> list[Waiting]:
        users = {job.user for job in jobs if not self.at_limit(job.user)}
        return [min((j for j in jobs if j.user == user), key=lambda j: j.job_id) for user in users]

    def age(self, job: Waiting) -> float:
        return (NOW - job.since).total_seconds()

    def at_limit(self, user: str) -> bool:
        limits = [c.user_limit for c in self.cards.values() if c.open and c.user_limit is not None]
        count = sum(j.user == user for c in self.cards.values() for j in c.running)
        return bool(limits) and count >= min(limits)

    def allowed(self, job: Waiting) -> list[Card]:
        open_ = [c for c in self.cards.values() if c.open]
        largest = max((c.total - c.margin for c in open_ if not c.processor), default=0)
        least = None if None in self.needs(job) else min(n for n in self.needs(job) if n is not None)
        beyond = largest == 0 or (least is not None and least > largest)
        return [c for c in open_ if job.requires <= c.labels and (beyond or not c.processor)]

    def needs(self, job: Waiting) -> list[int | None]:
        return [job.need.of(method) for method in job.methods]

    def attempt(self, job: Waiting) -> None:
        for method in job.methods:
            need, options = job.need.of(method), []
            for card in self.allowed(job):
                free = card.total - card.margin - card.outside - sum(max(j.reserved, j.used) for j in card.running)
                slots = card.max_jobs - len(card.running)
                if self.kept is not None and self.kept[1] == card.node:
                    room, slots = min(free, self.kept[2]), min(slots, self.kept[3])
                    alone = False
                else:
                    room, alone = free, not card.running
                if slots > 0 and room > 0 and (alone or None not in self.needs(job)) and (need or 0) <= room:
                    options.append((bool(card.running), free, card.node))
            if options:
                _, free, node = min(options)
                self.start(job, node, method, free if need is None else need)
                return
        rooms = self.rooms(job)
        if self.kept is None and self.age(job) >= RESERVE_AFTER_S and rooms:
            *_, node, spare, slots = min(rooms)
            self.kept = (job.job_id, node, spare, slots)

    def start(self, job: Waiting, node: str, method: Method, size: int) -> None:
        self.cards[node] = self.cards[node].with_job(Occupant(job_id=job.job_id, user=job.user, reserved=size))
        self.placed.append((job.job_id, node, method, size))
        self.charges[job.user] = self.charges.get(job.user, 0.0) + size / GIB * START_CHARGE_S / 3600
        if self.kept is not None and self.kept[1] == node:
            number, _, spare, slots = self.kept
            self.kept = (number, node, spare - size, slots - 1)

    def rooms(self, job: Waiting) -> list[tuple[float, int, int, int, str, int, int]]:
        found = []
        for card in self.allowed(job):
            for index, need in enumerate(self.needs(job)):
                size = max(1, card.capacity) if need is None or None in self.needs(job) else need
                if (room := first_room(card, size)) is not None:
                    at, spare, slots = room
                    found.append((at, size - card.free, index, card.capacity, card.node, spare, slots))
        return found


def first_room(card: Card, size: int) -> tuple[float, int, int] | None:
    """Seconds until there is room, and what is left beside it: by trying each number of jobs that may end first."""
    leaving = sorted(
        card.running, key=lambda j: (float("inf") if j.ends is None else j.ends.timestamp(), -j.reserved, j.job_id)
    )
    for gone in range(len(leaving) + 1):
        stay = leaving[gone:]
        spare = card.total - card.margin - card.outside - sum(max(j.reserved, j.used) for j in stay) - size
        slots = card.max_jobs - len(stay) - 1
        if spare >= 0 and slots >= 0 and card.capacity >= size:
            ends = [float("inf") if j.ends is None else (j.ends - NOW).total_seconds() for j in leaving[:gone]]
            return max([0.0, *ends]), spare, slots
    return None


@many
@given(scenes())
def test_the_rule_equals_the_plain_reference(scene: Scene) -> None:
    decisions = scene.decide()
    plain = Reference(cards={c.node: c for c in scene.cards}, charges=dict(scene.charges), placed=[])
    plain.run(scene.jobs)
    got = [(d.placed.job.job_id, d.placed.node, d.placed.method, d.placed.reserved) for d in decisions if d.placed]
    assert got == plain.placed
    kept = [(d.reserved.job.job_id, d.reserved.node) for d in decisions if d.reserved is not None]
    if kept:  # with no room left anywhere nothing need be kept
        assert plain.kept is not None
        assert kept == [plain.kept[:2]]


@given(scenes())
def test_a_caller_that_stops_early_has_seen_the_same_decisions(scene: Scene) -> None:
    whole = scene.decide()
    lazily = place(levels_of(scene.jobs), scene.cards, scene.charges, NOW, ListedLine(scene.jobs))
    assert next(lazily, None) == (whole[0] if whole else None)


# --- room ---


@given(scenes(), st.integers(1, 90).map(lambda gib: gib * GIB))
def test_room_is_there_when_those_that_must_end_first_have_and_not_before(scene: Scene, size: int) -> None:
    for card in scene.cards:
        room = room_at(card, size, NOW)
        if room is None:
            assert size > card.capacity or card.max_jobs < 1
            continue
        stay = tuple(job for job in card.running if job not in room.after)
        then = replace(card, running=stay)
        assert then.free - size == room.spare
        assert then.slots - 1 == room.spare_slots
        for last in room.after[-1:]:
            sooner = replace(card, running=(*stay, last))
            assert sooner.capacity - sooner.taken < size or not sooner.slots
        ends = [job.ends for job in room.after]
        assert (room.at is None) == (None in ends)
        assert room.at is None or room.at == max([NOW, *(end for end in ends if end is not None)])


@given(scenes())
def test_could_start_is_what_the_rule_would_do_with_that_job_and_card_alone(scene: Scene) -> None:
    for job in scene.jobs:
        for card in scene.cards:
            alone = [replace(c, user_limit=None, max_jobs=c.max_jobs * (c.node == card.node)) for c in scene.cards]
            assert (card.open and could_start(job, card, scene.cards)) == bool(started(decide([job], alone)))


# --- charges ---


def test_a_running_job_counts_as_an_hour_at_least_and_use_is_half_forgotten_after_a_day() -> None:
    assert charge(3.0, [(2 * GIB, 60.0), (4 * GIB, 7200.0)]) == pytest.approx(3.0 + 2.0 + 8.0)
    assert decayed(8.0, HALF_LIFE_S) == pytest.approx(4.0)
    assert decayed(8.0, -5.0) == pytest.approx(8.0)


# --- methods and needs ---


NEED = Need(lora=20 * GIB, qlora=8 * GIB)


@pytest.mark.parametrize(
    ("wanted", "limit", "chosen"),
    [
        (Method.AUTO, 20 * GIB, Method.LORA),
        (Method.AUTO, 20 * GIB - 1, Method.QLORA),
        (Method.AUTO, 8 * GIB - 1, None),
        (Method.LORA, 20 * GIB - 1, None),
        (Method.QLORA, 100 * GIB, Method.QLORA),
        ([Method.QLORA, Method.LORA], 100 * GIB, Method.QLORA),
    ],
)
def test_the_preferred_method_that_fits_is_chosen(
    wanted: Method | list[Method], limit: int, chosen: Method | None
) -> None:
    assert choose_method(permitted_methods(wanted), NEED, limit) is chosen
    assert (chosen in within(permitted_methods(wanted), NEED, limit)) == (chosen is not None)


def test_an_unknown_need_counts_as_fitting() -> None:
    unknown = Need(lora=None, qlora=None)
    assert choose_method(AUTO, unknown, 1) is Method.LORA
    assert within(AUTO, unknown, 1) == AUTO
    assert within(AUTO, NEED, None) == AUTO
    assert within(AUTO, NEED, 8 * GIB) == (Method.QLORA,)


def test_the_least_need_is_that_of_the_smallest_permitted_method_or_unknown() -> None:
    assert [least_need(m, NEED) for m in (AUTO, AUTO[:1], AUTO[1:])] == [8 * GIB, 20 * GIB, 8 * GIB]
    assert least_need(AUTO, Need(lora=GIB, qlora=None)) is None
    assert least_need(AUTO[:1], Need(lora=GIB, qlora=None)) == GIB


def test_cards_are_shared_from_forty_gib_on() -> None:
    assert [default_max_jobs(size) for size in (SHARED_FROM_BYTES - 1, SHARED_FROM_BYTES)] == [1, 4]


# --- lines and classes ---


@given(st.lists(st.tuples(st.integers(-100, 100), st.none() | sizes), min_size=2, max_size=2))
def test_queue_keys_sort_by_priority_and_then_by_size(pair: list[tuple[int, int | None]]) -> None:
    (p, a), (q, b) = pair
    first, second = queue_key(p, a, {}, "ada"), queue_key(q, b, {}, "ada")
    if p != q:
        assert (first < second) == (p > q)
    elif (a or 0) <= (b or 0):
        assert first <= second
        assert size_step(a) <= size_step(b)
    assert (first == second) == (p == q and size_step(a) == size_step(b))


@given(sizes, st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2), st.text(max_size=5))
def test_equal_needs_share_a_key_and_other_labels_or_users_do_not(size: int, labels: dict[str, str], user: str) -> None:
    key = queue_key(0, size, labels, user)
    assert key == queue_key(0, size, dict(reversed(labels.items())), user)
    assert key != queue_key(0, size, labels, user + "x")
    assert key != queue_key(0, size, {**labels, "more": "y"}, user)


@given(st.integers(GIB, 400 * GIB))
@example(GIB)
@example(2 * GIB)
def test_a_size_step_is_an_eighth_of_an_octave(size: int) -> None:
    assert size_step(2 * size) == size_step(size) + 8
    assert size_step(size - 1) in (size_step(size), size_step(size) - 1)
    assert size_step(None) < size_step(1) < size_step(GIB)


@given(sizes, sizes)
def test_a_job_that_fits_always_waits_in_a_class_that_is_served(need: int, free: int) -> None:
    if need <= free:
        assert vram_class(need) in served_classes(free)


@given(sizes)
def test_a_job_of_unknown_need_wakes_every_node(free: int) -> None:
    assert vram_class(None) in served_classes(free)


@given(st.integers(1, VRAM_CLASSES[-1] * GIB))
def test_a_class_holds_the_need_and_the_next_smaller_one_does_not(need: int) -> None:
    chosen = vram_class(need)
    assert need <= chosen * GIB
    assert all(need > c * GIB for c in VRAM_CLASSES if c < chosen)


def test_a_node_does_not_serve_classes_of_jobs_that_cannot_fit() -> None:
    assert served_classes(24 * GIB) == (8, 12, 16, 24)
    assert served_classes(24 * GIB + 1) == (8, 12, 16, 24, 32)
    assert served_classes(0) == ()


def test_each_class_has_a_queue_of_its_own_and_a_need_beyond_all_the_largest() -> None:
    assert list(VRAM_CLASSES) == sorted(set(VRAM_CLASSES))
    assert len({queue_name(c) for c in VRAM_CLASSES}) == len(VRAM_CLASSES)
    assert queue_name(vram_class(10**15)) == "vram.288"
