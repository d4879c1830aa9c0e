"""`python -m benchmarks.placement --lab`: what each order would have done with the lab's own jobs."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from pytest import CaptureFixture

from loractl.common.job.status import Reason
from loractl.common.placement.duration import UNKNOWN_S
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from ...factories import RESULT, Clock, submission, take

DAY = dt.timedelta(days=1)


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are no part of the package: they are run from the repository's root."""
    monkeypatch.syspath_prepend(Path(__file__).parents[4])


def ran(store: Store, clock: Clock, seconds: float, user: str = "ada", reason: Reason = Reason.OK) -> int:
    """A job that had its card for so long."""
    store.jobs.submit(submission(user=user))
    claim = take(store, node="box:0", total=48)
    assert isinstance(claim, Claim)
    clock.forward(seconds)
    store.attempts.finish(claim, reason, "done", Progress(), RESULT if reason is Reason.OK else None)
    return claim.job_id


def test_the_lab_s_ended_jobs_are_replayed_on_its_cards_under_each_order(
    timed: Store, clock: Clock, capsys: CaptureFixture[str]
) -> None:
    from benchmarks.placement import lab_cards, lab_jobs, print_lab

    early = ran(timed, clock, 60)
    clock.forward(31 * DAY.total_seconds())
    jobs = [ran(timed, clock, seconds, user) for seconds, user in ((7200, "ada"), (100, "bob"))]
    ran(timed, clock, 50, reason=Reason.BAD_DATA)
    now = timed.now()
    found = lab_jobs(timed, now - 30 * DAY, now)
    assert [(job.waiting.job_id, job.waiting.user, job.seconds) for job in found] == [
        (jobs[0], "ada", 7200.0),
        (jobs[1], "bob", 100.0),
    ], "neither the early one nor the one that failed"
    assert early not in jobs
    assert [job.waiting.left_s for job in found] == [60.0, UNKNOWN_S], "as they were predicted then"
    (card,) = lab_cards(timed)
    assert card.open and not card.running
    print_lab(timed, 30)
    said = capsys.readouterr().out
    assert "2 jobs of 2 users in 30 days on 1 cards" in said
    assert [line.split()[1] for line in said.splitlines()[2:]] == ["bound", "before", "order", "gives"]


def test_a_lab_without_ended_jobs_is_told_so(timed: Store, capsys: CaptureFixture[str]) -> None:
    from benchmarks.placement import print_lab

    print_lab(timed, 30)
    assert capsys.readouterr().out.startswith("There is nothing to replay: in 30 days no job has ended")
