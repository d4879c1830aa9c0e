"""Placement through real claims: bytes, patience, share, best fit, reservations, and agreement with the plain rule."""

from __future__ import annotations

import datetime as dt
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from loractl.common.job.method import Method, Need
from loractl.common.job.status import Reason, Status
from loractl.common.placement.cards import Card, Occupant
from loractl.common.placement.lines import Lines, Waiting
from loractl.common.placement.rule import RESERVE_AFTER_S, place
from loractl.common.placement.shares import charge
from loractl.common.store.fleet import NODE_STALE_S
from loractl.common.store.records import Claim, Left, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Base, Job
from loractl.common.units import GIB

from ...factories import EXAMPLES, NOON, RESULT, Clock, node_state, submission, take

NOTHING = Progress()
HOUR = 3600.0


def show(store: Store, node: str = "box:0", total: float = 24, **state: Any) -> None:
    """A card that a node reports; sizes in GiB."""
    for key in ("margin", "outside_bytes"):
        state[key] = int(state.get(key, 0) * GIB)
    store.cards.see(node_state(node, **{"max_jobs": 1, **state, "total": int(total * GIB)}))


def claim(store: Store, node: str = "box:0", **live: Any) -> Claim:
    taken = store.attempts.claim(node, **live)
    assert isinstance(taken, Claim), taken
    return taken


def done(store: Store, mine: Claim) -> None:
    assert store.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT) is Status.SUCCEEDED


def gib_of(size: int | None) -> float:
    assert size is not None
    return size / GIB


# --- bytes ---


@pytest.mark.both
def test_a_card_keeps_free_what_contexts_take_beyond_the_plans(store: Store) -> None:
    """Of each job that may run there: a job that fills the card to the last byte would run out of memory."""
    store.jobs.submit(submission(lora=23, method="lora"))
    found = {"fault": None, "context": 600 * 2**20, "context_after": 756 * 2**20}  # 500 MiB are planned
    show(store, margin=0.5, max_jobs=2, self_test=found)
    (card,), (node,) = store.cards.fleet().cards.values(), store.cards.nodes()
    assert card.margin == GIB and card.free == node.usable == 23 * GIB
    assert isinstance(store.attempts.claim("box:0"), Claim)
    store.jobs.submit(submission(lora=23.2, method="lora"))
    show(store, "box:1", margin=0.5, max_jobs=2, self_test=found)
    assert store.attempts.claim("box:1") is None
    show(store, "box:1", margin=0.5, max_jobs=2, self_test={"fault": None, "context": 140 * 2**20})
    assert isinstance(store.attempts.claim("box:1"), Claim)


def test_a_card_with_a_fault_takes_nothing_until_it_works_again(store: Store) -> None:
    store.jobs.submit(submission())
    assert take(store, fault="it is lost") is None
    assert store.cards.fleet().cards["box:0"].open is False
    assert isinstance(take(store), Claim)


