"""The queue in the database: who claims what, and what a claim's holder may write."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from loractl.common.errors import JobNotFound
from loractl.common.job.method import Method
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.settings import LEASE_S
from loractl.common.store.queries.cards.shares import lock
from loractl.common.store.records import Choice, Claim, Left, Page, Progress, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.change.amendment import amendment

from ....waiting import until_blocked
from ...factories import NOON, PLENTY, RESULT, Clock, node_state, submission, take

NOTHING = Progress()


def claim(store: Store, free: int = PLENTY, node: str = "box:0") -> Claim:
    taken = take(store, free, node)
    assert isinstance(taken, Claim)
    return taken


@pytest.mark.both
def test_a_job_goes_from_the_queue_to_a_stored_adapter(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission(lora=4, qlora=2, labels={"team": "nlp"}, priority=3))
    queued = timed.jobs.get(job_id)
    assert (queued.status, queued.submitted_at, queued.labels) == (Status.QUEUED, NOON, {"team": "nlp"})

    clock.forward(5)
    mine = claim(timed)
    running = timed.jobs.get(job_id)
    assert (mine.job_id, mine.attempt, mine.method, mine.vram_planned) == (job_id, 1, Method.LORA, 4 * GIB)
    assert mine.spec == submission(lora=4, qlora=2, labels={"team": "nlp"}, priority=3).spec
    assert (running.status, running.stage, running.node) == (Status.RUNNING, Stage.PREPARING, "box:0")
    assert running.lease_expires_at == clock.now + dt.timedelta(seconds=LEASE_S)

    clock.forward(30)
    progress = Progress(stage=Stage.TRAINING, step=3, total_steps=6, loss=1.5, vram_peak=GIB, resumed_from_step=2)
    beat = timed.attempts.beat(mine, progress)
    assert (beat.accepted, beat.cancel_requested) == (True, False)
    assert timed.jobs.get(job_id).lease_expires_at == clock.now + dt.timedelta(seconds=LEASE_S)

    clock.forward(5)
    assert timed.attempts.finish(mine, Reason.OK, "done", NOTHING, RESULT) is Status.SUCCEEDED
    ended = timed.jobs.get(job_id)
    assert (ended.status, ended.reason, ended.message, ended.ended_at) == (
        Status.SUCCEEDED,
        Reason.OK,
        "done",
        clock.now,
    )
    assert (ended.step, ended.loss, ended.token, ended.lease_expires_at) == (3, 1.5, None, None)
    (adapter,) = timed.adapters.all()
    assert (adapter.job_id, adapter.uri, adapter.sha256, adapter.method) == (
        job_id,
        RESULT.adapter_uri,
        "a" * 64,
        "lora",
    )
    (attempt,) = timed.attempts.of_job(job_id)
    assert (attempt.reason, attempt.vram_peak, attempt.resumed_from_step) == (Reason.OK, GIB, 2)
    assert (attempt.started_at, attempt.ended_at) == (NOON + dt.timedelta(seconds=5), clock.now)
    assert [event.kind for event in timed.jobs.events(job_id)] == ["queued", "started", "succeeded"]


@pytest.mark.parametrize(
    ("wanted", "free", "max_vram", "method"),
    [
        ("auto", 20, None, Method.LORA),
        ("auto", 19, None, Method.QLORA),
        ("auto", 40, "15GiB", Method.QLORA),
        ("qlora", 40, None, Method.QLORA),
        ("lora", 20, None, Method.LORA),
    ],
)
def test_the_method_is_chosen_by_the_memory_that_is_free(
    store: Store, wanted: str, free: int, max_vram: str | None, method: Method
) -> None:
    store.jobs.submit(submission(lora=20, qlora=10, method=wanted, resources={"max_vram": max_vram}))
    mine = claim(store, free * GIB)
    assert mine.method is method
    assert mine.vram_planned == (20 if method is Method.LORA else 10) * GIB


def test_a_plan_for_a_gpu_is_not_noted_for_a_cpu(store: Store) -> None:
    job_id = store.jobs.submit(submission(lora=4, qlora=2))
    taken = take(store, kind="cpu")
    assert isinstance(taken, Claim)
    assert taken.vram_planned is None
    assert store.attempts.of_job(job_id)[0].vram_planned is None


@pytest.mark.both
def test_a_heartbeat_without_a_value_leaves_what_the_row_holds(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    store.attempts.beat(mine, Progress(stage=Stage.TRAINING, step=2, total_steps=8, loss=2.5, eta_seconds=60))
    store.attempts.beat(mine, Progress(step=3))
    row = store.jobs.get(job_id)
    assert (row.stage, row.step, row.total_steps, row.loss, row.eta_seconds) == (Stage.TRAINING, 3, 8, 2.5, 60)


def test_logs_metrics_and_events_are_written_in_order_and_a_repeated_point_once(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    store.attempts.beat(
        mine, Progress(metrics=((2, "loss", 2.0), (1, "loss", 3.0)), log="one\n", events=(("model", "loaded"),))
    )
    store.attempts.beat(mine, Progress(metrics=((2, "loss", 2.0), (3, "eval_loss", 1.0)), log="two\n"))
    assert [(p.step, p.value) for p in store.jobs.metrics(job_id, "loss")] == [(1, 3.0), (2, 2.0)]
    assert [(p.attempt, p.step) for p in store.jobs.metrics(job_id, "eval_loss")] == [(1, 3)]
    chunks = store.jobs.log(job_id)
    assert [chunk.text for chunk in chunks] == ["one\n", "two\n"]
    assert [chunk.text for chunk in store.jobs.log(job_id, after=chunks[0].chunk_id)] == ["two\n"]
    assert [e.text for e in store.jobs.events(job_id) if e.kind == "model"] == ["loaded"]


@pytest.mark.both
def test_what_no_database_can_hold_does_not_stop_a_heartbeat(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    mine = claim(store)
    progress = Progress(
        metrics=((1, "loss", float("nan")), (2, "loss", float("inf")), (3, "loss", 1.0)),
        loss=float("nan"),
        log="zero \x00 and a lone \ud800 surrogate\n",
        events=(("note", "a\x00b"),),
    )
    assert store.attempts.beat(mine, progress).accepted
    assert [(p.step, p.value) for p in store.jobs.metrics(job_id, "loss")] == [(3, 1.0)]
    assert store.jobs.get(job_id).loss is None
    (chunk,) = store.jobs.log(job_id)
    assert chunk.text.startswith("zero � and a lone ")
    assert store.attempts.finish(mine, Reason.TRAINER_ERROR, "it said \x00", NOTHING) is Status.QUEUED
    assert store.jobs.get(job_id).message == "it said �"


def test_the_points_of_a_long_outage_fit_into_one_heartbeat(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    points = tuple((step, "loss", 1.0) for step in range(20_000))
    assert store.attempts.beat(claim(store), Progress(metrics=points)).accepted
    assert len(store.jobs.metrics(job_id, "loss")) == 20_000


@pytest.mark.both
def test_a_stale_token_is_refused_and_nothing_of_it_is_written(timed: Store, clock: Clock) -> None:
    job_id = timed.jobs.submit(submission())
    stale = claim(timed)
    clock.forward(LEASE_S + 1)
    assert timed.attempts.reap() == [(job_id, 8)]
    current = claim(timed, node="other:0")
    events = len(timed.jobs.events(job_id))

    late = Progress(step=99, metrics=((99, "loss", 0.1),), log="late\n", events=(("late", "late"),), vram_peak=1)
    assert not timed.attempts.beat(stale, late).accepted
    assert timed.attempts.finish(stale, Reason.OK, "late", late, RESULT) is None
    assert timed.attempts.finish(stale, Reason.TRAINER_ERROR, "late", late) is None
    assert not timed.attempts.keep_checkpoint(stale, StoredCheckpoint(step=99, prefix="jobs/1/checkpoints/1-99"))

    row = timed.jobs.get(job_id)
    assert (row.status, row.token, row.step, row.node) == (Status.RUNNING, current.token, None, "other:0")
    assert row.checkpoint is None
    assert timed.jobs.metrics(job_id, "loss") == []
    assert timed.jobs.log(job_id) == []
    assert timed.adapters.all() == []
    assert len(timed.jobs.events(job_id)) == events
    assert [(a.reason, a.vram_peak) for a in timed.attempts.of_job(job_id)] == [
        (Reason.WORKER_LOST, None),
        (None, None),
    ]


def test_a_result_goes_with_success_and_only_with_it(store: Store) -> None:
    store.jobs.submit(submission())
    mine = claim(store)
    with pytest.raises(ValueError, match="a result goes with reason ok"):
        store.attempts.finish(mine, Reason.OK, "done", NOTHING)
    with pytest.raises(ValueError, match="a result goes with reason ok"):
        store.attempts.finish(mine, Reason.DIVERGED, "nan", NOTHING, RESULT)
    assert store.jobs.get(mine.job_id).status is Status.RUNNING


@pytest.mark.both
def test_four_threads_never_claim_one_of_forty_jobs_twice(store: Store) -> None:
    submitted = [store.jobs.submit(submission()) for _ in range(40)]
    claimed: list[list[int]] = [[] for _ in range(4)]
    together = threading.Barrier(4)
    for n in range(4):
        store.cards.see(node_state(f"box:{n}", total=PLENTY, max_jobs=64))

    def serve(n: int) -> None:
        together.wait()
        while (taken := store.attempts.claim(f"box:{n}")) is not None:
            claimed[n] += [taken.job_id] if isinstance(taken, Claim) else []

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(job_id for part in claimed for job_id in part) == submitted
    assert all(len(store.attempts.of_job(job_id)) == 1 for job_id in submitted)


@pytest.mark.both
def test_jobs_are_listed_newest_first_and_by_every_filter(timed: Store, clock: Clock) -> None:
    first = timed.jobs.submit(submission(user="ada", labels={"team": "nlp", "a.b": "1"}))
    second = timed.jobs.submit(submission(user="bob", labels={"team": "vision"}))
    third = timed.jobs.submit(submission(user="ada"))
    timed.jobs.cancel(first, "ada")
    assert [j.job_id for j in timed.jobs.matching()] == [third, second, first]
    assert [j.job_id for j in timed.jobs.matching(user="ada")] == [third, first]
    assert [j.job_id for j in timed.jobs.matching(statuses=[Status.QUEUED])] == [third, second]
    of_label = {label: timed.jobs.newest(Choice(label=("team", label)), Page()) for label in ("vision", "audio")}
    assert [j.job_id for j in of_label["vision"]] == [second] and of_label["audio"] == []
    assert [j.job_id for j in timed.jobs.newest(Choice(label=("a.b", "1")), Page())] == [first]
    assert [j.job_id for j in timed.jobs.ended(clock.now, 5)] == [first]
    assert timed.jobs.ended(clock.now + dt.timedelta(seconds=1), 5) == []


def test_a_number_that_was_never_given_is_no_job(store: Store) -> None:
    for verb in (store.jobs.get, lambda n: store.jobs.cancel(n, "ada"), lambda n: store.jobs.retry(n, "ada")):
        with pytest.raises(JobNotFound, match="there is no job 12"):
            verb(12)


def test_without_a_clock_times_are_those_of_the_database_in_utc(store: Store) -> None:
    job_id = store.jobs.submit(submission())
    now, submitted = store.now(), store.jobs.get(job_id).submitted_at
    assert now.tzinfo is dt.UTC
    assert dt.timedelta(0) <= now - submitted < dt.timedelta(seconds=30)


def test_a_node_is_seen_updated_and_forgotten(timed: Store, clock: Clock) -> None:
    timed.cards.see(node_state("box:1"))
    timed.cards.see(node_state("box:0", outside=[{"pid": 5, "user": "eve", "bytes": 10}], versions={"torch": "2"}))
    clock.forward(10)
    timed.cards.see(node_state("box:0", outside_bytes=47 * GIB, load=90, draining=True))
    first, second = timed.cards.nodes()
    assert (first.node, first.free, first.load, first.draining, first.outside) == ("box:0", GIB, 90, True, [])
    assert (first.seen_at, second.seen_at) == (clock.now, NOON)
    timed.cards.forget("box:0")
    timed.cards.forget("never-seen:0")
    assert [n.node for n in timed.cards.nodes()] == ["box:1"]


@pytest.mark.both
@pytest.mark.parametrize("gangs", [False, True])
def test_the_time_of_a_claim_is_not_before_its_lock(postgres_engine: Engine, gangs: bool) -> None:
    """Else what it starts could begin before the end that made room for it."""
    store, read = Store(postgres_engine), list[dt.datetime]()
    store.cards.see(node_state("box:0"))

    def read_under_lock() -> None:
        with store.begin(read_only=False) as tx:
            locked = lock(tx, "box:0", gangs=gangs)
            assert locked is not None
            read.append(locked[1])

    with postgres_engine.begin() as holder:
        holder.execute(text("SELECT FROM nodes FOR UPDATE"))
        waits = threading.Thread(target=read_under_lock)
        waits.start()
        until_blocked(holder, 1)
        ended = store.now()
    waits.join()
    assert read[0] > ended


@pytest.mark.both
def test_a_card_whose_job_is_locked_still_looks_again_for_what_others_may_not_take(postgres_engine: Engine) -> None:
    """The rule gives the first job to the other card, which may take the locked one instead."""
    store = Store(postgres_engine)
    store.cards.see(node_state("box:0"))
    store.cards.see(node_state("box:1"))
    first, second = (store.jobs.submit(submission()) for _ in range(2))
    with postgres_engine.begin() as other:
        other.execute(text("SELECT FROM jobs WHERE job_id = :second FOR UPDATE"), {"second": second})
        assert store.attempts.claim("box:1") == Left(nodes=frozenset({"box:0"}))
    assert taken_by(store, "box:1") == second
    assert taken_by(store, "box:0") == first


@pytest.mark.both
@pytest.mark.parametrize("change", ["method=lora", "resources.node_labels={site: b}"])
def test_a_job_that_is_edited_while_a_claim_decides_is_looked_at_again(postgres_engine: Engine, change: str) -> None:
    """The rule has read a job that this card suits."""
    store = Store(postgres_engine)
    store.cards.see(node_state("box:0", total=10 * GIB))
    job_id = store.jobs.submit(submission(lora=16, qlora=8))
    with before_the_lock(postgres_engine, lambda: store.jobs.edit(amendment(store, job_id, [change]), "ada")):
        assert store.attempts.claim("box:0") == Left(nodes=frozenset())
    assert store.attempts.claim("box:0") is None
    assert store.jobs.get(job_id).status is Status.QUEUED


@contextmanager
def before_the_lock(engine: Engine, deed: Callable[[], object]) -> Iterator[None]:
    """Do it once, as the next statement that locks a job's row is sent."""
    told: list[str] = []

    def sent(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "FROM jobs" in statement and "SKIP LOCKED" in statement and not told:
            told.append(statement)
            deed()

    event.listen(engine, "before_cursor_execute", sent)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", sent)
    assert told


def taken_by(store: Store, node: str) -> int | None:
    claim = store.attempts.claim(node)
    return claim.job_id if isinstance(claim, Claim) else None


@pytest.mark.both
def test_two_claims_at_once_keep_a_user_s_limit(postgres_engine: Engine) -> None:
    """The second sees room that the first did not see, and so starts another job of the same user."""
    store = Store(postgres_engine)

    def show(node: str, free: int) -> None:
        store.cards.see(node_state(node, total=24 * GIB, outside_bytes=(24 - free) * GIB, max_jobs=1, user_limit=1))

    show("b:0", 4)
    for size in (20, 3):
        store.jobs.submit(submission(lora=size, method="lora"))
    claims = [threading.Thread(target=store.attempts.claim, args=(node,)) for node in ("b:0", "a:0")]
    with postgres_engine.begin() as connection:
        connection.execute(text("LOCK TABLE attempts IN SHARE MODE"))  # a claim decides, and can't write
        for number, claim in enumerate(claims):
            until_blocked(connection, number)
            show("a:0", 0 if number == 0 else 24)
            claim.start()
        until_blocked(connection, len(claims))
    for claim in claims:
        claim.join(timeout=30)
    assert len(store.jobs.matching(statuses=[Status.RUNNING])) == 1
