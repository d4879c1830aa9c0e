"""Lines in memory: the first of each, and the next."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.placement.lines import Lines, Waiting, in_turn

from .scenes import random_job


def work(job: Waiting) -> tuple[float, int]:
    return job.left_s, job.job_id


def some_jobs(rng: random.Random, count: int = 30) -> list[Waiting]:
    """Jobs of a few forms."""
    forms = [random_job(rng, 0, 0) for _ in range(5)]
    return [replace(rng.choice(forms), job_id=n, left_s=rng.choice((60.0, 3600.0))) for n in range(count)]


@given(st.integers(0, 10**6))
def test_all_jobs_come_once_and_by_rank(seed: int) -> None:
    """Also if a rank grows meanwhile, and after jobs were taken out."""
    rng = random.Random(seed)
    jobs = some_jobs(rng)
    queue, use = Lines(jobs, work), dict.fromkeys("abc", 0.0)
    for job in rng.sample(jobs, 10):
        queue.remove(job)
        jobs.remove(job)

    def rank(job: Waiting) -> tuple[float, float, int]:
        return use[job.user], job.left_s, job.job_id

    for job in in_turn(queue, queue.firsts(), rank, lambda job: True):
        assert job == min(jobs, key=rank)
        jobs.remove(job)
        use[job.user] += rng.choice((0, 1))
    assert jobs == []


@given(st.integers(0, 10**6))
def test_of_a_line_that_does_not_go_on_no_more_is_read(seed: int) -> None:
    rng = random.Random(seed)
    jobs = some_jobs(rng)
    queue = Lines(jobs, work)
    found = list(in_turn(queue, queue.firsts(also={3}), lambda job: job.job_id, lambda job: False))
    assert {job.line for job in found} == {job.line for job in jobs}
    for line in {job.line for job in jobs}:
        mine = [job for job in jobs if job.line == line]
        first, oldest = min(mine, key=work), min(mine, key=lambda job: job.job_id)
        assert {job.job_id for job in found if job.line == line} - {3} == {first.job_id, oldest.job_id} - {3}
