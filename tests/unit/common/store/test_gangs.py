"""Several cards for one job in the database: claimed all or nothing, reserved on each, ended as one."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from loractl.common.job.method import Method, Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import LAB_RETRY_DELAY_S, Reason, Status
from loractl.common.placement.rule import RESERVE_AFTER_S
from loractl.common.settings import LEASE_S
from loractl.common.store.fleet import LEAVES_IN_S
from loractl.common.store.records import Choice, Claim, Left, Page, Progress, Submission
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.fleet.answer import fleet
from loractl.scheduler.status.overview import overview
from loractl.scheduler.status.overview_text import overview_text

from ...factories import RESULT, Clock, node_state, submission

NOTHING = Progress()


def show(store: Store, *nodes: str, total: float = 24, **state: Any) -> None:
    for node in nodes:
        state = {"max_jobs": 1, "gangs": True, **state}
        store.cards.see(node_state(node, **{**state, "total": int(total * GIB)}))


def gang(cards: int = 2, lora: float = 20, *, alone: bool = True, **keys: Any) -> Submission:
    """A job of 40 GiB on one card, or `lora` GiB on each of several."""
    way = SharedNeed(cards=cards, parallel=Parallel.SHARDED, need=Need(lora=int(lora * GIB), qlora=None))
    one = submission(lora=40, qlora=None, **{"method": "lora", **keys})
    return replace(one, ways=Ways(alone=alone, gangs=(way,)))


def claimed(store: Store, node: str = "heron:0", **more: Any) -> Claim:
    taken = store.attempts.claim(node, **{"gangs": True, **more})
    assert isinstance(taken, Claim), taken
    return taken


@pytest.mark.both
def test_a_claim_reserves_each_card_and_its_end_frees_all(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    job_id, small = store.jobs.submit(gang()), store.jobs.submit(submission(lora=8, qlora=None, method="lora"))
    mine = claimed(store, "heron:1")
    assert (mine.job_id, mine.method, mine.parallel) == (job_id, Method.LORA, Parallel.SHARDED)
    assert [(share.node, share.bytes) for share in mine.shares] == [("heron:1", 20 * GIB), ("heron:0", 20 * GIB)]
    cards = store.cards.fleet().cards
    assert [(card.taken, card.slots) for card in cards.values()] == [(20 * GIB, 0), (20 * GIB, 0)]
    assert store.attempts.claim("heron:0", gangs=True) is None, "the other card is full"
    assert store.cards.tokens("heron:0") == store.cards.tokens("heron:1") == {mine.token}
    assert [store.cards.serves_beside(node) for node in ("heron:0", "heron:1")] == [True, False]
    assert "started on heron:1 and heron:0 with lora, sharded over 2 cards" in store.jobs.events(job_id)[-1].text
    assert store.cards.fleet().charges["ada"] == pytest.approx(40, abs=0.1)
    store.attempts.finish(mine, Reason.CANCELLED, "enough", NOTHING)
    assert claimed(store).job_id == small


def test_a_job_on_several_cards_that_waits_for_its_next_attempt_is_not_finished(timed: Store, clock: Clock) -> None:
    show(timed, "heron:0", "heron:1")
    timed.jobs.submit(gang(max_retries=1))
    timed.attempts.finish(claimed(timed), Reason.TRAINER_ERROR, "broke", NOTHING)
    assert timed.attempts.claim("heron:0", gangs=True) is None and timed.jobs.has_unfinished(24 * GIB, {})
    assert not timed.jobs.has_unfinished(19 * GIB, {})


def test_a_node_that_can_t_serve_several_cards_is_given_no_such_job(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    store.jobs.submit(gang())
    assert store.attempts.claim("heron:0") is None
    show(store, "heron:0", "heron:1", gangs=False)
    assert store.attempts.claim("heron:0", gangs=True) is None
    show(store, "heron:0", "heron:1", gpu="MIG-1")
    assert store.attempts.claim("heron:0", gangs=True) is None
    show(store, "heron:0", "heron:1")
    assert claimed(store).shares


def test_the_memory_that_a_card_says_counts_for_its_share(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    store.jobs.submit(gang())
    show(store, "heron:1", outside_bytes=5 * GIB)
    assert store.attempts.claim("heron:0", gangs=True) is None
    show(store, "heron:1")
    assert store.attempts.claim("heron:0", gangs=True, outside=5 * GIB) is None, "what the claiming card sees itself"
    assert claimed(store).shares


@pytest.mark.both
def test_a_card_whose_node_is_started_anew_ends_the_whole_job(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    job_id = store.jobs.submit(gang())
    mine = claimed(store)
    assert store.cards.arrive(node_state("heron:1")).given_back == (job_id,)
    assert store.jobs.get(job_id).status is Status.QUEUED
    assert not store.attempts.beat(mine, NOTHING).accepted
    assert all(not card.running for card in store.cards.fleet().cards.values())


def test_a_card_that_is_silent_already_is_not_counted_on(timed: Store, clock: Clock) -> None:
    """The attempt would be ended as lost, again and again, until the job is held."""
    show(timed, "heron:0", "heron:1")
    timed.jobs.submit(gang())
    clock.forward(LEASE_S * 0.6)
    show(timed, "heron:0")
    assert timed.attempts.claim("heron:0", gangs=True) is None
    show(timed, "heron:1")
    assert claimed(timed).shares


def test_a_card_stays_kept_for_a_job_on_several_while_the_other_one_is_silent(timed: Store, clock: Clock) -> None:
    """Else a lost beat would give it to a job that runs for hours."""
    show(timed, "heron:0", "heron:1", total=48, max_jobs=2)
    large = timed.jobs.submit(gang(lora=30, alone=False))
    timed.jobs.submit(submission(lora=24, qlora=None, method="lora", user="bob"))
    clock.forward(RESERVE_AFTER_S)
    show(timed, "heron:1", total=48, max_jobs=2)
    clock.forward(LEASE_S * 0.6)
    show(timed, "heron:0", total=48, max_jobs=2)
    assert timed.attempts.claim("heron:0", gangs=True) is None
    show(timed, "heron:1", total=48, max_jobs=2)
    assert claimed(timed).job_id == large


def test_a_card_stays_kept_for_a_job_on_several_while_the_other_one_takes_nothing(timed: Store, clock: Clock) -> None:
    """A node that lets a job lie for some seconds may have begun anew when the job's cards are free."""
    show(timed, "heron:0", "heron:1", total=48, max_jobs=2)
    large = timed.jobs.submit(gang(lora=30, alone=False))
    timed.jobs.submit(submission(lora=24, qlora=None, method="lora", user="bob"))
    clock.forward(RESERVE_AFTER_S)
    show(timed, "heron:0", "heron:1", total=48, max_jobs=2)
    stuck = frozenset({"heron:1"})
    assert timed.attempts.claim("heron:0", gangs=True, distrusted=stuck) is None, (
        "neither with that card nor past the job"
    )
    assert claimed(timed).job_id == large


