"""A login that means harm, or a psql that somebody forgot: whatever it holds, jobs run on and end as they would."""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from sqlalchemy import Engine, make_url, text

from loractl.common.errors import Forbidden, WrongState
from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.store.database import DatabaseError, make_engine
from loractl.common.store.queries import changes, endings
from loractl.common.store.records import Beat, Claim, Progress
from loractl.common.store.roles import LOGIN, SUBMIT, Invitation, invite
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.change.amendment import amendment

from .. import services
from ..conftest import kept_engine
from ..hostile import HOLDING, OLD_LOCKS, STATEMENTS, held_open, storm
from ..roles import PASSWORD, Logins, logins
from ..unit.factories import RESULT, Clock, node_state, submission, take

HELD = "SELECT loractl_change(1, 'held', '{}', '{\"held\": true}', 'ada', '')"
LEASE_S = 60.0
STORM_S = 4.0
SOON_S = 5.0
"""A start that waits for nobody takes a tenth of a second, a busy machine's a second; a lock is waited for 10 s."""


@pytest.fixture
def clock() -> Clock:
    """From now on, since the database looks at when jobs are submitted."""
    clock = Clock()
    clock.now = dt.datetime.now(dt.UTC)
    return clock


@pytest.fixture
def box(lab: Logins, clock: Clock) -> Iterator[Store]:
    """A worker whose leases follow the test's clock."""
    engine = kept_engine(lab.box)
    yield Store(engine, clock, lease_s=LEASE_S)
    engine.dispose()


def edits(job_id: int) -> str:
    return f"SELECT loractl_change({job_id}, 'edited', '{{}}', '{{\"yields\": false}}', 'ada', ': yields')"


def test_who_holds_the_locks_of_an_earlier_version_stops_no_round(
    person: Store, box: Store, lab: Logins, owner_url: str, clock: Clock
) -> None:
    person.jobs.submit(submission())
    assert isinstance(take(box), Claim)
    with pytest.raises(Forbidden), held_open(lab.person, OLD_LOCKS):
        pytest.fail("a login could fill the server's table of locks")
    with held_open(owner_url, OLD_LOCKS):
        clock.forward(1.1 * LEASE_S)
        assert box.cards.take_turn(0, 0) is not None
        assert [job_id for job_id, _ in box.attempts.reap()] == [1]
        assert box.jobs.end_patience() == [] and box.cards.preempt() == ()


def test_a_row_that_a_login_keeps_locked_costs_no_attempt_and_no_beat_is_lost(
    person: Store, box: Store, lab: Logins, owner_url: str, clock: Clock
) -> None:
    """The owner holds it by hand; an edit of its own login holds nothing."""
    job_id = person.jobs.submit(submission())
    claim = take(box)
    assert isinstance(claim, Claim)
    locks = ((owner_url, "SELECT * FROM jobs FOR NO KEY UPDATE", False), (lab.person, edits(job_id), True))
    for url, statement, recorded in locks:
        with held_open(url, statement):
            for _ in range(8):
                clock.forward(LEASE_S / 5)
                beat = box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=5))
                assert (beat.accepted, beat.recorded) == (True, recorded)
                assert box.attempts.reap() == []
            if url == owner_url:
                person.jobs.cancel(job_id, "ada")
                assert box.attempts.beat(claim, Progress()).cancel_requested, "a wish needs nobody's row"
        assert box.attempts.reap() == [], "its own row holds the lease"
        told = box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=5))
        assert told.accepted and told.recorded and box.jobs.get(job_id).step == 5
    assert told.cancel_requested


def test_who_changes_a_job_whose_row_somebody_keeps_locked_is_told_who_it_is(
    person: Store, box: Store, owner_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PATIENCE_S", 0.05)
    running, waiting = person.jobs.submit(submission()), person.jobs.submit(submission())
    assert isinstance(take(box), Claim)
    for job_id in (running, waiting):
        said = "SET application_name = 'psql left open'", f"SELECT * FROM jobs WHERE job_id = {job_id} FOR UPDATE"
        told = pytest.raises(WrongState, match=r"postgres's session \d+ \(psql left open\) keeps its row locked")
        with held_open(owner_url, *said), told:
            person.jobs.cancel(job_id, "ada")
        assert not person.jobs.get(job_id).cancel_requested and person.jobs.get(job_id).status is not Status.CANCELLED
        person.jobs.cancel(job_id, "ada")


def test_a_look_that_is_never_committed_keeps_gc_from_no_other_job(person: Store, owner_url: str, lab: Logins) -> None:
    owner = Store(make_engine(owner_url))
    seen, other = (person.jobs.submit(submission()) for _ in range(2))
    for job_id in (seen, other):
        claim = take(owner)
        assert isinstance(claim, Claim)
        owner.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT)
        assert owner.results.remove(job_id, "root")
    later = owner.now() + dt.timedelta(days=1)
    with held_open(lab.person, f"SELECT loractl_look({seen}, 'f', 'ada', now())"):
        assert owner.results.forget_jobs([seen, other], later) == {other}
    assert owner.results.forget_jobs([seen], later) == {seen}
    owner.engine.dispose()