@pytest.mark.both
def test_slots_that_claim_at_once_never_reserve_the_same_bytes(store: Store) -> None:
    for _ in range(12):
        store.jobs.submit(submission(lora=15, method="lora"))
    show(store, total=80, margin=2, max_jobs=8)
    barrier, claims, errors = threading.Barrier(8), [], []

    def slot() -> None:
        barrier.wait()
        try:
            while (taken := store.attempts.claim("box:0")) is not None:
                if isinstance(taken, Claim):
                    claims.append(taken)
        except Exception as error:  # noqa: BLE001  told by the main thread
            errors.append(error)

    threads = [threading.Thread(target=slot) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    running = store.jobs.matching(statuses=[Status.RUNNING])
    assert len({mine.job_id for mine in claims}) == len(claims) == len(running) == 5, "as many as fit, and each once"
    assert sum(job.vram_reserved or 0 for job in running) <= 78 * GIB


def test_what_others_hold_is_respected_and_the_newer_look_goes_before_the_row(store: Store) -> None:
    store.jobs.submit(submission(lora=20, method="lora"))
    show(store)
    assert store.attempts.claim("box:0", outside=5 * GIB) is None, "the row knew of nothing"
    show(store, outside_bytes=5)
    assert store.attempts.claim("box:0", outside=0) is None, "what was there lately counts too"
    show(store, outside_bytes=4)
    assert claim(store, outside=4 * GIB).vram_reserved == 20 * GIB


def test_a_job_that_took_more_than_its_plan_leaves_less_for_the_next(store: Store) -> None:
    for _ in range(2):
        store.jobs.submit(submission(lora=10, method="lora"))
    show(store, total=24, max_jobs=2)
    first = claim(store)
    assert store.attempts.claim("box:0", outside=0, used={str(first.job_id): 15 * GIB}) is None
    assert claim(store, outside=0, used={str(first.job_id): 2 * GIB}).job_id != first.job_id


def test_reserved_bytes_are_free_again_after_the_end(store: Store) -> None:
    for _ in range(2):
        store.jobs.submit(submission(lora=20, method="lora"))
    show(store, max_jobs=2)
    first = claim(store)
    assert store.attempts.claim("box:0") is None
    done(store, first)
    assert store.jobs.get(first.job_id).vram_reserved is None
    claim(store)


# --- closed cards ---


@pytest.mark.both
@pytest.mark.parametrize("target", ["box", "box:0"])
def test_a_drained_card_claims_nothing_until_the_drain_ends(timed: Store, clock: Clock, target: str) -> None:
    timed.jobs.submit(submission())
    show(timed)
    timed.cards.drain(target, "lena", "fan", until=clock.now + dt.timedelta(seconds=30))
    assert timed.attempts.claim("box:0") is None
    assert timed.cards.drains()[target].reason == "fan"
    clock.forward(30)
    assert timed.cards.drains() == {}, "it ends by itself"
    timed.cards.drain(target, "lena", "fan again")
    assert timed.attempts.claim("box:0") is None
    assert timed.cards.end_drain(target) and not timed.cards.end_drain(target)
    claim(timed)


def test_a_drain_of_another_box_or_card_changes_nothing(store: Store) -> None:
    store.jobs.submit(submission())
    show(store)
    for other in ("box:1", "boxes", "bo"):
        store.cards.drain(other, "lena", "fan")
    claim(store)


def test_a_card_that_was_not_seen_for_long_or_is_stopping_claims_nothing(timed: Store, clock: Clock) -> None:
    timed.jobs.submit(submission())
    assert timed.attempts.claim("box:0") is None, "it has no row"
    show(timed)
    clock.forward(NODE_STALE_S + 1)
    assert timed.attempts.claim("box:0") is None
    show(timed, draining=True)
    assert timed.attempts.claim("box:0") is None
    show(timed)
    claim(timed)


# --- methods ---


@pytest.mark.both
def test_patience_waits_for_lora_and_then_lets_qlora_do(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(lora=20, qlora=8, lora_patience="2h"))
    show(timed, total=12)
    assert timed.attempts.claim("box:0") is None
    clock.forward(2 * HOUR - 1)
    show(timed, total=12)
    assert (timed.jobs.end_patience(), timed.attempts.claim("box:0")) == ([], None)
    clock.forward(1)
    assert timed.jobs.end_patience() == [(job_id, 8)]
    assert timed.jobs.end_patience() == []
    assert claim(timed).method is Method.QLORA
    kinds = [(e.kind, e.text) for e in timed.jobs.events(job_id)]
    assert ("patience", "waited long enough for LoRA: QLoRA will do now") in kinds


def test_a_patient_job_takes_lora_as_soon_as_a_card_holds_it(timed: Store) -> None:
    timed.jobs.submit(submission(lora=20, qlora=8, lora_patience="2h"))
    show(timed, total=24)
    assert claim(timed).method is Method.LORA


@pytest.mark.parametrize(
    ("wanted", "total", "taken", "why"),
    [
        ("auto", 24, Method.LORA, " (auto: it fits)"),
        ("auto", 12, Method.QLORA, " (auto: lora does not fit)"),
        (["lora", "qlora"], 12, Method.QLORA, " (of several: lora does not fit)"),
        (["qlora", "lora"], 24, Method.QLORA, " (of several: it fits)"),
        ("qlora", 24, Method.QLORA, ""),
    ],
)
def test_the_history_says_which_of_the_permitted_methods_was_taken_and_why(
    store: Store, wanted: Any, total: int, taken: Method, why: str
) -> None:
    job_id = store.jobs.submit(submission(lora=20, qlora=8, method=wanted))
    show(store, total=total)
    mine = claim(store)
    assert (mine.method, mine.vram_reserved) == (taken, (20 if taken is Method.LORA else 8) * GIB)
    assert store.jobs.events(job_id)[-1].text == f"attempt 1 started on box:0 with {taken.value}{why}"
    assert mine.method_why == why.strip(" ()")


# --- giving way ---


@pytest.mark.both
def test_a_job_that_cannot_start_keeps_no_one_of_lower_priority_from_being_given_way_to(store: Store) -> None:
    low = submission(lora=20, method="lora", preemptible=True)
    store.jobs.submit(low)
    show(store)
    mine = claim(store)
    held = store.jobs.submit(submission(lora=20, method="lora", priority=9))
    store.jobs.hold(held, "ada", "")
    store.jobs.submit(submission(lora=200, method="lora", priority=8))
    store.jobs.submit(submission(lora=20, method="lora", priority=5))
    assert store.cards.preempt() == (mine.job_id,)


def test_nobody_gives_way_on_a_card_that_is_kept_for_another_job(timed: Store, clock: Clock) -> None:
    """Else the job would stop in vain: what it leaves is kept."""
    show(timed, total=80, max_jobs=4)
    timed.jobs.submit(submission(lora=40, method="lora"))
    claim(timed)
    timed.jobs.submit(submission(lora=30, method="lora", preemptible=True))
    giving = claim(timed)
    large = timed.jobs.submit(submission(lora=70, method="lora", priority=5, user="bob"))
    timed.jobs.submit(submission(lora=20, method="lora", priority=5))
    clock.forward(RESERVE_AFTER_S + 1)
    show(timed, total=80, max_jobs=4)
    assert [d.reserved.job.job_id for d in timed.cards.fleet().decisions if d.reserved is not None] == [large]
    assert timed.cards.preempt() == (), giving.job_id


def test_nobody_gives_way_to_a_job_whose_user_is_at_the_limit(store: Store) -> None:
    """Else it would stop in vain, and again as soon as it runs."""
    for node in ("a:0", "b:0"):
        show(store, node, user_limit=1)
    store.jobs.submit(submission())
    claim(store, "a:0")
    store.jobs.submit(submission(user="bob", preemptible=True))
    claim(store, "b:0")
    store.jobs.submit(submission(priority=5))
    assert store.cards.preempt() == ()


# --- people ---


def test_a_user_at_the_limit_waits_and_the_next_one_does_not(store: Store) -> None:
    mine = [store.jobs.submit(submission()) for _ in range(2)]
    theirs = store.jobs.submit(submission(user="bob"))
    show(store, "a:0", user_limit=1)
    show(store, "b:0")
    first = claim(store, "a:0")
    assert first.job_id == mine[0]
    assert claim(store, "b:0").job_id == theirs
    done(store, first)
    assert claim(store, "a:0").job_id == mine[1]


def test_users_take_turns_by_what_they_had_of_the_cards(timed: Store, clock: Clock) -> None:
    for _ in range(4):
        timed.jobs.submit(submission(user="ada"))
    for _ in range(2):
        timed.jobs.submit(submission(user="bob"))
    order = []
    for _ in range(6):
        show(timed)
        mine = claim(timed)
        order.append(mine.user)
        clock.forward(HOUR)
        done(timed, mine)
    assert order == ["ada", "bob", "ada", "bob", "ada", "ada"]


@pytest.mark.both
def test_old_use_is_forgotten(timed: Store, clock: Clock) -> None:
    for user, hours in (("ada", 24), ("bob", 1)):
        timed.jobs.submit(submission(user=user))
        show(timed)
        mine = claim(timed)
        clock.forward(hours * HOUR)
        done(timed, mine)
        if user == "ada":
            clock.forward(10 * 24 * HOUR)  # ten half-lives: 4 GiB x 24 h are 0.1 GiB hours by now
    for user in ("bob", "ada"):
        timed.jobs.submit(submission(user=user))
    with Session(timed.engine) as session, session.begin():
        session.execute(update(Job).values(work_left_s=3600.0))  # else ada's would count as a day
    show(timed)
    assert claim(timed).user == "ada"


@pytest.mark.both
def test_a_lab_may_have_the_order_of_before(timed: Store, clock: Clock) -> None:
    asked = (("ada", 0), ("ada", 0), ("bob", 1))
    old, short, urgent = (timed.jobs.submit(submission(user=user, priority=priority)) for user, priority in asked)
    with Session(timed.engine) as session, session.begin():
        session.execute(update(Job).where(Job.job_id == short).values(work_left_s=60.0))
    show(timed)

    def ready() -> list[int]:
        return [job.job_id for job in timed.jobs.ready(9)]

    assert ready() == [urgent, short, old]
    timed.lab.set("order", "share")
    assert timed.cards.fleet().by_share
    assert ready() == [urgent, old, short]
    assert next(iter(timed.cards.fleet().placed)) == urgent
    clock.forward(25 * HOUR)
    assert ready() == [old, short, urgent], "what has waited a day goes by age"
    show(timed)
    assert claim(timed).job_id == old
    timed.lab.set("order", "work")
    assert ready() == [urgent, short]


# --- several cards ---


def test_a_job_goes_to_the_idle_card_that_it_fills_best(store: Store) -> None:
    store.jobs.submit(submission(lora=6, method="lora"))
    for node, total in (("a:0", 8), ("b:0", 24), ("c:0", 80)):
        show(store, node, total)
    assert store.attempts.claim("c:0") == Left(nodes=frozenset({"a:0"}))
    assert store.attempts.claim("b:0") == Left(nodes=frozenset({"a:0"}))
    assert claim(store, "a:0").vram_reserved == 6 * GIB
    assert store.attempts.claim("c:0") is None


def test_a_card_that_does_not_take_what_is_left_to_it_loses_it(store: Store) -> None:
    store.jobs.submit(submission(lora=6, method="lora"))
    for node, total in (("a:0", 8), ("b:0", 24), ("c:0", 80)):
        show(store, node, total)
    assert store.attempts.claim("c:0", distrusted=frozenset({"a:0"})) == Left(nodes=frozenset({"b:0"}))
    assert claim(store, "c:0", distrusted=frozenset({"a:0", "b:0", "c:0"})), "itself it always trusts"


# --- unknown needs, and reservations ---


def test_a_job_of_unknown_need_has_a_card_of_its_own_until_it_is_planned(store: Store) -> None:
    first, unknown, third = (
        store.jobs.submit(submission(lora=size, qlora=None if size is None else size / 2)) for size in (10, None, 12)
    )
    show(store, total=48, max_jobs=4, margin=1)
    mine = claim(store)
    assert mine.job_id == first
    beside = claim(store)
    assert beside.job_id == third, "the unknown one does not share"
    for one in (mine, beside):
        done(store, one)
    alone = claim(store)
    assert (alone.job_id, alone.vram_planned, alone.vram_reserved) == (unknown, None, 47 * GIB)
    fourth = store.jobs.submit(submission(lora=30, method="lora"))
    assert store.attempts.claim("box:0") is None, "all of the card is the unknown job's"

    store.attempts.beat(alone, Progress(need=Need(lora=10 * GIB, qlora=6 * GIB)))
    row = store.jobs.get(unknown)
    assert (row.vram_reserved, row.vram_lora, row.vram_qlora) == (10 * GIB, 10 * GIB, 6 * GIB)
    assert store.attempts.of_job(unknown)[0].vram_planned == 10 * GIB
    assert [e.text for e in store.jobs.events(unknown) if e.kind == "planned"] == [
        "planned 10.0 GiB from the data's own lengths, 47.0 were reserved"
    ]
    assert claim(store).job_id == fourth


@pytest.mark.both
def test_a_better_plan_never_takes_more_than_was_reserved(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=10, method="lora"))
    show(store)
    mine = claim(store)
    store.attempts.beat(mine, Progress(need=Need(lora=12 * GIB, qlora=None)))
    assert gib_of(store.jobs.get(job_id).vram_reserved) == 10
    assert gib_of(store.jobs.get(job_id).vram_lora) == 12, "later attempts know it"


