"""What one node at a time does for the whole fleet: ending leases, giving way, patience."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, text

from loractl.common.job.status import Reason, Status
from loractl.common.settings import LEASE_S, LEAST_LEASE_S, pace_of
from loractl.common.store.database import NODE_IDLE_S, DatabaseError, make_engine
from loractl.common.store.queries import endings
from loractl.common.store.queries.cards.fleet_rounds import GAP
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB
from loractl.worker.node.monitor import FLEET_ROUND_S, ROUND_S, SETTLE_S

from ...factories import Clock, node_state, submission, take

pytestmark = pytest.mark.both

FROZEN_SWEEPER = """
import os, signal

from loractl.common.settings import load_settings
from loractl.common.store.queries import endings
from loractl.worker.attempt.workplace import Drain
from loractl.worker.device.devices import find_device
from loractl.worker.node.node import place_of
from loractl.worker.node.monitor import NodeOptions

end = endings._end_attempt

def end_and_freeze(*arguments, **named):
    end(*arguments, **named)
    print("ended one", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

endings._end_attempt = end_and_freeze
settings = load_settings()
store = place_of(settings, find_device(settings, "0"), NodeOptions(), Drain()).store
print("loaded", flush=True)
input()
store.attempts.reap()
"""


def turn(store: Store) -> bool | None:
    """Whether a turn may end leases; None: it is no time for one."""
    taken = store.cards.take_turn(FLEET_ROUND_S, SETTLE_S)
    return None if taken is None else not taken.settling


def run(store: Store, count: int, **keys: object) -> list[Claim]:
    """So many running jobs, each on a card of its own and of its own user."""
    for number in range(count):
        store.cards.see(node_state(f"box:{number}", total=24 * GIB, max_jobs=1))
    for number in range(count):
        store.jobs.submit(submission(user=f"user{number % 7}", lora=20, qlora=20, **keys))
    claims = [store.attempts.claim(f"box:{number}") for number in range(count)]
    assert all(isinstance(claim, Claim) for claim in claims)
    return [claim for claim in claims if isinstance(claim, Claim)]


def expire(store: Store, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET lease_expires_at = '2020-01-01 00:00:00' WHERE status = 'running'"))


@pytest.fixture
def engine(upgraded_url: str) -> Iterator[Engine]:
    made = make_engine(upgraded_url)
    yield made
    made.dispose()


def test_one_node_goes_round_for_all_and_any_other_the_next_time(timed: Store, clock: Clock) -> None:
    assert turn(timed) is not None
    clock.forward(FLEET_ROUND_S - 0.1)
    assert turn(timed) is None
    clock.forward(0.1)
    assert turn(timed) is not None
    assert turn(timed) is None
    clock.forward(-3600)
    assert turn(timed) is not None, "a clock that was set back ends no rounds"


def test_after_an_outage_nobody_ends_a_lease_before_living_workers_could_beat(timed: Store, clock: Clock) -> None:
    turn(timed)
    clock.forward(LEASE_S + 60)
    assert turn(timed) is False, "it may have started in the outage and know nothing of it"
    for _ in range(int(SETTLE_S / ROUND_S)):
        clock.forward(ROUND_S)
        settled = turn(timed)
    assert settled is True
    clock.forward(LEASE_S / 2)
    assert turn(timed) is True, "a short outage makes no lease of a living worker old"


def test_a_clock_that_is_set_back_while_the_fleet_settles_does_not_keep_it_from_ending_leases(
    timed: Store, clock: Clock
) -> None:
    assert turn(timed) is False
    clock.forward(-3600)
    assert turn(timed) is True


def test_what_another_node_does_now_is_not_waited_for(postgres_engine: Engine) -> None:
    store = Store(postgres_engine)
    run(store, 1)
    expire(store, postgres_engine)
    with Store(postgres_engine).begin(read_only=False) as tx:
        assert tx.is_alone()
        began = time.monotonic()
        assert (turn(store), store.attempts.reap(), store.cards.preempt(), store.jobs.end_patience()) == (
            None,
            [],
            (),
            [],
        )
        assert time.monotonic() - began < 5, "who waits for a lock would wait for longer"
    assert store.attempts.reap() == [(1, 24)]


def test_a_row_that_another_transaction_holds_is_passed_over(postgres_engine: Engine) -> None:
    store = Store(postgres_engine)
    run(store, 3)
    expire(store, postgres_engine)
    with store.begin(read_only=False) as tx:
        tx.session.scalars(select(Job).where(Job.job_id == 2).with_for_update()).one()
        assert sorted(store.attempts.reap()) == [(1, 24), (3, 24)]
    assert store.attempts.reap() == [(2, 24)]


def test_many_expired_leases_are_ended_a_few_at_a_time(
    engine: Engine, upgraded_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(engine)
    run(store, 7)
    expire(store, engine)
    monkeypatch.setattr(endings, "REAPED", 3)
    with store.begin(read_only=False) as tx:
        assert len(endings.reap(tx)) == 3
    assert len(store.attempts.reap()) == 4
    assert {job.status for job in store.jobs.matching()} == {Status.QUEUED}


def test_nodes_that_go_round_while_jobs_beat_and_end_never_lock_each_other(postgres_engine: Engine) -> None:
    """At 82e4d97 every node locked all running rows, in an order of its own."""
    store = Store(postgres_engine)
    claims = run(store, 24, preemptible=True)
    for number in range(6):
        store.jobs.submit(submission(user="boss", lora=20, qlora=20, priority=5 + number))
    failed: list[BaseException] = []
    over = time.monotonic() + 2

    def go_round() -> None:
        while time.monotonic() < over:
            store.attempts.reap()
            store.cards.preempt()
            store.jobs.end_patience()

    def beat(some: list[Claim]) -> None:
        while time.monotonic() < over:
            for claim in some:
                store.attempts.beat(claim, Progress(step=1, events=(("note", "x"),)))
        for claim in some:
            store.attempts.finish(claim, Reason.DRAINED, "stopped", Progress())

    def guarded(work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except DatabaseError as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(go_round,)) for _ in range(8)]
    threads += [threading.Thread(target=guarded, args=(beat, claims[n::4])) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with postgres_engine.connect() as connection:
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
        assert connection.scalar(text(deadlocks)) == 0


@pytest.mark.parametrize("lease_s", [LEAST_LEASE_S, 6.0, 15.0, 30.0, LEASE_S])
def test_a_sweeper_that_is_frozen_lets_no_node_take_the_database_for_away(lease_s: float) -> None:
    """Else nobody ends a lease for another SETTLE_S."""
    pace = pace_of(lease_s)
    between = FLEET_ROUND_S + 1.2 * ROUND_S  # of two turns, and until the next node comes by
    assert (NODE_IDLE_S + between) * pace < GAP * lease_s
    assert NODE_IDLE_S + 1.2 * ROUND_S <= 14, "its transaction is ended, and the next node comes by"


def test_a_sweeper_that_is_frozen_holds_the_round_no_longer_than_fits_its_lease(
    postgres_engine: Engine, tmp_path: Path
) -> None:
    lease_s = 6.0
    store = Store(postgres_engine, lease_s=lease_s)
    run(store, 2)
    expire(store, postgres_engine)

    environment = {
        **os.environ,
        "LORACTL_HOME": str(tmp_path),
        "LORACTL_DATABASE_URL": postgres_engine.url.render_as_string(hide_password=False),
        "LORACTL_DEVICES": "sim:8GiB",
        "LORACTL_LEASE": f"{lease_s}s",
    }
    command = [sys.executable, "-c", FROZEN_SWEEPER]
    frozen = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert frozen.stdin is not None and frozen.stdout is not None and frozen.stdout.readline() == "loaded\n"
        assert store.cards.take_turn(0.0, settle_s=0.0) is not None
        print(file=frozen.stdin, flush=True)
        assert frozen.stdout.readline() == "ended one\n"
        assert store.attempts.reap() == [], "it holds the round"
        while (taken := store.cards.take_turn(0.0, SETTLE_S)) is None:
            time.sleep(0.1)
        assert not taken.settling
        assert sorted(job_id for job_id, _ in store.attempts.reap()) == [1, 2]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen.pid, signal.SIGKILL)
        frozen.wait()


def test_a_job_that_is_ending_is_not_asked_to_give_way(postgres_engine: Engine) -> None:
    store = Store(postgres_engine)
    store.jobs.submit(submission(lora=20, qlora=20, preemptible=True))
    assert isinstance(take(store, 24 * GIB), Claim)
    store.jobs.submit(submission(lora=20, qlora=20, priority=1))
    with store.begin(read_only=False) as tx:
        tx.session.scalars(select(Job).where(Job.job_id == 1).with_for_update()).one()
        assert store.cards.preempt() == (), "it is looked at again with the next round"
    assert store.cards.preempt() == (1,)
    with store.begin(read_only=True) as tx:
        assert tx.session.scalar(select(func.count()).where(Job.preempted_by == 2)) == 1
