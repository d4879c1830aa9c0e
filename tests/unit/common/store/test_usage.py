"""What was had of the cards: by hour, user and card, after gc as well, and held against quotas."""

from __future__ import annotations

import datetime as dt
import threading
from collections import defaultdict
from dataclasses import replace

import pytest
from sqlalchemy import Engine, event, text

from loractl.common.job.status import Reason
from loractl.common.placement.card_hours import QuotaMeter
from loractl.common.store.queries.cards.nodes import read_allowed
from loractl.common.store.records import Claim, Left, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.store.tables import Use
from loractl.common.units import GIB

from ....waiting import until_blocked
from ...factories import NOON, RESULT, Clock, node_state, submission

EPOCH = NOON - dt.timedelta(days=400)


def start(store: Store, gib: float = 12, user: str = "ada", node: str = "box:0", **keys: object) -> Claim:
    """On a card of 48 GiB."""
    store.jobs.submit(submission(lora=gib, method="lora", user=user, **keys))
    return again(store, node)


def again(store: Store, node: str = "box:0") -> Claim:
    store.cards.see(node_state(node, total=48 * GIB, max_jobs=8))
    claim = store.attempts.claim(node)
    assert isinstance(claim, Claim), claim
    return claim


def end(store: Store, claim: Claim, reason: Reason = Reason.OK, step: int | None = None) -> None:
    progress = Progress(step=step, total_steps=100)
    store.attempts.finish(claim, reason, "", progress, RESULT if reason is Reason.OK else None)


def sums(store: Store, *names: str, since: dt.datetime = EPOCH) -> dict[tuple[object, ...], float]:
    """Card hours by some of the names."""
    found: dict[tuple[object, ...], float] = defaultdict(float)
    for use in store.usage.since(since):
        found[tuple(getattr(use, name) for name in names)] += use.card_hours
    return {key: round(value, 6) for key, value in found.items()}


def total(store: Store, name: str) -> float:
    return round(sum(getattr(use, name) for use in store.usage.since(EPOCH)), 6)


def test_a_part_of_a_card_counts_as_its_part_by_hour_user_and_card(timed: Store, clock: Clock) -> None:
    clock.forward(1800)  # 12:30
    first = start(timed, gib=12, labels={"team": "nlp"})
    second = start(timed, gib=24, user="wei", node="owl:0")
    clock.forward(5400)  # 14:00
    running = sums(timed, "user", "node", "hour")
    end(timed, first)
    end(timed, second)
    hours = [NOON, NOON + dt.timedelta(hours=1)]
    assert {key: value for key, value in sums(timed, "user", "node", "hour").items() if value} == {
        ("ada", "box:0", hours[0]): 0.125, ("ada", "box:0", hours[1]): 0.25,
        ("wei", "owl:0", hours[0]): 0.25, ("wei", "owl:0", hours[1]): 0.5,
    }  # fmt: skip
    assert {key: value for key, value in running.items() if value} == {
        key: value for key, value in sums(timed, "user", "node", "hour").items() if value
    }, "what runs counts as what has ended"
    assert (total(timed, "gib_hours"), total(timed, "jobs")) == (12 * 1.5 + 24 * 1.5, 2)
    assert {tuple(use.labels.items()) for use in timed.usage.since(EPOCH)} == {(("team", "nlp"),), ()}
    assert sums(timed, "user", since=hours[1]) == {("ada",): 0.25, ("wei",): 0.5}


def test_a_user_s_first_endings_in_one_transaction_are_all_charged(timed: Store, clock: Clock) -> None:
    for _ in range(2):
        start(timed)
    clock.forward(3600)
    assert len(timed.attempts.reap()) == 2
    assert (total(timed, "gib_hours"), timed.cards.fleet().charges) == (24.0, {"ada": pytest.approx(24.0)})


@pytest.mark.both
def test_a_user_s_first_endings_in_two_transactions_are_both_charged(postgres_engine: Engine, clock: Clock) -> None:
    store = Store(postgres_engine, clock=clock)
    ends = [threading.Thread(target=end, args=(store, start(store))) for _ in range(2)]
    clock.forward(3600)
    with postgres_engine.begin() as connection:
        connection.execute(text("LOCK TABLE uses IN SHARE MODE"))  # an end reads the user's use, and can't write it
        for one in ends:
            one.start()
        until_blocked(connection, len(ends))
    for one in ends:
        one.join(timeout=30)
    assert store.cards.fleet().charges == {"ada": pytest.approx(24.0)}


@pytest.mark.both
def test_what_was_measured_counts_where_less_was_reserved(timed: Store, clock: Clock) -> None:
    """A need of one byte evades neither share nor quota."""
    timed.usage.set_quota("ada", 5, 86400, soft=False)
    claim = start(timed, gib=1 / GIB)
    timed.attempts.beat(claim, Progress(vram_process=40 * GIB))
    clock.forward(6 * 3600)

    def counted() -> tuple[float, float, float]:
        with timed.begin(read_only=True) as tx:
            (allowed,) = read_allowed(tx.session, tx.now()).values()
        return total(timed, "gib_hours"), total(timed, "card_hours"), round(allowed.used, 6)

    assert counted() == (240, 5, 5), "while it runs"
    end(timed, claim)
    assert counted() == (240, 5, 5), "after its end"
    with timed.begin(read_only=True) as tx:
        assert tx.session.get_one(Use, "ada").gib_hours == pytest.approx(240)