# --- the database and the plain rule ---


@dataclass
class Plain:
    """The same fleet and queue as lists."""

    cards: dict[str, Card]
    waiting: list[Waiting]
    had: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def expected(self, node: str) -> tuple[int, Method, int] | None:
        charges = {user: charge(0.0, jobs) for user, jobs in self.had.items()}
        for decision in place(Lines(self.waiting), list(self.cards.values()), charges, NOON):
            if decision.placed is not None and decision.placed.node == node:
                return decision.placed.job.job_id, decision.placed.method, decision.placed.reserved
        return None

    def start(self, node: str, claim: Claim) -> None:
        size = claim.vram_reserved or 0
        occupant = Occupant(job_id=claim.job_id, user=claim.user, reserved=size)
        self.cards[node] = self.cards[node].with_job(occupant)
        self.waiting = [job for job in self.waiting if job.job_id != claim.job_id]
        self.had.setdefault(claim.user, []).append((size, 0.0))


gibs = st.sampled_from([None, 1, 3, 7, 8, 9, 15, 23, 30, 60])
labels = st.sampled_from([{}, {}, {}, {"nvlink": "yes"}])


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lora": draw(gibs),
        "qlora": draw(gibs),
        "user": draw(st.sampled_from(["ada", "bob", "cyd|x"])),
        "priority": draw(st.sampled_from([0, 0, 0, 5, -5])),
        "method": draw(st.sampled_from(["auto", "auto", "lora", "qlora", ["qlora", "lora"]])),
        "resources": {"node_labels": draw(labels)},
        "age": draw(st.sampled_from([0, 60, 2000, 100_000])),
        "aside": draw(st.sampled_from([None] * 5 + ["held", "later", "earlier"])),
    }


