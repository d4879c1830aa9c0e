"""On each database the triggers write down what the checker needs, and a breach in a real history shows."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import Engine, text

from loractl.common.job.status import Reason, Status
from loractl.common.store.database import make_engine
from loractl.common.store.queries.endings import _end_lost
from loractl.common.store.queries.jobs import read_job
from loractl.common.store.records import Claim, Progress
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store

from ..unit.factories import RESULT, submission, take
from . import history as module
from .checker import Broken, check
from .history import History, Span, read, record
from .successes import ANY_FAULT, tally

STORED = replace(RESULT, adapter_uri="file:///lab/jobs/1/attempt-1/adapter")


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A new database with the triggers, in which nothing is near enough to be of one transaction."""
    monkeypatch.setattr(module, "TRANSACTION_S", -1.0)
    engine = make_engine(database_url)
    upgrade(engine)
    record(engine)
    yield engine
    engine.dispose()


def one_job(engine: Engine) -> None:
    """Job 1 is submitted, claimed, beats, and ends well; then another waits."""
    store = Store(engine)
    store.jobs.submit(submission())
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.beat(claim, Progress(step=5))
    assert store.attempts.finish(claim, Reason.OK, "better", Progress(step=9), STORED) is Status.SUCCEEDED
    store.jobs.cancel(store.jobs.submit(submission()), "ada")


def seen(engine: Engine) -> History:
    always = Span(kind="a fault", start=dt.datetime(2000, 1, 1, tzinfo=dt.UTC), end=dt.datetime.now(dt.UTC))
    return History(**read(engine), printed=[1, 2], cancelled={}, lease_s=60.0, spans=(always,))


def broken(engine: Engine) -> list[Broken]:
    return [breach for breach in check(seen(engine)) if breach.promise]


def test_a_good_history_keeps_every_promise(engine: Engine) -> None:
    one_job(engine)
    assert broken(engine) == []
    assert tally(seen(engine).changes, seen(engine).spans)[ANY_FAULT] == {
        "submit": 2,
        "claim": 1,
        "heartbeat": 1,
        "finish": 1,
    }
    assert {change.what for change in seen(engine).changes} >= {"job", "attempts", "events", "adapters"}


def test_a_living_attempt_that_is_ended_as_lost_is_found(engine: Engine) -> None:
    """As by a round for the fleet that looks at no lease."""
    store = Store(engine)
    store.jobs.submit(submission())
    assert isinstance(take(store), Claim)
    assert store.attempts.reap() == []
    with store.begin(read_only=False) as tx:
        _end_lost(tx, read_job(tx, 1), "box:0 was silent for 60 s", tx.now())
    early, spared = (breach.what for breach in broken(engine) if breach.promise == 4)
    assert re.fullmatch(r"attempt 1 of job 1 was ended as lost (59|60)\.\d s before its lease was over", early)
    assert spared == "attempt 1 of job 1 was ended as lost, and no fault had met box:0"


def test_a_write_after_the_end_is_found(engine: Engine) -> None:
    one_job(engine)
    for promise, statement in (
        (2, "INSERT INTO events (job_id, attempt, at, kind, text) VALUES (1, 1, CURRENT_TIMESTAMP, 'note', 'late')"),
        (3, "UPDATE jobs SET message = 'late' WHERE job_id = 1"),
        (1, "UPDATE jobs SET status = 'queued' WHERE job_id = 1"),
    ):
        assert promise not in {breach.promise for breach in broken(engine)}
        with engine.begin() as connection:
            connection.execute(text(statement))
        assert promise in {breach.promise for breach in broken(engine)}