@pytest.mark.both
def test_it_outlives_the_jobs(timed: Store, clock: Clock) -> None:
    claim = start(timed, max_retries=0)
    clock.forward(3600)
    end(timed, claim, Reason.BAD_DATA)
    before = timed.usage.since(EPOCH)
    clock.forward(86400)
    assert timed.results.forget_jobs([claim.job_id], clock.now) == {claim.job_id}
    assert timed.usage.since(EPOCH) == before != []


@pytest.mark.both
@pytest.mark.parametrize(
    ("reason", "kept", "reached", "lost"),
    [
        (Reason.OK, None, 100, 0.0),
        (Reason.WORKER_LOST, 60, 80, 0.25),
        (Reason.WORKER_LOST, None, 80, 1.0),
        (Reason.DRAINED, 80, 80, 0.0),
        (Reason.WORKER_LOST, None, None, 1.0),
        (Reason.BAD_DATA, 60, 80, 1.0),  # it fails for good: nothing of it is kept
    ],
)
def test_what_no_checkpoint_keeps_is_lost(
    timed: Store, clock: Clock, reason: Reason, kept: int | None, reached: int | None, lost: float
) -> None:
    claim = start(timed, gib=48, max_retries=0)
    clock.forward(3600)
    if kept is not None:
        assert timed.attempts.keep_checkpoint(claim, StoredCheckpoint(step=kept, prefix="jobs/1/checkpoints/1-1"))
    end(timed, claim, reason, reached)
    assert (total(timed, "card_hours"), total(timed, "lost_hours")) == (1.0, lost)


def test_a_wait_counts_from_when_the_job_could_start(timed: Store, clock: Clock) -> None:
    first = timed.jobs.submit(submission(lora=1, qlora=1))
    last = timed.jobs.submit(submission(lora=1, qlora=1, after=[first]))
    clock.forward(1800)
    claim = again(timed)
    clock.forward(7200)
    end(timed, claim)
    clock.forward(900)
    following = again(timed)
    assert following.job_id == last
    end(timed, following)
    assert total(timed, "waited_hours") == 0.75


def test_a_time_that_no_attempt_can_take_is_the_fault_of_a_clock(timed: Store, clock: Clock) -> None:
    claim = start(timed)
    clock.forward(20 * 365 * 86400)
    end(timed, claim)
    assert total(timed, "card_hours") <= 1 and len(timed.usage.since(EPOCH)) <= 2
    claim = start(timed)
    clock.forward(-3600)
    end(timed, claim)
    assert total(timed, "card_hours") <= 1


@pytest.mark.both
def test_beyond_a_hard_quota_jobs_wait_until_enough_is_past(timed: Store, clock: Clock) -> None:
    timed.usage.set_quota("ada", 1.0, 86400, soft=False)
    claim = start(timed, gib=48)
    clock.forward(3000)
    late = start(timed, user="ada", node="owl:0", gib=12)
    clock.forward(1200)  # 13:10: 1.17 of one card and a little of the other
    held = timed.jobs.submit(submission(lora=1, qlora=1))
    assert isinstance(timed.attempts.claim("owl:0"), Left | None), "what runs counts"
    end(timed, claim)
    end(timed, late)
    others = timed.jobs.submit(submission(lora=1, qlora=1, user="wei"))
    assert again(timed).job_id == others
    (allowance,) = timed.usage.allowances().values()
    assert allowance.exceeded and round(allowance.used, 4) == 1.25
    timed.cards.take_turn(0.0, 0.0)
    below = timed.usage.allowances()["ada"].below_at
    assert below == NOON + dt.timedelta(days=1), "the hour of 12 is out of it then"
    clock.now = below - dt.timedelta(seconds=1)
    timed.cards.take_turn(0.0, 0.0)
    timed.cards.see(node_state("owl:0", total=48 * GIB, max_jobs=8))
    assert isinstance(timed.attempts.claim("owl:0"), Left | None)
    clock.now = below
    timed.cards.take_turn(0.0, 0.0)
    assert again(timed, "owl:0").job_id == held


def test_while_a_running_job_alone_exceeds_a_quota_nobody_knows_when_jobs_start_again(
    timed: Store, clock: Clock
) -> None:
    timed.usage.set_quota("ada", 1.0, 86400, soft=False)
    first, second = start(timed, gib=48), start(timed, gib=48, node="owl:0")
    clock.forward(7200)
    end(timed, first)
    timed.cards.take_turn(0.0, 0.0)
    allowance = timed.usage.allowances()["ada"]
    assert allowance.exceeded and allowance.below_at is None
    end(timed, second)
    timed.cards.take_turn(0.0, 0.0)
    assert timed.usage.allowances()["ada"].below_at is not None


