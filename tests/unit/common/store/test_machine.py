"""Any order of submits, claims, heartbeats, ends, wishes and clock jumps keeps the store's promises, on each database.

1. A number that submit returned is never lost: the job is always readable, in a legal state, and can come to an end.
2. At most one attempt publishes a result; every write names its token, and a stale one is refused and writes nothing.
3. A finished job never changes, and a cancel that was acknowledged never runs again, unless a person retries the job.

STORE_EXAMPLES=2000 pytest tests/unit/common/store/test_machine.py is the longest run.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, delete, event
from sqlalchemy.orm import Session

from loractl.common.errors import WrongState
from loractl.common.job.status import TRANSITIONS, Reason, Stage, Status
from loractl.common.store.records import Claim, Progress, StoredCheckpoint, StoredResult
from loractl.common.store.store import Store
from loractl.common.store.tables import Base, Job
from loractl.common.units import GIB

from ...factories import EXAMPLES, NOON, RESULT, Clock, node_state, submission

pytestmark = pytest.mark.both

machine = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES <= 60,  # the short run must not fail by chance; the long one looks for something new
    print_blob=True,
)

# Written down again, not taken from the code: the model must be able to disagree with it.
LEASE_S, HELD_AFTER, CARD_PAUSE_S = 60, 3, 10
OF_BOX = frozenset({Reason.DISK_FULL, Reason.STORE_FAILED, Reason.BASE_MISSING})
FAILS = OF_BOX | {Reason.WORKER_LOST, Reason.KILLED, Reason.GPU_ERROR}
LAB = FAILS | {Reason.DRAINED, Reason.PREEMPTED, Reason.HOST_LOST}
COUNTED = frozenset(
    {
        Reason.HOST_OUT_OF_MEMORY, Reason.EVALUATION_FAILED, Reason.TRAINER_ERROR,
    }
)  # fmt: skip
KEEP = COUNTED | {Reason.OUT_OF_MEMORY, Reason.TIMED_OUT}  # a job that failed so keeps its checkpoint
ENDED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)

MOST_JOBS = 4  # few jobs meet more of what can happen to a job
SMALL, LARGE, CARD = 4, 9, 10 * GIB  # GiB, GiB, bytes
NODES = ("heron:0", "owl:0")
ENDS = (Reason.OK, Reason.OK, Reason.DRAINED, Reason.TRAINER_ERROR, *Reason)
PAUSES = (0, 59, 61)  # seconds; before and after the end of a lease
RESCUE = "rescue:0"


@dataclass(kw_only=True, eq=False)
class Run:
    """An attempt as its holder knows it."""

    claim: Claim
    ended: Reason | None = None
    result: StoredResult | None = None


@dataclass(kw_only=True, eq=False)
class Known:
    """What a job must be, by everything that was answered so far."""

    job_id: int
    max_retries: int
    preemptible: bool
    status: Status = Status.QUEUED
    runs: list[Run] = field(default_factory=list)
    holder: Run | None = None
    node: str | None = None
    lease: dt.datetime = NOON
    not_before: dt.datetime | None = None
    held: bool = False
    cancel_asked: bool = False
    gives_way: Known | None = None  # to this job, while that one waits
    checkpoint: StoredCheckpoint | None = None
    retries: int = 0
    failures: int = 0  # of the lab's, in a row without a further checkpoint
    reached: int | None = None  # the checkpoint at the last of them
    boxes: dict[str, Reason] = field(default_factory=dict)  # why each box failed it last
    published: Run | None = None
    final: dict[str, Any] | None = None  # the row of a job that has ended
    after: list[Known] = field(default_factory=list)
    any_end: bool = False
    awaits: Known | None = None
    has_ended: bool = False  # ever
    has_succeeded: bool = False

    def become(self, status: Status) -> None:
        assert status is self.status or status in TRANSITIONS[self.status]
        self.status = status

    def is_over(self, any_end: bool) -> bool:
        return self.status in ENDED if any_end else self.status is Status.SUCCEEDED

    def go_on(self) -> None:
        """To the next job of its list that is not over, if the one that it waits for is."""
        if self.status is Status.QUEUED and self.awaits is not None and self.awaits.is_over(self.any_end):
            left = self.after[self.after.index(self.awaits) + 1 :]
            self.awaits = next((job for job in left if not job.is_over(self.any_end)), None)

    def start(self, claim: Claim, node: str, now: dt.datetime) -> Run:
        self.holder = Run(claim=claim)
        self.runs.append(self.holder)
        self.become(Status.RUNNING)
        self.node, self.lease = node, now + dt.timedelta(seconds=LEASE_S)
        return self.holder

    def end(self, reason: Reason, now: dt.datetime, told: Status | None = None) -> None:
        """The attempt ends. `told`: the store's answer where this model has no opinion (out of memory)."""
        assert self.holder is not None
        self.holder.ended, self.holder, self.gives_way, self.not_before = reason, None, None, None
        if reason is Reason.OK:
            self.become(Status.SUCCEEDED)
        elif self.cancel_asked or reason in (Reason.CANCELLED, Reason.PRUNED):
            self.become(Status.CANCELLED)
        elif reason in LAB:
            self.become(Status.QUEUED)
            if reason in FAILS:
                self.fail_by_the_lab(reason)
                if reason is not Reason.WORKER_LOST and not self.held:
                    self.not_before = now + dt.timedelta(seconds=CARD_PAUSE_S)
        elif reason in COUNTED and self.retries < self.max_retries:
            self.become(Status.QUEUED)
            self.failures = 0
            self.retries += 1
            self.not_before = now + dt.timedelta(seconds=min(600, 10 * 2 ** (self.retries - 1)))
        elif reason is Reason.OUT_OF_MEMORY:
            assert told in (None, Status.QUEUED, Status.FAILED)
            self.become(told or Status.QUEUED)
        else:
            self.become(Status.FAILED)
        if self.status in ENDED and (self.status is not Status.FAILED or reason not in KEEP):
            self.checkpoint = None

    def fail_by_the_lab(self, reason: Reason) -> None:
        assert self.node is not None
        box = self.node.rpartition(":")[0]
        before = self.boxes.get(box)
        if reason in OF_BOX:
            self.boxes[box] = reason
        if reason is Reason.BASE_MISSING and before is not reason:
            return
        step = self.checkpoint.step if self.checkpoint else 0
        self.failures = 1 if self.reached is not None and step > self.reached else self.failures + 1
        self.reached = step
        self.held = self.failures >= HELD_AFTER

    @property
    def waits(self) -> bool:
        """For nothing but a card, or the end of a pause."""
        return self.status is Status.QUEUED and not self.held and self.awaits is None

    def may_start(self, now: dt.datetime) -> bool:
        waits = self.not_before is not None and self.not_before > now
        free = not self.held and not self.cancel_asked and not waits and self.awaits is None
        behind = all(job.has_succeeded or (self.any_end and job.has_ended) for job in self.after)
        assert behind or not free, "the model itself lets a job go before those that it starts after"
        return self.status is Status.QUEUED and free