cards_of = st.fixed_dictionaries(
    {
        "total": st.sampled_from([8, 16, 24, 48]),
        "margin": st.sampled_from([0, 1]),
        "outside_bytes": st.sampled_from([0, 0, 5]),
        "max_jobs": st.integers(1, 3),
        "labels": labels,
        "kind": st.sampled_from(["nvml", "nvml", "cpu"]),
    }
)


@pytest.mark.both
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    jobs=st.lists(rows(), max_size=10),
    nodes=st.lists(cards_of, min_size=1, max_size=3),
    turns=st.lists(st.integers(0, 2), max_size=8),
)
def test_a_claim_is_what_the_rule_gives_over_plain_lists(
    jobs: list[dict[str, Any]], nodes: list[dict[str, Any]], turns: list[int], timed: Store, clock: Clock
) -> None:
    plain = _build(timed, clock, jobs, nodes)
    for turn in turns:
        node = f"box:{turn % len(nodes)}"
        expected, taken = plain.expected(node), timed.attempts.claim(node)
        if not isinstance(taken, Claim):
            assert expected is None, f"{node} should take {expected}, it says {taken}"
            continue
        assert (taken.job_id, taken.method, taken.vram_reserved) == expected
        plain.start(node, taken)
        card = timed.cards.fleet().cards[node]
        assert card.outside + card.taken + card.margin <= card.total