@pytest.mark.long
def test_who_is_silent_for_a_lease_ends_also_where_its_row_was_locked_once(
    person: Store, box: Store, owner_url: str, clock: Clock
) -> None:
    job_id = person.jobs.submit(submission())
    claim = take(box)
    assert isinstance(claim, Claim)
    with held_open(owner_url, "SELECT * FROM jobs FOR UPDATE"):
        assert not box.attempts.beat(claim, Progress()).recorded
        clock.forward(1.2 * LEASE_S)
        assert box.attempts.reap() == [], "who holds its row is passed over"
    assert [lost for lost, _ in box.attempts.reap()] == [job_id]
    assert not box.attempts.beat(claim, Progress()).accepted


@pytest.mark.parametrize("moment", ["_turn", "_end_lost"])
def test_a_beat_that_comes_while_its_attempt_is_ended_keeps_it_or_is_refused(
    person: Store, box: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It finds its job's row locked, and was accepted in the attempt's own row, which was ended nevertheless."""
    job_id, told = person.jobs.submit(submission()), list[Beat]()
    claim = take(box)
    assert isinstance(claim, Claim)
    clock.forward(1.1 * LEASE_S)
    late = threading.Thread(target=lambda: told.append(box.attempts.beat(claim, Progress())))
    goes_on = getattr(endings, moment)

    def beaten(*args: Any) -> Any:
        if not late.ident:
            late.start()
            late.join(5 if moment == "_turn" else 0.5)
        return goes_on(*args)

    monkeypatch.setattr(endings, moment, beaten)
    ended = [lost for lost, _ in box.attempts.reap()]
    late.join()
    assert (ended, told[0].accepted) == (([job_id], False) if moment == "_end_lost" else ([], True))
    assert (box.jobs.get(job_id).status is Status.RUNNING) is told[0].accepted


@pytest.mark.parametrize("moment", ["is reporting", "was looked at"])
def test_a_card_that_reports_while_its_silence_is_looked_at_keeps_its_gang_or_comes_after_the_end(
    person: Store, box: Store, owner_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    cards = [node_state(f"heron:{index}", gangs=True) for index in range(2)]
    for card in cards:
        box.cards.see(card)
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=20 * GIB, qlora=None))
    of_both = replace(submission(lora=20, qlora=None, method="lora"), ways=Ways(alone=False, gangs=(way,)))
    job_id = person.jobs.submit(of_both)
    claim = box.attempts.claim("heron:0", gangs=True)
    assert isinstance(claim, Claim)
    clock.forward(1.1 * LEASE_S)
    assert box.attempts.beat(claim, Progress()).accepted
    if moment == "is reporting":
        with held_open(owner_url, "UPDATE nodes SET free = 0 WHERE node = 'heron:1'"):
            assert box.attempts.reap() == []
        return
    late, end = threading.Thread(target=box.cards.see, args=[cards[1]]), endings._end_lost

    def ended(*args: Any) -> None:
        late.start()
        late.join(0.5)
        assert late.is_alive()
        end(*args)

    monkeypatch.setattr(endings, "_end_lost", ended)
    assert [lost for lost, _ in box.attempts.reap()] == [job_id]
    late.join()


def test_an_open_transaction_s_changes_lock_nothing_and_count_once_it_commits(
    person: Store, box: Store, lab: Logins, owner_url: str
) -> None:
    mine, other = person.jobs.submit(submission()), person.jobs.submit(submission(name="b"))
    whole = HELD.replace("(1,", "(job_id,").replace("'{}'", '\'{"status": "queued"}\'') + " FROM jobs"
    engine, owner = make_engine(lab.person, kept=0), make_engine(owner_url)
    with engine.connect() as open_one:
        open_one.exec_driver_sql(whole)
        with owner.connect() as looking:  # nobody has a row locked
            assert len(looking.exec_driver_sql("SELECT 1 FROM jobs FOR UPDATE NOWAIT").all()) == 2
        person.jobs.cancel(other, "ada")
        assert person.jobs.get(other).status is Status.CANCELLED, "at once, on an idle lab"
        with pytest.raises(DatabaseError, match=f"job {other} has changed meanwhile"):
            open_one.exec_driver_sql("COMMIT")
    assert not person.jobs.get(mine).held, "all or none"
    claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == mine
    for dispose in (engine, owner):
        dispose.dispose()


EARLY = (
    (HELD, "SET CONSTRAINTS ALL IMMEDIATE"),
    ("SET CONSTRAINTS ALL IMMEDIATE", HELD),
    (HELD, "SAVEPOINT a", "SET CONSTRAINTS ALL IMMEDIATE"),
    (HELD, "DO $$ BEGIN SET CONSTRAINTS ALL IMMEDIATE; END $$"),
    (HELD, "COMMIT; SELECT pg_sleep(60)"),
    (HELD, "commit"),
    (HELD, "COMMIT AND CHAIN"),
    (HELD, "PREPARE TRANSACTION 'x'"),
    (HELD, "DECLARE slow CURSOR WITH HOLD FOR SELECT pg_sleep(60)", "COMMIT"),
    ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", HELD, "COMMIT"),
)
"""Ways to have a change made before the transaction's end, or to make that end last."""


@pytest.mark.parametrize("statements", EARLY)
def test_no_statement_but_commit_makes_a_change_and_a_commit_is_not_made_to_last(
    person: Store, lab: Logins, owner_url: str, statements: tuple[str, ...]
) -> None:
    person.jobs.submit(submission())
    *before, last = statements
    owner = make_engine(owner_url)
    with psycopg.connect(lab.person.replace("+psycopg", "")) as connection:
        for statement in before:
            connection.execute(statement)
        began = time.monotonic()
        with pytest.raises(psycopg.Error):
            connection.execute(last)
        assert time.monotonic() - began < 5
        with owner.connect() as looking:
            looking.exec_driver_sql("SELECT 1 FROM jobs FOR UPDATE NOWAIT")
        connection.rollback()
    assert not person.jobs.get(1).held
    owner.dispose()


def next_result(connection: psycopg.Connection) -> PGresult:
    """The next result; what ends a statement's results is passed over."""
    while (result := connection.pgconn.get_result()) is None:
        pass
    return result


def test_a_pipeline_s_changes_are_made_by_its_commit_alone(person: Store, lab: Logins) -> None:
    person.jobs.submit(submission())
    address = lab.person.replace("+psycopg", "")
    # through libpq itself: psycopg's own pipeline at times raises IndexError where the Sync at its end is refused
    with contextlib.closing(psycopg.connect(address, autocommit=True)) as one:
        one.pgconn.enter_pipeline_mode()
        one.pgconn.send_query_params(HELD.encode(), None)
        one.pgconn.send_flush_request()
        assert next_result(one).status == ExecStatus.TUPLES_OK
        one.pgconn.pipeline_sync()
        assert b"changes are made by the statement COMMIT alone" in next_result(one).error_message
    assert not person.jobs.get(1).held
    with psycopg.connect(address, autocommit=True) as connection, connection.pipeline():
        for statement in ("BEGIN", HELD, "COMMIT"):
            connection.execute(statement)
    assert person.jobs.get(1).held


def test_a_change_meets_another_login_s_and_is_made_after_it(person: Store, owner_url: str) -> None:
    """The owner's transaction has the row for half a second: the change waits for no lock, and is tried again."""
    job_id, owner = person.jobs.submit(submission()), make_engine(owner_url)

    def lock() -> None:
        with owner.begin() as connection:
            connection.exec_driver_sql("SELECT * FROM jobs FOR UPDATE")
            locked.set()
            time.sleep(0.5)

    locked = threading.Event()
    thread = threading.Thread(target=lock)
    thread.start()
    locked.wait()
    person.jobs.hold(job_id, "ada")
    thread.join()
    assert person.jobs.get(job_id).held
    owner.dispose()


def test_one_transaction_s_changes_are_bounded_and_one_job_s_history_is(person: Store, lab: Logins) -> None:
    job_id = person.jobs.submit(submission())
    many = f"{HELD} FROM generate_series(1, %s)"
    with psycopg.connect(lab.person.replace("+psycopg", "")) as connection:
        with pytest.raises(psycopg.Error, match="at most 2,000 changes"):
            connection.execute(many, [2001])
        connection.rollback()
        connection.execute(many, [600])
        with pytest.raises(psycopg.Error, match=r"changed job 1 500 times within a day|too many changes"):
            connection.execute("COMMIT")
        connection.rollback()
        made = '{"sweep": {"name": "a", "settings": {"varied": {}, "trials": 1, "seed": 1}}}'
        with pytest.raises(psycopg.Error, match="made 2,000 sweeps within a day"):
            connection.execute("SELECT loractl_submit(%s) FROM generate_series(1, 2001)", [made])
    assert len(person.jobs.events(job_id)) == 1


def test_a_login_s_waiting_jobs_have_few_priorities_each_of_which_costs_a_claim(person: Store) -> None:
    first, *_ = (person.jobs.submit(submission(priority=number)) for number in range(10))
    person.jobs.submit(submission(priority=9))
    told = "waiting jobs have 10 different priorities already, none of them is 10"
    with pytest.raises(WrongState, match=told):
        person.jobs.submit(submission(priority=10))
    with pytest.raises(WrongState, match=told):
        person.jobs.edit(amendment(person, first, ["priority=10"]), "ada")
    person.jobs.cancel(first, "ada")
    person.jobs.submit(submission(priority=10))
    with pytest.raises(WrongState, match="none of them is 0"):
        person.jobs.retry(first, "ada")


def test_a_claim_goes_on_with_the_next_job_where_somebody_keeps_the_first_ones_locked(
    person: Store, box: Store, lab: Logins, owner_url: str
) -> None:
    for number in range(30):
        person.jobs.submit(submission(name=f"locked-{number}", priority=1000))
    free = person.jobs.submit(submission())
    for url in (owner_url, lab.box):
        with held_open(url, f"SELECT * FROM jobs WHERE job_id < {free} FOR NO KEY UPDATE"):
            began = time.monotonic()
            claim = take(box)
            assert isinstance(claim, Claim) and claim.job_id == free and time.monotonic() - began < SOON_S
        box.attempts.finish(claim, Reason.OUT_OF_MEMORY, "", Progress())
        free = person.jobs.submit(submission())


@pytest.mark.long
@pytest.mark.parametrize("apart", [0.0, 0.25], ids=["one line", "a line each"])
def test_more_locked_rows_of_a_user_than_a_claim_tries_keep_no_card_from_others(
    person: Store, box: Store, owner_url: str, apart: float
) -> None:
    for number in range(12):
        person.jobs.submit(submission(lora=4 + number * apart, priority=1000))
    owner = Store(make_engine(owner_url))
    others = owner.jobs.submit(submission(user="eve"))
    with held_open(owner_url, f"SELECT * FROM jobs WHERE job_id < {others} FOR NO KEY UPDATE"):
        claim = take(box)
    assert isinstance(claim, Claim) and claim.job_id == others
    owner.engine.dispose()


@pytest.mark.long
def test_a_commit_of_changes_that_take_long_is_ended(person: Store, lab: Logins, owner_url: str) -> None:
    job_id, owner = person.jobs.submit(submission()), make_engine(owner_url)
    with owner.connect() as connection:
        function = str(
            connection.exec_driver_sql("SELECT pg_get_functiondef('loractl_pending.by_commit'::regproc)").scalar()
        )

    def allow(seconds: str) -> None:
        with owner.begin() as connection:
            connection.execute(text(function.replace("1 second", seconds).replace(":", "\\:")))

    allow("0 seconds")
    try:
        with psycopg.connect(lab.person.replace("+psycopg", "")) as connection:
            connection.execute(HELD)
            with pytest.raises(psycopg.Error, match="makes too many changes"):
                connection.execute("COMMIT")
            with owner.connect() as looking:
                looking.exec_driver_sql("SELECT 1 FROM jobs FOR UPDATE NOWAIT")
    finally:
        allow("1 second")
    person.jobs.hold(job_id, "ada")
    owner.dispose()


def test_a_login_reaches_no_other_database_where_it_could_use_the_server_s_locks_up(lab: Logins) -> None:
    for name in ("postgres", "template1"):
        elsewhere = make_url(lab.person).set(drivername="postgresql", database=name)
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(elsewhere.render_as_string(hide_password=False))


@pytest.fixture
def joiner(alone_inviting: None, owner_url: str) -> Iterator[str]:
    """The login of a join line."""
    engine = make_engine(owner_url)
    name = LOGIN + secrets.token_hex(6)
    invite(engine, [Invitation(login=name, password=PASSWORD, role=SUBMIT, name=None, sealed="x")], 3600)
    yield engine.url.set(username=name, password=PASSWORD).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")
    engine.dispose()


@pytest.mark.long
def test_in_a_storm_of_all_that_logins_can_say_no_running_job_ends_or_changes(
    person: Store, box: Store, lab: Logins, joiner: str, owner_url: str, clock: Clock
) -> None:
    claims: dict[int, Claim] = {}
    for _ in range(10):
        person.jobs.submit(submission(max_retries=0))
        claim = take(box)
        assert isinstance(claim, Claim)
        claims[claim.job_id] = claim
    for name in ("waits", "waits-too"):
        person.jobs.submit(submission(name=name))
    person.jobs.hold(11, "ada")
    owner = make_engine(owner_url)
    before = _asked_and_held(owner)
    over, said = threading.Event(), list[str]()
    urls = (lab.person, lab.person, joiner)
    threads = [threading.Thread(target=storm, args=(url, over, said, range(1, 13), STATEMENTS, 0.3)) for url in urls]
    for thread in threads:
        thread.start()
    try:
        end, step = time.monotonic() + STORM_S, 0
        while time.monotonic() < end:
            step += 1
            clock.forward(LEASE_S / 10)
            for claim in claims.values():
                assert box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=step)).accepted
            box.cards.take_turn(0, 0)
            assert box.attempts.reap() == []
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len({statement.split("(")[0] for statement in said}) > 5, "it was let through"
    assert _asked_and_held(owner) == before
    for claim in claims.values():
        assert box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
    owner.dispose()


