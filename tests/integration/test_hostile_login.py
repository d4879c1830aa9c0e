"""A login that means harm, or a psql that somebody forgot: whatever it holds, jobs run on and end as they would."""

from __future__ import annotations

import datetime as dt
import secrets
import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from loractl.common.errors import WrongState
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.store.database import make_engine
from loractl.common.store.entrance import LOGIN, Invitation, invite
from loractl.common.store.queries import changes
from loractl.common.store.records import Claim, Progress
from loractl.common.store.roles import SUBMIT
from loractl.common.store.store import Store

from ..hostile import OLD_LOCKS, STATEMENTS, held_open, storm
from ..roles import PASSWORD, Logins
from ..unit.factories import RESULT, Clock, submission, take

LEASE_S = 60.0
STORM_S = 4.0


@pytest.fixture
def clock() -> Clock:
    """From now on, since the database looks at when jobs are submitted."""
    clock = Clock()
    clock.now = dt.datetime.now(dt.UTC)
    return clock


@pytest.fixture
def box(lab: Logins, clock: Clock) -> Iterator[Store]:
    """A worker whose leases follow the test's clock."""
    engine = make_engine(lab.box)
    yield Store(engine, clock, lease_s=LEASE_S)
    engine.dispose()


def edits(job_id: int) -> str:
    return f"SELECT loractl_change({job_id}, 'edited', '{{}}', '{{\"max_retries\": 1}}', 'ada', ': max_retries')"


def test_who_holds_the_locks_of_an_earlier_version_stops_no_round(
    person: Store, box: Store, lab: Logins, clock: Clock
) -> None:
    person.jobs.submit(submission())
    assert isinstance(take(box), Claim)
    with held_open(lab.person, OLD_LOCKS):
        clock.forward(1.1 * LEASE_S)
        assert box.cards.take_turn("box:0", 0, 0) is not None
        assert [job_id for job_id, _ in box.attempts.reap()] == [1]
        assert box.jobs.end_patience() == [] and box.cards.preempt() == ()


def test_a_row_that_a_login_keeps_locked_costs_no_attempt_and_no_beat_is_lost(
    person: Store, box: Store, lab: Logins, postgres_url: str, clock: Clock
) -> None:
    """Its own login holds it by an edit, the owner by hand."""
    job_id = person.jobs.submit(submission())
    claim = take(box)
    assert isinstance(claim, Claim)
    for url, statement in ((postgres_url, "SELECT * FROM jobs FOR UPDATE"), (lab.person, edits(job_id))):
        with held_open(url, statement):
            for _ in range(8):
                clock.forward(LEASE_S / 5)
                beat = box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=5))
                assert (beat.accepted, beat.recorded) == (True, False)
                assert box.attempts.reap() == []
            if url == lab.person:
                person.jobs.cancel(job_id, "ada")
                assert box.attempts.beat(claim, Progress()).cancel_requested, "a wish needs nobody's row"
        assert box.attempts.reap() == [], "its own row holds the lease"
        told = box.attempts.beat(claim, Progress(stage=Stage.TRAINING, step=5))
        assert told.accepted and told.recorded and box.jobs.get(job_id).step == 5
    assert told.cancel_requested


def test_who_changes_a_job_whose_row_somebody_keeps_locked_is_told_who_it_is(
    person: Store, box: Store, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PATIENCE_MS", 50)
    running, waiting = person.jobs.submit(submission()), person.jobs.submit(submission())
    assert isinstance(take(box), Claim)
    for job_id in (running, waiting):
        said = "SET application_name = 'psql left open'", f"SELECT * FROM jobs WHERE job_id = {job_id} FOR UPDATE"
        told = pytest.raises(WrongState, match=r"postgres's session \d+ \(psql left open\) keeps its row locked")
        with held_open(postgres_url, *said), told:
            person.jobs.cancel(job_id, "ada")
        assert not person.jobs.get(job_id).cancel_requested and person.jobs.get(job_id).status is not Status.CANCELLED
        person.jobs.cancel(job_id, "ada")


def test_a_line_of_a_history_that_is_never_committed_holds_nobody_up(person: Store, box: Store, lab: Logins) -> None:
    job_id = person.jobs.submit(submission())
    line = f"INSERT INTO events (job_id, at, kind, text) VALUES ({job_id}, now(), 'queued', 'queued by me')"
    with held_open(lab.person, line):
        claim = take(box)
        assert isinstance(claim, Claim) and box.attempts.beat(claim, Progress()).recorded
        assert box.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT) is Status.SUCCEEDED


def test_who_is_silent_for_a_lease_ends_also_where_its_row_was_locked_once(
    person: Store, box: Store, lab: Logins, clock: Clock
) -> None:
    job_id = person.jobs.submit(submission())
    claim = take(box)
    assert isinstance(claim, Claim)
    with held_open(lab.person, edits(job_id)):
        assert not box.attempts.beat(claim, Progress()).recorded
        clock.forward(1.2 * LEASE_S)
        assert box.attempts.reap() == [], "who holds its row is passed over"
    assert [lost for lost, _ in box.attempts.reap()] == [job_id]
    assert not box.attempts.beat(claim, Progress()).accepted


@pytest.fixture
def joiner(alone_inviting: None, postgres_url: str) -> Iterator[str]:
    """The login of a join line."""
    engine = make_engine(postgres_url)
    name = LOGIN + secrets.token_hex(6)
    invite(engine, [Invitation(login=name, password=PASSWORD, role=SUBMIT, name=None, sealed="x")], 3600)
    yield engine.url.set(username=name, password=PASSWORD).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")
    engine.dispose()


def test_in_a_storm_of_all_that_logins_can_say_no_running_job_ends_or_changes(
    person: Store, box: Store, lab: Logins, joiner: str, postgres_url: str, clock: Clock
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
    owner = make_engine(postgres_url)
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
            box.cards.take_turn("box:0", 0, 0)
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


def _asked_and_held(owner: Engine) -> list[str]:
    """What of the running jobs only their trainers change, and their histories."""
    columns = "job_id, name, status, token, node, attempt, retries_used, message, reason, ended_at, cancel_requested"
    told = "SELECT job_id, attempt, kind, text FROM events WHERE kind <> 'queued' AND kind <> 'edited' AND job_id < 11"
    with owner.connect() as connection:
        rows = connection.execute(text(f"SELECT {columns} FROM jobs WHERE job_id < 11 ORDER BY job_id"))
        return [*map(str, rows), *map(str, connection.execute(text(f"{told} ORDER BY event_id")))]