def _build(store: Store, clock: Clock, jobs: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> Plain:
    """An empty database filled with the fleet and the queue, and the same as lists."""
    with Session(store.engine) as session, session.begin():
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    waiting = []
    for row in sorted(jobs, key=lambda r: -r["age"]):
        keys = {k: v for k, v in row.items() if k not in ("age", "aside")}
        clock.now = NOON - dt.timedelta(seconds=row["age"])
        wanted = submission(**keys)
        job_id = store.jobs.submit(wanted)
        aside = {
            "held": {"held": True},
            "later": {"not_before": NOON + dt.timedelta(seconds=9)},
            "earlier": {"not_before": NOON},
        }.get(row["aside"])
        if aside is not None:
            with Session(store.engine) as session, session.begin():
                session.execute(update(Job).where(Job.job_id == job_id).values(**aside))
        if row["aside"] in (None, "earlier"):
            requires = frozenset(row["resources"]["node_labels"].items())
            with Session(store.engine) as session:
                left_s = session.scalars(select(Job.work_left_s).where(Job.job_id == job_id)).one()
            waiting.append(
                Waiting(
                    job_id=job_id, user=row["user"], priority=row["priority"], since=clock.now,
                    methods=wanted.methods, need=wanted.plan.need, requires=requires, left_s=left_s,
                )
            )  # fmt: skip
    clock.now = NOON
    cards = {}
    for index, state in enumerate(nodes):
        name, kept = f"box:{index}", {k: int(state[k] * GIB) for k in ("total", "margin", "outside_bytes")}
        store.cards.see(node_state(name, **{**state, **kept}))
        cards[name] = Card(
            model="NVIDIA A40",
            node=name, total=kept["total"], margin=kept["margin"], outside=kept["outside_bytes"],
            max_jobs=state["max_jobs"], labels=frozenset(state["labels"].items()), processor=state["kind"] == "cpu",
        )  # fmt: skip
    return Plain(cards, waiting)


@pytest.mark.both
def test_the_cards_of_the_plain_rule_are_those_of_the_database(store: Store) -> None:
    show(store, "a:0", 48, margin=1, outside_bytes=3, max_jobs=2, labels={"x": "y"}, user_limit=3)
    store.jobs.submit(submission(lora=10, method="lora"))
    mine = claim(store, "a:0")
    store.attempts.beat(mine, Progress(eta_seconds=60.0))
    (card,) = store.cards.fleet().cards.values()
    assert replace(card, running=()) == Card(
        model="NVIDIA A40",
        node="a:0",
        total=48 * GIB,
        margin=GIB,
        outside=3 * GIB,
        max_jobs=2,
        labels=frozenset({("x", "y")}),
        user_limit=3,
    )
    (job,) = card.running
    assert (job.job_id, job.user, job.reserved, job.used) == (mine.job_id, "ada", 10 * GIB, 0)
    assert job.ends is not None
    assert (card.capacity, card.taken, card.free, card.slots) == (44 * GIB, 10 * GIB, 34 * GIB, 1)
