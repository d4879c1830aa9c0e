"""Joins in the claim: who comes into a running host, what each holds and is charged, and when the base stays."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import delete, event
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason, Status
from loractl.common.placement.hosts import base_key
from loractl.common.placement.pack_rule import MeasuredPass
from loractl.common.settings import LEASE_S
from loractl.common.store.fleet import NODE_STALE_S
from loractl.common.store.records import Claim, NewHost, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Base
from loractl.common.units import GIB
from loractl.scheduler.wait.reasons import explain
from loractl.scheduler.wait.starts import expected_starts, read_starts

from ...factories import RESULT, Clock, node_state, submission

EXAMPLES = int(os.environ.get("STORE_EXAMPLES", "20"))
NODE = "box:0"
SHORT = {"dataset": {"path": "org/data", "max_length": 8}, "training": {"per_device_train_batch_size": 1}}
"""Rows so short that a pack of strangers pays."""


def show(store: Store, total: float = 24, **state: Any) -> None:
    store.cards.see(node_state(NODE, **{"total": int(total * GIB), "max_jobs": 1, **state}))


def queue(store: Store, gib: float = 8, **keys: Any) -> int:
    user = keys.pop("user", "ada")
    return store.jobs.submit(submission(lora=gib, method="lora", user=user, **{**SHORT, "base_model": "org/a", **keys}))


def claim(store: Store, **asked: Any) -> Claim:
    taken = store.attempts.claim(NODE, **{"joins": True, **asked})
    assert isinstance(taken, Claim), taken
    return taken


def opens(store: Store, mine: Claim, gib: float = 5, mark: str = "h1") -> Claim:
    key = base_key(mine.spec, mine.method)
    assert key is not None
    assert store.hosts.open(mine, NewHost(host=mark, node=NODE, key=key, bytes=int(gib * GIB)))
    return mine


def anchored(store: Store, **keys: Any) -> Claim:
    """A job whose trainer others may join."""
    show(store)
    queue(store, **keys)
    return opens(store, claim(store))


def end(store: Store, mine: Claim) -> None:
    assert store.attempts.finish(mine, Reason.OK, "done", Progress(), RESULT) is Status.SUCCEEDED


def taken(store: Store) -> float:
    return store.cards.fleet().cards[NODE].taken / GIB


def test_a_claim_takes_as_many_statements_beside_any_number_of_hosts(store: Store) -> None:
    asked: list[str] = []

    def count(*given: Any) -> None:
        asked.append(given[2])

    counts, boxes = [], 0
    for more in (2, 6):
        for number in range(boxes, boxes + more):
            store.cards.see(node_state(f"box:{number}", total=24 * GIB, max_jobs=1))
            queue(store, base_model=f"org/{number}")
            opens_on(store, f"box:{number}")
        boxes += more
        for number in range(boxes):
            queue(store, base_model=f"org/{number}")
        asked.clear()
        event.listen(store.engine, "after_cursor_execute", count)
        mine = store.attempts.claim("box:0", joins=True)
        event.remove(store.engine, "after_cursor_execute", count)
        assert isinstance(mine, Claim) and mine.joins and mine.spec.base_model == "org/0"
        end(store, mine)
        counts.append(len(asked))
        for job in store.jobs.matching(statuses=[Status.QUEUED]):
            store.jobs.cancel(job.job_id, "ada")
    assert counts[0] == counts[1], counts


def opens_on(store: Store, node: str) -> None:
    mine = store.attempts.claim(node, joins=True)
    assert isinstance(mine, Claim)
    key = base_key(mine.spec, mine.method)
    assert key is not None
    assert store.hosts.open(mine, NewHost(host=f"h{node}", node=node, key=key, bytes=5 * GIB))


def test_a_job_joins_a_full_card_s_host_by_its_own_part(store: Store) -> None:
    first = anchored(store)
    queue(store)
    assert store.attempts.claim(NODE) is None, "its node can't put a job beside another"
    mine = claim(store)
    assert (mine.host, mine.joins, mine.packs, mine.vram_reserved) == ("h1", True, True, 3 * GIB)
    assert f"with job {first.job_id} on one base" in store.jobs.events(mine.job_id)[-1].text
    assert taken(store) == 11
    queue(store, base_model="org/b")
    queue(store, gib=19)
    assert store.attempts.claim(NODE, joins=True) is None, "another base; too large a part"


def test_nothing_joins_a_host_that_did_not_open(store: Store) -> None:
    show(store)
    queue(store)
    claim(store)
    queue(store)
    assert store.attempts.claim(NODE, joins=True) is None


def test_the_expected_start_of_a_waiting_job_knows_the_host_that_it_may_join(store: Store) -> None:
    anchored(store)
    mine, other, large = queue(store), queue(store, base_model="org/b", gib=20), queue(store, gib=30)
    view, waiting = store.cards.fleet(), store.jobs.ready(10)
    assert set(store.cards.newcomers(waiting)) == {mine, large}
    found = read_starts(store, view, waiting)
    assert {job_id: (start.node, start.at) for job_id, start in found.items()} == {mine: (NODE, view.now)}
    assert other not in expected_starts(view, waiting), "when the first ends is not known"


def test_the_base_stays_until_the_last_member_has_left(store: Store) -> None:
    first = anchored(store)
    queue(store)
    second = claim(store)
    end(store, first)
    assert taken(store) == 8, "the base, and one's own part"
    assert not store.hosts.send_off("h1", NODE)
    queue(store)
    third = claim(store)
    assert third.joins and taken(store) == 11
    end(store, second)
    end(store, third)
    assert taken(store) == 0 and len(store.cards.fleet().cards[NODE].waiting_bases) == 1
    queue(store)
    fourth = claim(store)
    assert (fourth.host, fourth.joins, fourth.vram_reserved) == ("h1", False, 8 * GIB)
    queue(store)
    assert store.attempts.claim(NODE, joins=True) is None, "it opens again once its job trains"


def test_a_member_holds_its_part_until_it_is_out_of_the_host(store: Store) -> None:
    first = anchored(store)
    queue(store)
    mine = claim(store)
    for one in (mine, first):
        store.jobs.cancel(one.job_id, "ada")
        assert store.attempts.finish(one, Reason.CANCELLED, "cancelled", Progress(), inside=True) is Status.CANCELLED
    assert taken(store) == 11 and not store.hosts.send_off("h1", NODE)
    store.hosts.leave(mine)
    assert taken(store) == 8
    store.hosts.leave(first)
    assert taken(store) == 0


def test_a_base_stays_though_its_last_job_s_row_was_closed_before_the_job_was_out(store: Store) -> None:
    first = anchored(store)
    store.jobs.cancel(first.job_id, "ada")
    assert store.attempts.finish(first, Reason.CANCELLED, "cancelled", Progress(), inside=True) is Status.CANCELLED
    key = base_key(first.spec, first.method)
    assert key is not None and store.hosts.keep(first, NewHost(host="h1", node=NODE, key=key, bytes=5 * GIB))
    assert taken(store) == 8 and not store.cards.fleet().cards[NODE].waiting_bases
    store.hosts.leave(first)
    assert not store.hosts.keep(first, NewHost(host="h1", node=NODE, key=key, bytes=5 * GIB))
    assert taken(store) == 0 and len(store.cards.fleet().cards[NODE].waiting_bases) == 1


def test_a_trainer_that_may_not_stay_holds_its_bytes_until_it_has_ended(store: Store) -> None:
    first = anchored(store)
    store.jobs.cancel(first.job_id, "ada")
    assert store.attempts.finish(first, Reason.CANCELLED, "cancelled", Progress(), inside=True) is Status.CANCELLED
    key = base_key(first.spec, first.method)
    assert key is not None and not store.hosts.keep(first, NewHost(host="h1", node=NODE, key=key, bytes=500 * GIB))
    assert taken(store) > 0 and not store.cards.fleet().cards[NODE].waiting_bases
    store.hosts.forget(["h1"])
    assert taken(store) == 0


def test_a_job_whose_last_attempt_is_not_out_of_the_host_does_not_join_it_again(store: Store) -> None:
    anchored(store)
    queue(store)
    mine = claim(store)
    store.jobs.cancel(mine.job_id, "ada")
    store.attempts.finish(mine, Reason.CANCELLED, "cancelled", Progress(), inside=True)
    store.jobs.retry(mine.job_id, "ada")
    assert store.attempts.claim(NODE, joins=True) is None
    store.hosts.leave(mine)
    assert claim(store).job_id == mine.job_id


def test_nothing_joins_a_spoilt_host_and_it_ends_with_its_last_job(store: Store) -> None:
    first = anchored(store)
    queue(store)
    second = claim(store)
    queue(store)
    for why in ("job 2 ended there with disk_full", "another reason"):
        store.hosts.spoil("h1", NODE, why)
    assert store.attempts.claim(NODE, joins=True) is None
    (row,) = store.hosts.of_card(NODE)
    assert row.spoilt == "job 2 ended there with disk_full", "the first reason stays"
    end(store, first)
    assert store.attempts.claim(NODE, joins=True) is None and taken(store) == 8
    end(store, second)
    store.hosts.forget(["h1"])
    assert not claim(store).joins


def test_the_end_of_a_host_frees_what_was_held_in_it(store: Store) -> None:
    first = anchored(store)
    store.jobs.cancel(first.job_id, "ada")
    store.attempts.finish(first, Reason.CANCELLED, "cancelled", Progress(), inside=True)
    store.hosts.forget(["h1"])
    assert taken(store) == 0 and not store.attempts.of_job(first.job_id)[0].inside
    anchored(store)
    store.cards.arrive(node_state(NODE, total=24 * GIB, max_jobs=1))
    assert taken(store) == 0 and not any(attempt.inside for attempt in store.attempts.of_job(first.job_id + 1))


def test_a_lost_member_is_inside_until_its_node_says_otherwise(store: Store) -> None:
    first = anchored(store)
    store.attempts.give_back(NODE)
    assert taken(store) == 8
    store.hosts.leave(first)
    assert taken(store) == 0


@pytest.mark.parametrize("gone", ["another box has the name", "its process has ended"])
def test_nobody_is_inside_a_host_that_was_forgotten_before_the_lease_ended(
    timed: Store, clock: Clock, gone: str
) -> None:
    first = anchored(timed, user="ada")
    queue(timed)
    mine = claim(timed)
    if gone == "another box has the name":
        clock.forward(NODE_STALE_S + 1)
        timed.cards.arrive(node_state(NODE, instance="another home", machine="another", boot="its own"))
    else:
        timed.hosts.forget(["h1"])
    clock.forward(LEASE_S + 1)
    assert sorted(job_id for job_id, _ in timed.attempts.reap()) == [first.job_id, mine.job_id]
    attempts = [attempt for one in (first, mine) for attempt in timed.attempts.of_job(one.job_id)]
    assert len(attempts) == 2 and not any(attempt.inside for attempt in attempts)
    assert taken(timed) == 0


def test_a_job_whose_host_was_lost_is_tried_alone(store: Store) -> None:
    first = anchored(store)
    queue(store)
    mine = claim(store)
    assert store.attempts.finish(mine, Reason.HOST_LOST, "its trainer ended", Progress()) is Status.QUEUED
    assert store.attempts.claim(NODE, joins=True) is None
    end(store, first)
    again = claim(store)
    assert (again.job_id, again.host, again.packs) == (mine.job_id, None, False)


@pytest.mark.parametrize("keys", [{"resources": {"exclusive": True}}, {"labels": {"reproduces": "7"}}])
def test_a_job_of_its_own_neither_joins_nor_is_joined(store: Store, keys: dict[str, Any]) -> None:
    first = anchored(store)
    queue(store, **keys)
    assert store.attempts.claim(NODE, joins=True) is None
    end(store, first)
    assert not claim(store).packs


def test_a_member_s_time_limit_is_kept_and_its_end_is_promised_once(timed: Store, clock: Clock) -> None:
    store = timed
    first = anchored(store, resources={"time_limit": "1h"})
    queue(store)
    assert store.attempts.claim(NODE, joins=True) is None, "how long it takes is not known yet"
    store.attempts.beat(first, Progress(step=5, total_steps=100, eta_seconds=3000))
    assert store.attempts.claim(NODE, joins=True) is None, "slower, it would exceed its limit"
    store.attempts.beat(first, Progress(eta_seconds=2000))
    claim(store)
    promised = store.attempts.of_job(first.job_id)[0].promised_at
    assert promised is not None and (promised - clock.now).total_seconds() == 2000
    clock.forward(5)
    show(store)
    store.attempts.beat(first, Progress(eta_seconds=2400))
    queue(store)
    claim(store)
    assert store.attempts.of_job(first.job_id)[0].promised_at == promised


def test_measured_passes_decide(store: Store) -> None:
    anchored(store)
    queue(store)
    store.hosts.note_passes("h1", [MeasuredPass(tokens=8 * n, members=n, seconds=0.1 * n) for n in (1, 2, 3, 4) * 9])
    assert store.attempts.claim(NODE, joins=True) is None, "a pass takes as long as its members one by one"


def test_a_job_waits_for_a_card_that_is_about_to_be_idle_where_it_ends_sooner_there(store: Store) -> None:
    steps = {"training": {"per_device_train_batch_size": 1, "max_steps": 1000, "gradient_accumulation_steps": 1}}
    first = anchored(store, **steps)
    store.cards.see(node_state("box:1", total=24 * GIB, max_jobs=1))
    queue(store, base_model="org/b")
    other = store.attempts.claim("box:1", joins=True)
    assert isinstance(other, Claim)
    for one, seconds in ((first, 900), (other, 10)):
        store.attempts.beat(one, Progress(step=5, total_steps=1000, eta_seconds=seconds))
    store.hosts.note_passes(
        "h1", [MeasuredPass(tokens=8 * n, members=n, seconds=0.55 + 0.45 * n) for n in (1, 2, 3, 4) * 9]
    )
    mine = queue(store, **steps)
    assert store.attempts.claim(NODE, joins=True) is None, "1450 s beside the other, 1010 s on its own"
    view = store.cards.fleet()
    assert explain(store.jobs.get(mine), view).sentence == f"box:1 when job {other.job_id} ends"
    assert view.refused_joins[mine, NODE].why == "it would end sooner on box:1, once that is free"
    store.attempts.beat(other, Progress(step=5, total_steps=1000, eta_seconds=900))
    assert claim(store).joins


def test_nobody_gives_way_to_a_job_that_could_join_and_waits_for_a_better_card(store: Store) -> None:
    steps = {"training": {"per_device_train_batch_size": 1, "max_steps": 1000, "gradient_accumulation_steps": 1}}
    first = anchored(store, **steps)
    store.cards.see(node_state("box:1", total=24 * GIB, max_jobs=1))
    queue(store, base_model="org/b", preemptible=True)
    other = store.attempts.claim("box:1", joins=True)
    assert isinstance(other, Claim)
    for one, seconds in ((first, 900), (other, 10)):
        store.attempts.beat(one, Progress(step=5, total_steps=1000, eta_seconds=seconds))
    store.hosts.note_passes(
        "h1", [MeasuredPass(tokens=8 * n, members=n, seconds=0.55 + 0.45 * n) for n in (1, 2, 3, 4) * 9]
    )
    queue(store, **steps, priority=5)
    assert store.attempts.claim(NODE, joins=True) is None
    assert store.cards.preempt() == ()


def test_what_was_measured_of_a_pack_is_said_of_no_one_s_rows_where_these_differ(store: Store) -> None:
    anchored(store)
    queue(store, dataset={"path": "org/long", "max_length": 16})
    claim(store)
    store.hosts.note_passes("h1", [MeasuredPass(tokens=24, members=2, seconds=0.1)])
    other = queue(store, dataset={"path": "org/long", "max_length": 1024})
    assert store.cards.newcomers(store.jobs.ready(10))[other].packed.tokens == 1024, "not 12, the mean"


def test_rows_that_are_cut_off_sooner_say_nothing_of_longer_ones(store: Store) -> None:
    anchored(store, dataset={"path": "org/data", "max_length": 64})
    store.hosts.note_passes("h1", [MeasuredPass(tokens=60, members=1, seconds=0.1)])
    longer = queue(store, dataset={"path": "org/data", "max_length": 512})
    alike = queue(store, dataset={"path": "org/data", "max_length": 64})
    found = store.cards.newcomers(store.jobs.ready(10))
    assert [found[job_id].packed.tokens for job_id in (longer, alike)] == [512, 60]


def test_the_base_is_charged_in_equal_shares(timed: Store, clock: Clock) -> None:
    store = timed
    first = anchored(store)
    clock.forward(3600)
    show(store)
    queue(store, user="bob")
    second = claim(store)
    assert store.cards.fleet().charges == pytest.approx({"ada": 3 + 2.5, "bob": 3 + 2.5})
    clock.forward(3600)
    end(store, second)
    end(store, first)
    assert store.cards.fleet().charges == pytest.approx({"ada": 2 * 3 + 5 + 2.5, "bob": 3 + 2.5})


def test_a_member_that_ran_out_of_memory_needs_more_than_its_whole_need(store: Store) -> None:
    anchored(store)
    queue(store)
    mine = claim(store)
    store.attempts.finish(mine, Reason.OUT_OF_MEMORY, "no room", Progress())
    assert (store.jobs.get(mine.job_id).vram_lora or 0) > 8 * GIB


@dataclass(kw_only=True, eq=False)
class Process:
    """A trainer as the model sees it. Bytes in GiB."""

    mark: str
    base: float
    spoilt: bool = False  # nothing joins it any more
    members: dict[int, tuple[Claim, float]] = field(default_factory=dict)  # by job: what it holds beside the base
    leaving: dict[int, tuple[Claim, float]] = field(default_factory=dict)  # ended, and not out yet

    @property
    def holds(self) -> float:
        return self.base + sum(size for _, size in (*self.members.values(), *self.leaving.values()))


class PackLedger(RuleBasedStateMachine):
    """One card: jobs come, join, end, are cut off and leave in any order. The model counts what processes hold."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store, self.processes, self.marks = store, list[Process](), 0
        with Session(store.engine) as session, session.begin():
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(delete(table))
        show(store, max_jobs=2)

    @rule(base=st.sampled_from(["a", "b"]), gib=st.sampled_from([6, 7, 9, 14]))
    def a_job_comes(self, base: str, gib: int) -> None:
        queue(self.store, gib, base_model=f"org/{base}")
        mine = self.store.attempts.claim(NODE, joins=True)
        if not isinstance(mine, Claim):
            return
        for mark in mine.leaving:
            (gone,) = (p for p in self.processes if p.mark == mark)
            assert not gone.members and not gone.leaving
            self.processes.remove(gone)
        self.store.hosts.forget(mine.leaving)
        reserved = (mine.vram_reserved or 0) / GIB
        process = next((p for p in self.processes if p.mark == mine.host), None)
        if process is None:
            self.marks += 1
            process = Process(mark=f"h{self.marks}", base=5)
            self.processes.append(process)
        assert mine.joins is bool(process.members) and not (mine.joins and process.spoilt)
        assert mine.job_id not in process.leaving
        process.members[mine.job_id] = mine, reserved if mine.joins else max(0.0, reserved - process.base)
        if not mine.joins and not process.leaving:
            opens(self.store, mine, process.base, process.mark)

    def pick(self, number: int) -> tuple[Process, int] | None:
        inside = [(p, job_id) for p in self.processes for job_id in p.members]
        return inside[number % len(inside)] if inside else None

    @rule(number=st.integers(0, 9), inside=st.booleans())
    def a_job_ends(self, number: int, inside: bool) -> None:
        if (picked := self.pick(number)) is None:
            return
        process, job_id = picked
        mine, held = process.members.pop(job_id)
        if inside:
            process.leaving[job_id] = mine, held
        self.store.jobs.cancel(job_id, "ada")
        assert (
            self.store.attempts.finish(mine, Reason.CANCELLED, "cancelled", Progress(), inside=inside)
            is Status.CANCELLED
        )

    @rule(number=st.integers(0, 9))
    def a_job_leaves(self, number: int) -> None:
        gone = [(p, job_id) for p in self.processes for job_id in p.leaving]
        if gone:
            process, job_id = gone[number % len(gone)]
            self.store.hosts.leave(process.leaving.pop(job_id)[0])

    @rule(number=st.integers(0, 9))
    def a_host_is_spoilt(self, number: int) -> None:
        busy = [p for p in self.processes if p.members]
        if busy:
            busy[number % len(busy)].spoilt = True
            self.store.hosts.spoil(busy[number % len(busy)].mark, NODE, "a file is open")

    @rule(number=st.integers(0, 9))
    def a_cancelled_job_is_tried_again(self, number: int) -> None:
        gone = [job_id for p in self.processes for job_id in p.leaving]
        if gone and self.store.jobs.get(gone[number % len(gone)]).status is Status.CANCELLED:
            self.store.jobs.retry(gone[number % len(gone)], "ada")

    @rule(number=st.integers(0, 9))
    def a_host_dies(self, number: int) -> None:
        if not self.processes:
            return
        process = self.processes.pop(number % len(self.processes))
        for mine, _ in process.members.values():
            self.store.attempts.finish(mine, Reason.HOST_LOST, "its trainer ended", Progress())
        self.store.hosts.forget([process.mark])

    @rule(number=st.integers(0, 9))
    def a_host_is_sent_off(self, number: int) -> None:
        if self.processes:
            process = self.processes[number % len(self.processes)]
            sent = self.store.hosts.send_off(process.mark, NODE)
            assert sent is not bool(process.members or process.leaving)
            if sent:
                self.processes.remove(process)
                self.store.hosts.forget([process.mark])

    @invariant()
    def the_card_is_never_over_its_size(self) -> None:
        assert sum(process.holds for process in self.processes) <= 24
        busy = [p for p in self.processes if p.members or p.leaving]
        card = self.store.cards.fleet().cards[NODE]
        assert card.taken / GIB == pytest.approx(sum(p.holds for p in busy)) and card.trainers == len(busy) <= 2


def test_no_order_of_joins_and_ends_brings_a_card_above_its_size(store: Store) -> None:
    share = 1 if store.engine.dialect.name == "sqlite" else 3
    chosen = settings(
        max_examples=EXAMPLES // share, stateful_step_count=20, deadline=None,
        suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 60,
    )  # fmt: skip
    run_state_machine_as_test(lambda: PackLedger(store), settings=chosen)