def test_a_job_that_one_card_holds_goes_on_two_where_that_one_takes_nothing(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    show(store, "ibis:0", total=80)
    store.jobs.submit(gang())
    assert store.attempts.claim("heron:0", gangs=True) is None
    assert claimed(store, distrusted=frozenset({"ibis:0"})).shares


@pytest.mark.both
def test_a_silent_card_ends_the_whole_job_though_the_other_beats(timed: Store, clock: Clock) -> None:
    show(timed, "heron:0", "heron:1")
    job_id = timed.jobs.submit(gang())
    mine = claimed(timed)
    for _ in range(3):
        clock.forward(LEASE_S / 2)
        show(timed, "heron:0")
        if timed.attempts.beat(mine, NOTHING).accepted:
            timed.attempts.reap()
    job = timed.jobs.get(job_id)
    assert (job.status, job.reason) == (Status.QUEUED, Reason.WORKER_LOST)
    assert job.message is not None and job.message.startswith("heron:1 was silent")
    assert set(job.avoids or {}) == {"heron:1"}


def test_a_card_that_is_gone_ends_the_whole_job(timed: Store) -> None:
    show(timed, "heron:0", "heron:1")
    job_id = timed.jobs.submit(gang())
    claimed(timed)
    assert timed.attempts.reap() == []
    timed.cards.forget("heron:1")
    assert [lost for lost, _ in timed.attempts.reap()] == [job_id]


@pytest.mark.parametrize("bad", ["heron:0", "heron:1"])
def test_the_card_that_failed_is_blamed_whichever_rank_it_had(timed: Store, clock: Clock, bad: str) -> None:
    show(timed, "heron:0", "heron:1", "heron:2")
    jobs = [timed.jobs.submit(gang(user=user)) for user in ("ada", "bob")]
    for job_id in jobs:
        mine = claimed(timed)
        assert [share.node for share in mine.shares] == ["heron:0", "heron:1"] and mine.job_id == job_id
        timed.attempts.finish(mine, Reason.GPU_ERROR, f"{bad} fell off the bus", NOTHING, card=bad)
        assert set(timed.jobs.get(job_id).avoids or {}) == {bad}
    assert set(timed.cards.drains()) == {bad}, "two errors in a row, and no other card is closed"
    clock.forward(LAB_RETRY_DELAY_S)
    show(timed, "heron:0", "heron:1", "heron:2")
    again = claimed(timed, "heron:2")
    assert {share.node for share in again.shares} == {"heron:0", "heron:1", "heron:2"} - {bad}


def test_what_ends_well_on_several_cards_speaks_for_each(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    for user in ("ada", "bob"):
        store.jobs.submit(gang(user=user))
        store.attempts.finish(claimed(store), Reason.GPU_ERROR, "a fault", NOTHING, card="heron:1")
        store.jobs.submit(gang(user=user))
        store.attempts.finish(claimed(store), Reason.OK, "", NOTHING, RESULT)
    assert store.cards.drains() == {}


def test_a_lost_card_is_blamed_and_not_the_first(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    job_id = store.jobs.submit(gang())
    claimed(store)
    store.cards.arrive(node_state("heron:1"))
    assert set(store.jobs.get(job_id).avoids or {}) == {"heron:1"}


def test_its_user_is_charged_for_all_cards(timed: Store, clock: Clock) -> None:
    show(timed, "heron:0", "heron:1")
    timed.jobs.submit(gang())
    mine = claimed(timed)
    clock.forward(2 * 3600)
    timed.attempts.finish(mine, Reason.CANCELLED, "enough", NOTHING)
    assert timed.cards.fleet().charges["ada"] == pytest.approx(80, rel=0.01)


def test_a_plan_that_a_trainer_makes_on_one_of_several_cards_is_not_that_of_one(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    job_id = store.jobs.submit(gang())
    mine = claimed(store)
    store.attempts.beat(mine, Progress(need=Need(lora=5 * GIB, qlora=None)))
    assert (store.jobs.get(job_id).vram_lora, store.jobs.get(job_id).vram_reserved) == (40 * GIB, 20 * GIB)


def test_out_of_memory_raises_what_each_card_needs(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    job_id = store.jobs.submit(gang(lora=16))
    assert store.attempts.finish(claimed(store), Reason.OUT_OF_MEMORY, "it did not fit", NOTHING) is Status.QUEUED
    assert store.jobs.get(job_id).vram_needed == 20 * GIB
    assert store.attempts.finish(claimed(store), Reason.OUT_OF_MEMORY, "it did not fit", NOTHING) is Status.FAILED
    assert "no box has cards with more" in (store.jobs.get(job_id).message or "")


def test_a_running_gang_gives_way_as_one_and_a_waiting_one_is_given_way_to(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    low = store.jobs.submit(gang(preemptible=True))
    claimed(store)
    high = store.jobs.submit(submission(lora=20, qlora=None, method="lora", priority=5))
    assert store.cards.preempt() == (low,)
    store.jobs.cancel(high, "ada")


def test_smaller_jobs_give_way_to_a_waiting_gang(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    small = [store.jobs.submit(submission(lora=8, qlora=None, method="lora", preemptible=True)) for _ in range(2)]
    assert {claimed(store, node).job_id for node in ("heron:0", "heron:1")} == set(small)
    store.jobs.submit(gang(priority=5))
    assert set(store.cards.preempt()) == set(small)


@pytest.mark.both
def test_no_job_gives_way_to_one_that_would_not_begin_with_a_silent_card(timed: Store, clock: Clock) -> None:
    show(timed, "heron:0", "heron:1")
    small = timed.jobs.submit(submission(lora=8, qlora=None, method="lora", preemptible=True))
    mine = claimed(timed)
    timed.jobs.submit(gang(priority=5, alone=False))
    clock.forward(LEASE_S * 0.6)
    timed.attempts.beat(mine, NOTHING)
    show(timed, "heron:0")
    assert timed.cards.preempt() == ()
    show(timed, "heron:1")
    assert timed.cards.preempt() == (small,)


@pytest.mark.both
def test_no_small_job_takes_the_card_beside_that_of_a_job_that_gives_way(store: Store) -> None:
    """Else that one would have stopped in vain, again and again."""
    show(store, "heron:0", "heron:1")
    small = submission(lora=8, qlora=None, method="lora", preemptible=True)
    store.jobs.submit(small)
    leaving = claimed(store)
    large, other = store.jobs.submit(gang(priority=5)), store.jobs.submit(small)
    assert store.cards.preempt() == (leaving.job_id,)
    assert store.attempts.claim("heron:1", gangs=True) is None
    store.attempts.finish(leaving, Reason.PREEMPTED, "gave way", NOTHING)
    assert claimed(store).job_id == large
    assert store.jobs.get(other).status is Status.QUEUED


def test_what_is_being_cancelled_is_expected_to_end_soon(store: Store) -> None:
    show(store, "heron:0")
    store.jobs.submit(submission(lora=8, qlora=None, method="lora"))
    mine = claimed(store)
    store.attempts.beat(mine, Progress(eta_seconds=5000.0))
    store.jobs.cancel(mine.job_id, "ada")
    (job,) = store.cards.fleet().cards["heron:0"].running
    assert job.ends is not None and (job.ends - store.cards.fleet().now).total_seconds() <= LEAVES_IN_S


@pytest.mark.both
@pytest.mark.parametrize("by_hand", [False, True])
def test_no_card_idles_for_the_age_of_a_gang_that_has_just_come_back(timed: Store, clock: Clock, by_hand: bool) -> None:
    """It ran for hours, or ended the day before: a free card would idle for it for as long as the other one runs."""
    show(timed, "heron:0", "heron:1")
    large = timed.jobs.submit(gang())
    clock.forward(60)
    show(timed, "heron:0", "heron:1")
    mine = claimed(timed)
    if by_hand:
        timed.attempts.finish(mine, Reason.CANCELLED, "enough", NOTHING)
    clock.forward((30 if by_hand else 10) * 3600)
    show(timed, "heron:0", "heron:1")
    long, small = (submission(lora=8, qlora=None, method="lora", priority=p) for p in (5, 0))
    timed.jobs.submit(long)
    if not by_hand:
        timed.attempts.finish(mine, Reason.DRAINED, "its card is drained", NOTHING)
    timed.attempts.beat(claimed(timed), Progress(eta_seconds=8 * 3600.0))
    if by_hand:
        timed.jobs.retry(large, "ada")
    next_one = timed.jobs.submit(small)
    assert claimed(timed, "heron:1").job_id == next_one


def test_jobs_that_have_just_begun_pass_a_gang_no_day(timed: Store, clock: Clock) -> None:
    """Their ends are not known before their first steps. On two cards one has always just begun."""
    show(timed, "heron:0", "heron:1")
    small = submission(lora=8, qlora=None, method="lora", user="bob")
    for _ in range(20):
        timed.jobs.submit(small)
    running, large = {node: claimed(timed, node) for node in ("heron:0", "heron:1")}, timed.jobs.submit(gang())
    for turn in range(20):
        clock.forward(150)
        show(timed, "heron:0", "heron:1")
        node = f"heron:{turn % 2}"
        if node in running:
            timed.attempts.finish(running.pop(node), Reason.CANCELLED, "enough", NOTHING)
        taken = timed.attempts.claim(node, gangs=True)
        if isinstance(taken, Claim):
            running[node] = taken
            if taken.job_id == large:
                break
    assert timed.jobs.get(large).status is Status.RUNNING
    assert (clock.now - timed.jobs.get(large).submitted_at).total_seconds() <= RESERVE_AFTER_S + 300


def test_a_card_that_is_woken_for_a_gang_of_others_names_them(store: Store) -> None:
    """It has the only message: without a word from it they would find the job seconds later."""
    show(store, "heron:0", "heron:1", "ibis:0")
    store.jobs.submit(gang())
    left = store.attempts.claim("ibis:0", gangs=True)
    assert isinstance(left, Left)
    assert left.nodes == {"heron:0"}


@pytest.mark.both
@pytest.mark.parametrize("round_", range(3))
def test_cards_that_claim_at_once_give_no_byte_twice(store: Store, round_: int) -> None:
    nodes = [f"heron:{n}" for n in range(4)]
    show(store, *nodes)
    jobs = [store.jobs.submit(gang()) for _ in range(3)] + [
        store.jobs.submit(submission(lora=8, qlora=None, method="lora"))
    ]
    taken: list[Any] = []

    def serve(node: str) -> None:
        for _ in range(6):
            taken.append(store.attempts.claim(node, gangs=True))

    threads = [threading.Thread(target=serve, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begun = [claim.job_id for claim in taken if isinstance(claim, Claim)]
    assert sorted(begun) == jobs[:2], "two gangs have the four cards"
    for card in store.cards.fleet().cards.values():
        assert (card.taken, len(card.running)) == (20 * GIB, 1)


def test_rows_that_another_version_wrote_are_read_as_jobs_for_one_card(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    assert store.jobs.get(job_id).gangs is None
    show(store, "heron:0", gangs=False)
    assert claimed(store, gangs=False).shares == ()


@pytest.mark.both
def test_a_job_on_several_cards_is_shown_as_one(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    job_id = store.jobs.submit(gang())
    claimed(store)
    seen = overview(store, Choice(), Page())
    assert [job.job_id for job in seen.running] == [job_id]
    assert " heron 0, 1 " in overview_text(seen, Screen(width=100, color=False, unicode=True))
    assert fleet(store).jobs_on("heron") == [job_id]


@pytest.mark.both
def test_what_one_of_several_cards_held_teaches_nothing_of_one_card(store: Store) -> None:
    show(store, "heron:0", "heron:1")
    store.jobs.submit(gang(need_key="same"))
    store.attempts.finish(claimed(store), Reason.OUT_OF_MEMORY, "full", Progress(vram_process=20 * GIB))
    assert store.attempts.measured("same") == []