@pytest.mark.parametrize("ahead", [dt.timedelta(days=6), dt.timedelta(days=200)])
def test_a_clock_that_was_ahead_uses_up_no_quota(timed: Store, clock: Clock, ahead: dt.timedelta) -> None:
    """Neither now nor once its hours have come, as far as no attempt takes so long."""
    claim = start(timed, 48)
    clock.forward(3600)
    real = clock.now
    clock.now = real + ahead
    end(timed, claim)
    for days in (0, 100) if ahead.days > 100 else (0,):
        clock.now = real + dt.timedelta(days=days)
        timed.usage.set_quota("ada", 20, 86400, soft=False)  # counts as the fleet's round does
        allowance, meter = timed.usage.allowances()["ada"], timed.usage.past()["ada"]
        assert allowance.used <= 3 and not allowance.exceeded
        met = QuotaMeter({"ada": replace(allowance, used=0.0)}, {"box:0": 48 * GIB}, {"ada": meter})
        assert met.at(clock.now)["ada"].used == pytest.approx(allowance.used)
        assert met.below_at(["ada"], clock.now) is None


def test_what_a_quota_held_for_a_day_does_not_go_before_everybody(timed: Store, clock: Clock) -> None:
    timed.usage.set_quota("ada", 100.0, 86400, soft=False)
    end(timed, start(timed, gib=1))  # so that ada has used a card
    old = [timed.jobs.submit(submission(lora=12, method="lora")) for _ in range(30)]
    clock.forward(2 * 86400)
    urgent = timed.jobs.submit(submission(lora=12, method="lora", user="wei", priority=5))
    assert [again(timed).job_id for _ in range(3)] == [urgent, old[0], old[1]]


def test_a_claim_looks_at_one_job_of_a_user_who_may_start_none(timed: Store, clock: Clock) -> None:
    statements: list[str] = []
    event.listen(timed.engine, "before_cursor_execute", lambda *told: statements.append(told[2]))

    def asked() -> int:
        clock.forward(2 * 86400)
        timed.cards.see(node_state("box:0", total=48 * GIB, max_jobs=8))
        statements.clear()
        assert isinstance(timed.attempts.claim("box:0"), Left | None)
        return len(statements)

    end(timed, start(timed))
    timed.usage.set_quota("ada", 0.0, 86400, soft=False)
    timed.jobs.submit(submission(lora=1, qlora=1))
    one = asked()
    for _ in range(20):
        timed.jobs.submit(submission(lora=1, qlora=1))
    assert asked() == one


@pytest.mark.both
def test_a_replay_goes_on_from_what_the_database_has(timed: Store, clock: Clock) -> None:
    """What it counts then, and an hour later if nothing ends, is what the quota's row and the running jobs say."""
    timed.usage.set_quota("ada", 3.0, 86400, soft=True)
    end(timed, start(timed, gib=48))
    clock.forward(5000)
    end(timed, start(timed, user="wei", gib=48))
    assert timed.usage.past().keys() == {"ada"}
    claim = start(timed, gib=24)
    clock.forward(4000)
    end(timed, claim)
    start(timed, gib=12, node="owl:0")
    clock.forward(1000)
    for later in (0, 3600):
        clock.forward(later)
        view, past = timed.cards.fleet(), timed.usage.past()
        meter = QuotaMeter(view.allowed, {card.node: card.total for card in view.cards.values()}, past)
        meter.take_over(view.cards.values(), view.now, {})
        assert meter.at(view.now)["ada"].used == pytest.approx(view.allowed["ada"].used)
        charge = past["ada"].charge
        assert view.allowed["ada"].on(charge) == pytest.approx(view.charges["ada"])
        if not later:
            hour_later = meter.at(view.now + dt.timedelta(hours=1))["ada"].used
    assert hour_later == pytest.approx(view.allowed["ada"].used)
    timed.usage.remove_quota("ada")
    assert timed.usage.past() == {}


def test_beyond_a_soft_quota_jobs_go_last(timed: Store, clock: Clock) -> None:
    timed.usage.set_quota("ada", 0.5, 86400, soft=True)
    claim = start(timed, gib=48)
    clock.forward(3600)
    end(timed, claim)
    mine = timed.jobs.submit(submission(lora=40, method="lora"))
    other = start(timed, gib=40, user="wei")
    assert other.job_id > mine
    end(timed, other)
    assert again(timed).job_id == mine


def test_a_quota_that_is_removed_holds_nobody(timed: Store, clock: Clock) -> None:
    timed.usage.set_quota("ada", 0.0, 86400, soft=False)
    timed.jobs.submit(submission(lora=1, qlora=1))
    timed.cards.see(node_state("box:0", total=48 * GIB, max_jobs=8))
    assert isinstance(timed.attempts.claim("box:0"), Left | None)
    assert timed.usage.remove_quota("ada") and not timed.usage.remove_quota("ada")
    again(timed)
