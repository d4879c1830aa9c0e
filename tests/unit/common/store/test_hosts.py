"""Hosts in the ledger: bases that stay, are joined, go, and never hold more of a card than it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import delete
from sqlalchemy.orm import Session

from loractl.common.job.status import Reason, Status
from loractl.common.placement.hosts import base_key
from loractl.common.store.records import BoxIdentity, Claim, Left, NewHost, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Base
from loractl.common.units import GIB

from ...factories import EXAMPLES, RESULT, node_state, submission

NODE, TOTAL, MOST_JOBS = "box:0", 24, 4
PROGRESS = Progress()


def show(store: Store, total: float = TOTAL, **state: Any) -> None:
    store.cards.see(node_state(NODE, **{"total": int(total * GIB), "max_jobs": MOST_JOBS, **state}))


def queue(store: Store, base: str = "org/a", gib: float = 8, **keys: Any) -> int:
    return store.jobs.submit(submission(lora=gib, method="lora", base_model=base, **keys))


def claim(store: Store) -> Claim:
    taken = store.attempts.claim(NODE)
    assert isinstance(taken, Claim), taken
    return taken


def stays(store: Store, mine: Claim, mark: str, gib: float = 6) -> bool:
    key = base_key(mine.spec, mine.method)
    assert key is not None
    return store.hosts.keep(mine, NewHost(host=mark, node=NODE, key=key, bytes=int(gib * GIB)))


def end(store: Store, mine: Claim) -> None:
    assert store.attempts.finish(mine, Reason.OK, "done", PROGRESS, RESULT) is Status.SUCCEEDED


def warm(store: Store, mark: str = "h1", base: str = "org/a", gib: float = 6) -> None:
    """A host that waits on the card."""
    queue(store, base, gib)
    mine = claim(store)
    assert stays(store, mine, mark, gib)
    end(store, mine)


def test_the_next_job_on_a_base_joins_its_host_and_another_s_leaves_it_alone(store: Store) -> None:
    show(store)
    warm(store)
    queue(store, "org/b", 8)
    other = claim(store)
    assert (other.host, other.leaving) == (None, ())
    queue(store)
    mine = claim(store)
    assert (mine.host, mine.leaving) == ("h1", ())
    assert "where its base is already loaded" in store.jobs.events(mine.job_id)[-1].text
    (base,) = [b for b in store.cards.fleet().cards[NODE].hosts if b.host == "h1"]
    assert base.job_id == mine.job_id
    queue(store)
    assert claim(store).host is None, "it has a job"


def test_an_idle_base_is_room_and_goes_for_the_job_that_needs_it(store: Store) -> None:
    show(store)
    warm(store, gib=10)
    assert store.cards.fleet().cards[NODE].free == TOTAL * GIB
    queue(store, "org/b", 20)
    mine = claim(store)
    assert (mine.host, mine.leaving) == (None, ("h1",))
    assert [row.leaving for row in store.hosts.of_card(NODE)] == [True], (
        "its bytes are held until the node has seen its end"
    )
    store.hosts.forget(mine.leaving)
    assert not store.hosts.of_card(NODE)


def test_a_small_job_in_a_large_base_holds_the_base(store: Store) -> None:
    show(store)
    warm(store, gib=13)
    queue(store, gib=3)
    assert claim(store).host == "h1"
    assert store.cards.fleet().cards[NODE].free == 11 * GIB
    queue(store, "org/b", 13)
    assert store.attempts.claim(NODE) is None


def test_bases_stay_while_all_of_them_have_room(store: Store) -> None:
    show(store)
    warm(store, "large", gib=13)
    warm(store, "other", "org/b", gib=8)
    queue(store, "org/c", 3)
    assert claim(store).leaving == ()
    queue(store, gib=3)
    assert claim(store).leaving == ()
    queue(store, "org/b", 8)
    assert claim(store).host == "other"


def test_a_job_that_may_not_have_a_base_does_not_prefer_its_card(store: Store) -> None:
    """It sent the base off, though another card was idle that it would have filled better."""
    show(store)
    warm(store)
    store.cards.see(node_state("other:0", total=12 * GIB))
    for keys in ({"resources": {"exclusive": True}}, {"training": {"exact": True}}):
        job_id = queue(store, **keys)
        assert store.attempts.claim(NODE) == Left(nodes=frozenset({"other:0"}))
        store.jobs.cancel(job_id, "ada")
    queue(store)
    assert claim(store).host == "h1"


def test_an_exclusive_job_has_a_trainer_of_its_own(store: Store) -> None:
    show(store)
    warm(store)
    queue(store, resources={"exclusive": True})
    assert claim(store).host is None


def test_a_host_with_a_job_stays_and_one_without_goes_when_it_is_sent_off(store: Store) -> None:
    show(store)
    warm(store)
    queue(store)
    mine = claim(store)
    assert mine.host == "h1" and not store.hosts.send_off("h1", NODE)
    end(store, mine)
    assert store.hosts.send_off("h1", NODE)
    queue(store)
    assert claim(store).host is None, "nobody joins it any more"


def test_a_lost_lease_keeps_no_base_and_a_base_without_room_does_not_stay(store: Store) -> None:
    show(store)
    queue(store, gib=12)
    mine = claim(store)
    assert not stays(store, mine, "large", 25)
    assert store.attempts.give_back(NODE) == [mine.job_id]
    assert not stays(store, mine, "lost") and not store.hosts.of_card(NODE)


def test_a_node_that_starts_anew_or_goes_has_no_hosts(store: Store) -> None:
    show(store, instance="i", machine="m", boot="b")
    warm(store)
    store.cards.arrive(node_state(NODE, instance="i", machine="m", boot="b"))
    assert not store.hosts.of_card(NODE)
    warm(store, "h2")
    store.cards.forget(NODE, BoxIdentity(instance="i", machine="m", boot="b"))
    assert not store.hosts.of_card(NODE)


@dataclass(kw_only=True, eq=False)
class Trainer:
    """A process on the card, as the model sees it. Bytes in GiB."""

    claim: Claim
    holds: float = 0  # nothing before it has started
    base: float = 0  # that it has loaded
    mark: str | None = None  # it is known as a host
    working: bool = True
    going: bool = False


class Ledger(RuleBasedStateMachine):
    """One card: jobs come, join, stay, go and die in any order. The model counts what the processes hold."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store, self.trainers, self.marks = store, list[Trainer](), 0
        with Session(store.engine) as session, session.begin():
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(delete(table))
        show(store)

    @rule(base=st.sampled_from(["org/a", "org/b"]), gib=st.sampled_from([3, 8, 13, 22]))
    def a_job_comes(self, base: str, gib: int) -> None:
        queue(self.store, base, gib)
        self.claim()

    @rule()
    def claim(self) -> None:
        taken = self.store.attempts.claim(NODE)
        if not isinstance(taken, Claim):
            return
        for trainer in self.trainers:
            trainer.going |= trainer.mark in taken.leaving
            assert not (trainer.going and trainer.working), "a base with a job is sent off"
        own = next((t for t in self.trainers if taken.host is not None and t.mark == taken.host), None)
        if own is None:
            assert taken.host is None, "a host that has gone is joined"
            own = Trainer(claim=taken)
            self.trainers.append(own)
        assert not own.going and (own.mark is None or not own.working)
        assert own.claim.spec.base_model == taken.spec.base_model
        own.claim, own.working = taken, True
        self.starts(own)

    def starts(self, trainer: Trainer) -> None:
        """What the node does: nothing starts while a base is on its way out."""
        if not any(other.going for other in self.trainers):
            trainer.holds = max(trainer.claim.vram_reserved / GIB, trainer.base)  # type: ignore[operator]

    @rule(number=st.integers(0, 9))
    def a_trainer_starts(self, number: int) -> None:
        waiting = [t for t in self.trainers if t.working and not t.holds]
        if waiting:
            self.starts(waiting[number % len(waiting)])

    @rule(number=st.integers(0, 9), part=st.sampled_from([0.3, 1.0]), keeps=st.sampled_from([True, True, False]))
    def a_job_ends(self, number: int, part: float, keeps: bool) -> None:
        working = [t for t in self.trainers if t.working and t.holds]
        if not working:
            return
        trainer = working[number % len(working)]
        trainer.base = trainer.base or trainer.holds * part
        if keeps and trainer.mark is None:
            self.marks += 1
            trainer.mark = f"h{self.marks}"
        kept = keeps and stays(self.store, trainer.claim, trainer.mark or "", trainer.base)
        if not kept:
            self.trainers.remove(trainer)
            self.store.hosts.forget([trainer.mark or ""])
        end(self.store, trainer.claim)
        trainer.working, trainer.holds = False, trainer.base

    @rule(number=st.integers(0, 9), own=st.booleans())
    def a_host_is_seen_to_end(self, number: int, own: bool) -> None:
        """One that goes, or one that dies by itself."""
        hosts = [t for t in self.trainers if t.mark and not t.working and (t.going or own)]
        if hosts:
            host = hosts[number % len(hosts)]
            self.trainers.remove(host)
            self.store.hosts.forget([host.mark or ""])

    @rule(number=st.integers(0, 9))
    def no_job_came(self, number: int) -> None:
        hosts = [t for t in self.trainers if t.mark]
        if hosts:
            host = hosts[number % len(hosts)]
            sent = self.store.hosts.send_off(host.mark or "", NODE)
            assert sent is not host.working
            host.going |= sent

    @precondition(lambda self: any(t.working for t in self.trainers))
    @rule(chance=st.integers(0, 3))
    def the_node_starts_anew(self, chance: int) -> None:
        if chance:
            return
        self.trainers.clear()  # it ends all of the card's processes first
        self.store.cards.arrive(node_state(NODE, total=TOTAL * GIB, max_jobs=MOST_JOBS))

    @invariant()
    def the_card_is_never_over_its_size(self) -> None:
        assert sum(trainer.holds for trainer in self.trainers) <= TOTAL
        assert len([t for t in self.trainers if t.holds and not t.going]) <= MOST_JOBS

    @invariant()
    def the_rows_are_the_processes(self) -> None:
        rows = {row.host: row for row in self.store.hosts.of_card(NODE)}
        assert rows.keys() == {t.mark for t in self.trainers if t.mark}
        for trainer in self.trainers:
            if trainer.mark:
                assert rows[trainer.mark].leaving is trainer.going
                assert rows[trainer.mark].bytes == int(trainer.base * GIB)


def test_no_order_of_events_brings_a_card_above_its_size(store: Store) -> None:
    share = 1 if store.engine.dialect.name == "sqlite" else 3
    chosen = settings(
        max_examples=EXAMPLES // share,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=EXAMPLES <= 60,
    )
    run_state_machine_as_test(lambda: Ledger(store), settings=chosen)