class Life(RuleBasedStateMachine):
    """Several jobs, two nodes and their persons, in any order; `known` is the independent model."""

    jobs: Bundle[Known] = Bundle("jobs")
    runs: Bundle[Run] = Bundle("runs")

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__()
        self.store, self.clock = store, clock
        clock.now = NOON
        self.known: dict[int, Known] = {}
        self.numbers = itertools.count(1)
        with Session(store.engine) as session, session.begin():
            for table in reversed(Base.metadata.sorted_tables):
                if table.name != "lab_settings":  # it is open
                    session.execute(delete(table))

    # --- what a person does ---

    @initialize(target=jobs)
    def a_first_job(self) -> Known:
        return self.submit(SMALL, priority=0, preemptible=True, max_retries=1)

    @initialize(target=runs)
    def a_first_run(self) -> Any:
        self.submit(SMALL, priority=5, preemptible=True, max_retries=1)
        return self.take("heron:0", CARD)

    @precondition(lambda self: len(self.known) < MOST_JOBS)
    @rule(
        target=jobs,
        size=st.sampled_from([SMALL, SMALL, LARGE]),
        priority=st.sampled_from([0, 0, 5]),
        preemptible=st.booleans(),
        max_retries=st.integers(0, 1),
        roomy=st.sampled_from([None, {4: LARGE}]),
        after=st.sets(st.integers(0, MOST_JOBS - 1), max_size=2),
        any_end=st.booleans(),
    )
    def submit(
        self,
        size: int,
        priority: int,
        preemptible: bool,
        max_retries: int,
        roomy: dict[int, float] | None = None,
        after: Collection[int] = (),
        any_end: bool = False,
    ) -> Known:
        """`roomy`: it may have as much as a large job needs, where nobody else wants that. `after`: by their places."""
        earlier = [job for place, job in enumerate(self.known.values()) if place in after]
        wanted = submission(
            lora=size, method="lora", priority=priority, preemptible=preemptible, max_retries=max_retries, roomy=roomy,
            after=[job.job_id for job in earlier], after_any=any_end,
        )  # fmt: skip
        job_id = self.store.jobs.submit(wanted)
        assert all(job_id > other for other in self.known), "a number is never given twice"
        job = Known(job_id=job_id, max_retries=max_retries, preemptible=preemptible, after=earlier, any_end=any_end)
        job.awaits = next((one for one in earlier if not one.is_over(any_end)), None)
        self.known[job_id] = job
        return job

    @rule(job=jobs, wish=st.sampled_from(["cancel", "hold", "release", "retry", "retry", "gc_forgets_the_checkpoint"]))
    def a_person_wishes(self, job: Known, wish: str) -> None:
        getattr(self, wish)(job)

    def cancel(self, job: Known) -> None:
        if job.status in ENDED:
            assert refused(self.store.jobs.cancel, job.job_id)
            return
        row = self.store.jobs.cancel(job.job_id, "bob")
        if job.status is Status.QUEUED:
            job.become(Status.CANCELLED)
            job.held, job.has_ended = False, True
        else:
            job.cancel_asked = True
        assert row.status is job.status

    def hold(self, job: Known) -> None:
        if job.status is not Status.QUEUED:
            assert refused(self.store.jobs.hold, job.job_id)
            return
        assert self.store.jobs.hold(job.job_id, "bob").held
        job.held = True

    def retry(self, job: Known) -> None:
        self._again(job, self.store.jobs.retry, job.status in (Status.FAILED, Status.CANCELLED))

    def release(self, job: Known) -> None:
        self._again(job, self.store.jobs.release, job.status is Status.QUEUED and job.held)

    def again(self, job: Known) -> None:
        (self.release if job.held else self.retry)(job)

    def _again(self, job: Known, ask: Any, may: bool) -> None:
        if not may:
            assert refused(ask, job.job_id)
            return
        assert ask(job.job_id, "bob").status is Status.QUEUED
        job.become(Status.QUEUED)
        job.held, job.cancel_asked, job.not_before = False, False, None
        job.retries, job.failures, job.reached, job.final, job.boxes = 0, 0, None, None, {}

    def gc_forgets_the_checkpoint(self, job: Known) -> None:
        assert (self.store.results.forget_checkpoint(job.job_id) is not None) is (job.status in ENDED)
        if job.status in ENDED:
            job.checkpoint = None
            if job.final is not None:
                job.final["checkpoint"] = None

    # --- what a node does ---

    @precondition(lambda self: self.some(Status.QUEUED))
    @rule(target=runs, node=st.sampled_from(NODES))
    def claim(self, node: str) -> Any:
        taken = self.take(node, CARD)
        return multiple() if taken is None else taken

    @rule(run=runs, now=st.booleans(), after=st.sampled_from(PAUSES), keeps=st.booleans())
    def writes(self, run: Run, now: bool, after: int, keeps: bool) -> None:
        run = self.of(run).holder or run if now else run
        self.clock.forward(after)
        if keeps:
            self.keep_checkpoint(run)
        self.beat(run)

    def beat(self, run: Run) -> None:
        job, number = self.of(run), next(self.numbers)
        answer = self.store.attempts.beat(run.claim, told(number))
        mine = job.holder is run
        assert answer.accepted is mine
        if mine:
            job.lease = self.clock.now + dt.timedelta(seconds=LEASE_S)
            assert answer.cancel_requested is job.cancel_asked
            assert answer.preempted_by == (job.gives_way.job_id if job.gives_way and job.gives_way.waits else None)
        self.written(job, number, mine)

    @rule(run=runs, now=st.booleans(), reason=st.sampled_from(ENDS), retried=st.booleans())
    def ends(self, run: Run, now: bool, reason: Reason, retried: bool) -> None:
        """Also given back, for the second time after a lost answer, and by a worker that was frozen meanwhile."""
        self.finish(self.of(run).holder or run if now else run, reason)
        if retried:
            self.again(self.of(run))

    def finish(self, run: Run, reason: Reason) -> None:
        job, number, mine = self.of(run), next(self.numbers), self.of(run).holder is run
        result = None
        if reason is Reason.OK:
            uri = f"file:///lab/jobs/{job.job_id}/attempt-{run.claim.attempt}/{number}"
            result = replace(RESULT, adapter_uri=uri, report_uri=f"{uri}.json")
        before = job.status
        answer = self.store.attempts.finish(run.claim, reason, f"because of {reason.value}", told(number), result)
        self.written(job, number, mine)
        if mine:
            job.end(reason, self.clock.now, answer)
            self.let_go(job)
            if result is not None:
                assert job.published is None, "a second attempt published"
                run.result, job.published = result, run
            assert answer is job.status
        else:
            assert answer is (before if run.ended is reason else None)

    def let_go(self, ended: Known) -> None:
        """An attempt's end lets go who waits for its job."""
        ended.has_ended |= ended.status in ENDED
        ended.has_succeeded |= ended.status is Status.SUCCEEDED
        for job in self.known.values():
            if ended.status in ENDED and job.awaits is ended:
                job.go_on()

    @rule()
    def the_fleet_goes_round(self) -> None:
        assert self.store.cards.take_turn(0.0, 0.0) is not None
        for job in self.known.values():
            job.go_on()

    def keep_checkpoint(self, run: Run) -> None:
        job, step = self.of(run), next(self.numbers)
        kept = StoredCheckpoint(step=step, prefix=f"jobs/{job.job_id}/checkpoints/{run.claim.attempt}-{step}")
        mine = job.holder is run
        assert self.store.attempts.keep_checkpoint(run.claim, kept) is mine
        if mine:
            job.checkpoint = kept

    @precondition(lambda self: self.some(Status.RUNNING))
    @rule(after=st.sampled_from(PAUSES))
    def reap(self, after: int) -> None:
        self.clock.forward(after)
        over = [j for j in self.known.values() if j.status is Status.RUNNING and j.lease < self.clock.now]
        waits_again = [job_id for job_id, _ in self.store.attempts.reap()]
        for job in over:
            job.end(Reason.WORKER_LOST, self.clock.now)
            self.let_go(job)
        assert sorted(waits_again) == [j.job_id for j in over if j.status is Status.QUEUED and not j.held]

    @precondition(lambda self: self.some(Status.RUNNING))
    @rule(node=st.sampled_from(NODES))
    def give_back(self, node: str) -> None:
        """A node starts anew: what its predecessor ran is lost."""
        left = [j for j in self.known.values() if j.status is Status.RUNNING and j.node == node]
        assert sorted(self.store.cards.arrive(node_state(node)).given_back) == [j.job_id for j in left]
        for job in left:
            job.end(Reason.WORKER_LOST, self.clock.now)
            self.let_go(job)

    @precondition(lambda self: self.some(Status.QUEUED))
    @rule(target=runs, node=st.sampled_from(NODES), times=st.integers(1, 3), silent=st.booleans())
    def workers_are_lost(self, node: str, times: int, silent: bool) -> Any:
        """They are frozen, and may come back."""
        lost = []
        while len(lost) < times and (run := self.take(node, CARD)) is not None:
            lost.append(run)
            if silent:
                self.reap(LEASE_S + 1)
            else:
                self.finish(run, Reason.WORKER_LOST)
        return multiple(*lost)

    @rule(run=runs, reason=st.sampled_from(ENDS), retried=st.booleans())
    def is_cancelled_and_ends(self, run: Run, reason: Reason, retried: bool) -> None:
        self.cancel(self.of(run))
        self.finish(self.of(run).holder or run, reason)
        if retried:
            self.again(self.of(run))

    @precondition(lambda self: self.some(Status.RUNNING))
    @rule(target=jobs, urgent=st.booleans())
    def preempt(self, urgent: bool) -> Any:
        """Also for a job that comes at this moment and needs nearly a whole card."""
        new = (
            [self.submit(LARGE, priority=9, preemptible=False, max_retries=0)]
            if urgent and len(self.known) < MOST_JOBS
            else []
        )
        asked = [j for j in self.known.values() if j.gives_way]
        stopped = self.store.cards.preempt()
        for job in asked:
            assert job.gives_way is not None
            if not job.gives_way.waits:
                job.gives_way = None  # taken back: it would help nobody any more
        asked = [j for j in asked if j.gives_way]
        for job_id in stopped:
            job, row = self.known[job_id], self.store.jobs.get(job_id)
            assert job.status is Status.RUNNING and job.preemptible and not asked
            assert row.preempted_by is not None
            job.gives_way = self.known[row.preempted_by]
            assert job.gives_way.waits
        return multiple(*new)

    @rule(seconds=st.sampled_from([1, 11, 59, 61, 700, 4000, -1, -61, -4000]))
    def the_clock_moves(self, seconds: int) -> None:
        self.clock.forward(seconds)

    # --- what always holds ---

    @invariant()
    def every_job_is_what_it_must_be(self) -> None:
        rows = {row.job_id: row for row in self.store.jobs.matching()}
        assert rows.keys() == self.known.keys(), "a number that submit returned is never lost"
        for node in NODES:
            here = [row.vram_reserved or 0 for row in rows.values() if row.node == node]
            assert sum(here) <= CARD, "jobs hold more than their card has"
        published = {a.job_id: (a.attempt, a.uri) for a in self.store.adapters.all()}
        for job in self.known.values():
            row = rows[job.job_id]
            assert row.status is job.status
            assert row.cancel_requested is (job.cancel_asked and row.status is Status.RUNNING)
            assert (row.held, row.awaits) == (job.held, job.awaits and job.awaits.job_id)
            assert row.token == (job.holder.claim.token if job.holder else None)
            assert row.lease_expires_at == (job.lease if job.holder else None)
            assert row.not_before == job.not_before
            assert (row.attempt, row.retries_used) == (len(job.runs), job.retries)
            assert (row.ended_at is not None) is (job.status in ENDED)
            assert row.preempted_by == (job.gives_way and job.gives_way.job_id)
            assert row.checkpoint == (vars(job.checkpoint) if job.checkpoint else None)
            result = job.published and job.published.result
            assert (result is not None) is (job.status is Status.SUCCEEDED)
            assert row.adapter_uri == (result.adapter_uri if result else None)
            if job.published is not None and result is not None:
                assert published.pop(job.job_id) == (job.published.claim.attempt, result.adapter_uri)
            if job.status in ENDED:
                seen = columns(row)
                assert job.final is None or seen == job.final, "an ended job has changed"
                job.final = seen
        assert not published, "an adapter is listed that no attempt published"

    def its_history_is_whole(self, job: Known) -> None:
        """Every attempt has its row, with the reason why it ended; the one that holds the job is the last and open."""
        rows = self.store.attempts.of_job(job.job_id)
        assert [(r.attempt, r.token, r.reason) for r in rows] == [
            (n, run.claim.token, run.ended) for n, run in enumerate(job.runs, 1)
        ]
        assert [r.ended_at is None for r in rows] == [run is job.holder for run in job.runs]

    def teardown(self) -> None:
        """After any events, every job that was not cancelled still comes to an end."""
        for job in self.known.values():
            if job.holder is not None:
                self.finish(job.holder, Reason.OK)
            if job.status is Status.QUEUED and job.held:
                self.release(job)
        for job in reversed(self.known.values()):  # what nobody waits for may stay failed or cancelled
            blocked = [other for other in self.known.values() if other.awaits and other.status is Status.QUEUED]
            if any(job in other.after for other in blocked) and job.status in (Status.FAILED, Status.CANCELLED):
                self.retry(job)
        self.clock.forward(100_000)
        waiting = [job for job in self.known.values() if job.status is Status.QUEUED]
        for _ in waiting:
            self.the_fleet_goes_round()
            run = self.take(RESCUE, 1000 * GIB)
            assert run is not None, f"nobody can claim {[job.job_id for job in waiting]}"
            self.finish(run, Reason.OK)
        assert all(job.status in ENDED for job in self.known.values())
        self.every_job_is_what_it_must_be()
        for job in self.known.values():
            self.its_history_is_whole(job)

    def take(self, node: str, total: int) -> Run | None:
        self.store.cards.see(node_state(node, total=total, max_jobs=64))
        claim = self.store.attempts.claim(node)
        if not isinstance(claim, Claim):
            return None
        job = self.known[claim.job_id]
        assert job.may_start(self.clock.now), f"job {job.job_id} is {job.status.value} and was started"
        assert claim.attempt == len(job.runs) + 1
        assert claim.checkpoint == job.checkpoint
        assert claim.token not in {run.claim.token for other in self.known.values() for run in other.runs}
        job.not_before = None
        return job.start(claim, node, self.clock.now)

    def some(self, status: Status) -> bool:
        return any(job.status is status for job in self.known.values())

    def of(self, run: Run) -> Known:
        return self.known[run.claim.job_id]

    def written(self, job: Known, number: int, mine: bool) -> None:
        """What an attempt tells is in the database exactly when the job is its own."""
        steps = {point.step for point in self.store.jobs.metrics(job.job_id, "loss")}
        assert (number in steps) is mine


