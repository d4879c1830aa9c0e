"""What edit, retry and cancel do with several jobs, and what cancel says of one that ends while it is asked to stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection, Engine, event

from loractl.common.errors import UsageError, WrongState
from loractl.common.job.status import Reason, Stage, Status
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import JobVerbs, Store
from loractl.common.store.tables import Job
from loractl.scheduler.change.command import AT_ONCE, cancel, edit, retry

from ...factories import RESULT, submission, take


def test_a_job_that_ends_in_between_is_not_said_to_be_stopping(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    ended, runs, waits = (store.jobs.submit(submission()) for _ in range(3))
    claim, other = take(store), take(store)
    assert isinstance(claim, Claim) and isinstance(other, Claim) and (claim.job_id, other.job_id) == (ended, runs)
    asked = vars(JobVerbs)["cancel_open"]

    def ends_at_once(self: JobVerbs, job_ids: Sequence[int], user: str, **how: bool) -> list[Job]:
        jobs: list[Job] = asked.__get__(self, JobVerbs)(job_ids, user, **how)
        store.attempts.finish(claim, Reason.OK, "done", Progress(), RESULT)
        return jobs

    monkeypatch.setattr(JobVerbs, "cancel_open", ends_at_once)
    told = CliRunner(env=environment).invoke(cancel, [str(n) for n in (ended, runs, waits)])
    assert told.exception is None, told.exception
    first, second, third = told.output.splitlines()
    assert first == f"Job {ended} has succeeded."
    assert second.startswith(f"Job {runs} is being stopped on box:0; nothing of its training is kept")
    assert third == f"Job {waits} is cancelled."
    store.attempts.beat(other, Progress(stage=Stage.STORING))
    told = CliRunner(env=environment).invoke(cancel, [str(runs)])
    assert told.output.startswith(f"Job {runs} has ended its training: it succeeds once its result is stored")


@pytest.mark.parametrize("count", [1, 2])
def test_of_those_that_wait_one_that_starts_in_between_runs_on(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    started, *others = (store.jobs.submit(submission()) for _ in range(count))
    listed = vars(JobVerbs)["matching"]

    def starts_then(self: JobVerbs, **asked: object) -> list[Job]:
        jobs: list[Job] = listed.__get__(self, JobVerbs)(**asked)
        assert isinstance(claim := take(store), Claim) and claim.job_id == started
        return jobs

    monkeypatch.setattr(JobVerbs, "matching", starts_then)
    told = CliRunner(env=environment).invoke(cancel, ["--user", "me", "--queued"])
    assert told.exit_code == 1 and not store.jobs.get(started).cancel_requested
    assert told.stdout.splitlines() == [f"Job {n} is cancelled." for n in others]
    assert "has started meanwhile" in (told.stderr or str(told.exception))


def test_of_several_jobs_those_that_can_t_take_a_change_are_named_and_the_others_take_it(upgraded_home: Path) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    has_it = store.jobs.submit(submission(priority=5))
    of_pairs = store.jobs.submit(submission(task_type="preference"))
    runs, waits = store.jobs.submit(submission(priority=9)), store.jobs.submit(submission())
    assert isinstance(claim := take(store), Claim) and claim.job_id == runs
    every = [str(n) for n in (has_it, of_pairs, runs, waits)]
    told = CliRunner(env=environment).invoke(edit, [*every, "--set", "training.label_smoothing_factor=0.1"])
    assert told.exit_code == 1
    assert [line.partition(":")[0] for line in told.stdout.splitlines()] == [
        f"Job {n} is changed" for n in (has_it, waits)
    ]
    first, second = told.stderr.splitlines()
    assert first.startswith(f"Error: job {of_pairs}: --set: training.label_smoothing_factor: ")
    assert second.startswith("Error: training.label_smoothing_factor can't change while job 3 runs")
    again = CliRunner(env=environment).invoke(edit, [*every, "--set", "priority=5"])
    assert again.exit_code == 1
    assert again.stderr == f"Error: job {has_it} has these settings already\n"
    assert [store.jobs.get(int(n)).priority for n in every] == [5] * 4
    wrong = CliRunner(env=environment).invoke(edit, [*every[:2], "--set", "priorty=5"])
    assert wrong.stderr.splitlines() == [
        f"Error: job {n}: --set: priorty: unknown key (did you mean priority?)" for n in every[:2]
    ]
    alone = CliRunner(env=environment).invoke(edit, [every[0], "--set", "priority=5"])
    assert isinstance(alone.exception, UsageError)


def test_retry_queues_a_job_that_has_these_settings_already(upgraded_home: Path) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    has_it, other, waits = (store.jobs.submit(submission(priority=n)) for n in (5, 0, 5))
    store.jobs.cancel(has_it, "ada")
    store.jobs.cancel(other, "ada")
    told = CliRunner(env=environment).invoke(retry, [f"{has_it}-{waits}", "--set", "priority=5"])
    assert told.stdout.splitlines() == [
        f"Job {has_it} is queued again.", f"Job {other} is queued again: priority 0 -> 5."
    ]  # fmt: skip
    assert told.exit_code == 1 and f"job {waits}" in told.stderr and "can be retried" in told.stderr
    assert [store.jobs.get(n).status for n in (has_it, other)] == [Status.QUEUED] * 2


def test_the_followers_of_a_sweep_s_members_are_cancelled_with_it(upgraded_home: Path) -> None:
    """First, so that none starts once the last member has ended."""
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    varied = NewSweep(name="tuned", varied={"lora.r": "8,16"}, rungs=None, trials=None, seed=None)
    number = store.sweeps.submit(varied, [submission(), submission()])
    first, second = (member.job_id for member in store.sweeps.get(number).members)
    after = store.jobs.submit(submission(after=[second]))
    last = store.jobs.submit(submission(after=[after]))
    other = store.jobs.submit(submission())
    told = CliRunner(env=environment).invoke(cancel, ["--sweep", str(number), "--with-followers"])
    assert told.exception is None, told.exception
    assert told.stdout.splitlines() == [f"Job {n} is cancelled." for n in (last, after, first, second)]
    assert store.jobs.get(other).status is Status.QUEUED


def test_many_are_cancelled_in_few_transactions_and_those_that_can_t_be_are_named(upgraded_home: Path) -> None:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    first = store.jobs.submit(submission())
    behind = store.jobs.submit_all([submission(after=[first]) for _ in range(AT_ONCE + 20)])
    store.jobs.cancel(behind[5], "ada")
    ends: list[Connection] = []
    note = ends.append
    event.listen(Engine, "commit", note)
    try:
        told = CliRunner(env=environment).invoke(cancel, [f"{first}-{behind[-1]}"])
    finally:
        event.remove(Engine, "commit", note)
    assert told.exit_code == 1
    assert told.stdout.splitlines() == [f"Job {n} is cancelled." for n in (first, *behind) if n != behind[5]]
    assert told.stderr.splitlines() == [f"Error: job {behind[5]} has already been cancelled"]
    assert len(ends) < 12, "a transaction for each took 24 ms"


def test_a_ctrl_c_among_the_followers_leaves_the_sweep_alone(
    upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not one of them that has ended meanwhile: then the others go on, and the sweep is cancelled."""
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    store = Store(connect(load_settings(environment)))
    varied = NewSweep(name="tuned", varied={"lora.r": "8,16"}, rungs=None, trials=None, seed=None)
    number = store.sweeps.submit(varied, [submission(), submission()])
    members = [member.job_id for member in store.sweeps.get(number).members]
    follower = store.jobs.submit(submission(after=[members[1]]))
    asked, failing = vars(JobVerbs)["cancel"], [KeyboardInterrupt(), WrongState("it has succeeded")]

    def fails(self: JobVerbs, job_id: int, user: str, **how: bool) -> Job:
        if job_id == follower:
            raise failing.pop(0)
        return asked.__get__(self, JobVerbs)(job_id, user, **how)

    monkeypatch.setattr(JobVerbs, "cancel", fails)
    CliRunner(env=environment).invoke(cancel, ["--sweep", str(number), "--with-followers"])
    assert [store.jobs.get(n).status for n in members] == [Status.QUEUED] * 2
    told = CliRunner(env=environment).invoke(cancel, ["--sweep", str(number), "--with-followers"])
    assert isinstance(told.exception, WrongState) and not failing
    assert [store.jobs.get(n).status for n in members] == [Status.CANCELLED] * 2