@pytest.mark.long
def test_whatever_three_logins_leave_open_ten_jobs_run_on_and_others_start_at_once(
    person: Store, box: Store, lab: Logins, joiner: str, owner_url: str, clock: Clock
) -> None:
    claims: list[Claim] = []
    for number in range(10):
        person.jobs.submit(submission(max_retries=0))
        claim = take(box, node=f"box:{number}")
        assert isinstance(claim, Claim)
        claims.append(claim)
    for _ in range(3):
        person.jobs.submit(submission(priority=1000))
    owner = make_engine(owner_url)
    before = _asked_and_held(owner)
    by_owner = (
        "SELECT * FROM jobs FOR UPDATE",
        *(one for one in HOLDING if one.startswith("SELECT loractl")),
        OLD_LOCKS,
    )
    for url, statements in ((lab.person, HOLDING), (joiner, HOLDING), (owner_url, by_owner)):
        with contextlib.ExitStack() as left_open:
            for statement in statements:
                with contextlib.suppress(DatabaseError, Forbidden):
                    about = statement.format(11) if "{0}" in statement else statement
                    left_open.enter_context(held_open(url, "SET lock_timeout = 100", about))
            clock.forward(LEASE_S / 3)
            for claim in claims:
                assert box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=1)).accepted
            assert box.attempts.reap() == []
            began = time.monotonic()
            started = person.jobs.submit(submission())
            found = take(box, node="box:10")
            assert isinstance(found, Claim) and time.monotonic() - began < SOON_S
            if url != owner_url:  # with nothing locked, what is first starts
                assert found.job_id < started
        assert box.attempts.finish(found, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
        assert _asked_and_held(owner) == before
    for claim in claims:
        assert box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED
    owner.dispose()


@pytest.mark.long
def test_a_login_that_uses_up_all_connections_stops_no_box(real_services: None) -> None:
    settings = "max_connections=14", "reserved_connections=5", "superuser_reserved_connections=3"
    with tempfile.TemporaryDirectory(prefix="loractl-pg-") as folder, services.postgres(Path(folder), *settings) as url:
        upgrade(owner := make_engine(url, kept=0))
        with logins(url) as lab, contextlib.ExitStack() as held:
            person, box = (Store(make_engine(login, kept=0)) for login in (lab.person, lab.box))
            for _ in range(2):
                person.jobs.submit(submission())
            claim = take(box)
            assert isinstance(claim, Claim)
            with pytest.raises(psycopg.OperationalError, match="connection slots are reserved"):
                while True:
                    held.enter_context(psycopg.connect(lab.person.replace("+psycopg", "")))
            assert box.attempts.beat(claim, Progress(stage=Stage.TRAINING)).accepted
            assert isinstance(take(box, node="box:1"), Claim)
        owner.dispose()


def _asked_and_held(owner: Engine) -> list[str]:
    """What of the running jobs only their trainers change, and their histories."""
    columns = "job_id, name, status, token, node, attempt, retries_used, message, reason, ended_at"
    told = "SELECT job_id, attempt, kind, text FROM events WHERE kind <> 'queued' AND kind <> 'edited' AND job_id < 11"
    with owner.connect() as connection:
        rows = connection.execute(text(f"SELECT {columns} FROM jobs WHERE job_id < 11 ORDER BY job_id"))
        return [*map(str, rows), *map(str, connection.execute(text(f"{told} ORDER BY event_id")))]