@pytest.mark.timeout(3600)  # an order that breaks one is shortened for five minutes, and is not told if cut off there
def test_no_order_of_events_breaks_a_promise(timed: Store, clock: Clock) -> None:
    _without_waiting_for_the_disk(timed.engine)
    share = 1 if timed.engine.dialect.name == "sqlite" else 2  # PostgreSQL takes twice the time
    chosen = settings(machine, max_examples=EXAMPLES // share)
    run_state_machine_as_test(lambda: Life(timed, clock), settings=chosen)


def test_the_model_has_an_opinion_on_every_reason() -> None:
    final = {Reason.BAD_SPEC, Reason.BAD_DATA, Reason.MODEL_NOT_FOUND, Reason.TIMED_OUT}
    final |= {Reason.DIVERGED, Reason.NOT_TRAINED}
    own = {Reason.OK, Reason.CANCELLED, Reason.PRUNED, Reason.OUT_OF_MEMORY}
    assert LAB | COUNTED | final | own == set(Reason)
    assert all(not TRANSITIONS[status] & {Status.RUNNING, Status.SUCCEEDED} for status in ENDED)


def _without_waiting_for_the_disk(engine: Engine) -> None:
    """No power fails in this test, and a disk that others use makes it ten times as long."""
    engine.dispose()  # connections that were made without
    hasty = "PRAGMA synchronous=OFF" if engine.dialect.name == "sqlite" else "SET synchronous_commit=off"

    @event.listens_for(engine, "connect")
    def be_hasty(connection: Any, _: Any) -> None:
        connection.execute(hasty)
        connection.commit()


def told(number: int) -> Progress:
    return Progress(stage=Stage.TRAINING, step=number, loss=1.0, metrics=((number, "loss", 1.0),), log=f"{number}\n")


def refused(verb: Any, job_id: int) -> bool:
    try:
        verb(job_id, "bob")
    except WrongState:
        return True
    return False


def columns(row: Job) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if not name.startswith("_")}
