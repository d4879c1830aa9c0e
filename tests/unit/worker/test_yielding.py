"""A long training yields its card to short ones, in a held lab; decisions alone: common/store/test_yielding.py."""

from __future__ import annotations

import math

import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.store.tables import Job
from loractl.worker.attempt import stops

from ... import quick_trainer
from ...held_lab import HeldLab
from ...quick_trainer import SLOW

LEAST_S = 1.0
UNSAVED = "--set=training.save_steps=100000"


@pytest.fixture
def lab(held: HeldLab) -> HeldLab:
    """In which a job yields after a second, twice as long after each stop."""
    held.store.lab.set("give-way", str(LEAST_S))
    return held


def long_one(lab: HeldLab, steps: int = 400, name: str = "long") -> int:
    """A training of 20 s with 400 steps. Only a stop stores a checkpoint of it."""
    return lab.submit(UNSAVED, f"--set=labels.{SLOW}=very", name=name, steps=steps)


def short_one(lab: HeldLab, name: str = "short") -> int:
    job_id = lab.submit(name=name, user="bob")
    lab.change(job_id, work_left_s=1.0)
    return job_id


def ended(job: Job) -> bool:
    return job.status is Status.SUCCEEDED


def resumed(lab: HeldLab, job_id: int) -> list[int]:
    """The step from which each further attempt went on."""
    return [attempt.resumed_from_step or 0 for attempt in lab.store.attempts.of_job(job_id)[1:]]


def test_a_short_job_starts_in_seconds_and_the_long_one_goes_on_after_it(lab: HeldLab) -> None:
    lab.start()
    long = long_one(lab)
    lab.until(long, lambda job: (job.step or 0) >= 30)
    short, came = short_one(lab), lab.clock.now()
    lab.until(short, lambda job: (job.step or 0) >= 1)
    assert lab.clock.now() - came < 5, "a round, a heartbeat, a step and a claim"
    lab.until(short, ended)
    given = lab.store.attempts.of_job(long)[0]
    assert (given.reason, given.message) == (Reason.PREEMPTED, f"gave way to job {short}, which is much shorter")
    done = lab.until(long, ended)
    assert (done.attempt, done.retries_used, done.stops) == (2, 0, 1)
    assert resumed(lab, long)[0] >= 30, "no step was lost"
    assert f"asked to give way to job {short} (much shorter: 1 s against" in lab.cli("status", long, "--full")
    assert f"takes the room of job {long} on heron:0" in lab.cli("status", short, "--full")


def test_short_jobs_that_keep_coming_stop_a_long_one_no_more_often_than_its_bound(lab: HeldLab) -> None:
    lab.start()
    long, began, short = long_one(lab, steps=500), lab.clock.now(), list[int]()
    lab.until(long, lambda job: (job.step or 0) >= 1)
    while not ended(lab.store.jobs.get(long)):
        assert lab.clock.now() - began < 400
        short.append(short_one(lab, f"short-{len(short)}"))
        lab.clock.sleep(2.0)
    for job_id in short:
        lab.until(job_id, ended)
    attempts = lab.store.attempts.of_job(long)
    ran_s = sum((one.ended_at - one.started_at).total_seconds() for one in attempts if one.ended_at is not None)
    stops = lab.reasons(long).count(Reason.PREEMPTED)
    assert 2 <= stops <= math.log2(ran_s / LEAST_S + 1)
    assert lab.store.jobs.get(long).stops == stops
    assert resumed(lab, long) == sorted(resumed(lab, long)), "each attempt goes further"


def test_of_two_boxes_one_job_yields_and_goes_on_where_it_fits(lab: HeldLab) -> None:
    for box in ("heron", "owl"):
        lab.start_box(box)
    longs = [long_one(lab, name=f"long-{n}") for n in range(2)]
    for job_id in longs:
        lab.until(job_id, lambda job: (job.step or 0) >= 30)
    short = short_one(lab)
    lab.until(short, ended)
    for job_id in longs:
        lab.until(job_id, ended)
    assert sum(lab.store.jobs.get(job_id).stops for job_id in longs) == 1


def test_a_person_may_keep_a_running_job_on_its_card(lab: HeldLab) -> None:
    lab.start()
    long = long_one(lab, steps=300)
    lab.until(long, lambda job: (job.step or 0) >= 10)
    lab.cli("edit", long, "--set", "preemptible=false")
    short = short_one(lab)
    lab.until(long, ended)
    lab.until(short, ended)
    assert lab.reasons(long) == [Reason.OK]


def test_a_lab_s_owner_turns_it_off_and_says_the_time(lab: HeldLab) -> None:
    assert "run for 30 min" in lab.cli("lab", "give-way", "30m")
    assert lab.store.lab.setting("give-way") == "1800.0"
    assert "no more" in lab.cli("lab", "give-way", "off")
    assert "on, off, or a time like 30m" in lab.cli("lab", "give-way", "soon", code=2)
    lab.cli("lab", "give-way", "on")
    assert lab.store.lab.setting("give-way") == "on"


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes twice as long as a drain waits for it."""
    monkeypatch.setattr(stops, "DRAIN_GRACE_S", 3.0)
    monkeypatch.setattr(quick_trainer, "STEP_S", 6.0)


def begun(lab: HeldLab) -> int:
    """A long job in a step that gives way to another."""
    long = long_one(lab, steps=100)
    lab.until(long, lambda job: (job.step or 0) >= 2)
    short_one(lab)
    lab.until(long, lambda job: job.preempted_by is not None)
    return long


def test_a_job_ends_the_step_that_it_is_in_before_it_gives_way(lab: HeldLab, slow_steps: None) -> None:
    lab.start()
    long = begun(lab)
    job = lab.until(long, lambda job: job.status is Status.QUEUED)
    assert lab.reasons(long) == [Reason.PREEMPTED]
    assert job.checkpoint is not None and job.checkpoint["step"] == job.step


def test_a_drain_waits_no_longer_for_a_job_that_gives_way(lab: HeldLab, slow_steps: None) -> None:
    places = lab.start()
    long = begun(lab)
    began = lab.clock.now()
    lab.stop(places)
    assert lab.clock.now() - began < 5.0
    assert lab.reasons(long) in ([Reason.PREEMPTED], [Reason.DRAINED])
