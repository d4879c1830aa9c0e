"""What an ended attempt leaves on its box and in the store."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from loractl.common.artifacts import checkpoint_prefix
from loractl.common.job.status import Reason, Status
from loractl.common.settings import load_settings
from loractl.common.store.records import Claim, Over, Progress, StoredCheckpoint
from loractl.common.store.store import ResultVerbs, Store
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.result import READY, clean, make_room
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.device.devices import CpuDevice

from ...databases import SQLITE_ALONE
from ..factories import submission, take


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A box, its store of artifacts, and one job."""

    place: Workplace
    folder: Path

    def attempt(self) -> SupervisedAttempt:
        """A claimed attempt that has saved three checkpoints, the newest of them in the store, too."""
        claim = take(self.place.store)
        assert isinstance(claim, Claim)
        state = begin(claim, self.place.settings.work_dir)
        for step in (5, 10, 15):
            saved = state.folder / "checkpoints" / f"checkpoint-{step}"
            saved.mkdir(parents=True)
            (saved / "optimizer.pt").write_bytes(bytes(10))
        kept = StoredCheckpoint(step=15, prefix=checkpoint_prefix(claim.job_id, claim.attempt, 15))
        self.place.artifacts.put_result(saved, kept.prefix)
        assert self.place.store.attempts.keep_checkpoint(claim, kept)
        return state

    def end(self, state: SupervisedAttempt, reason: Reason) -> Status | None:
        return self.place.store.attempts.finish(state.claim, reason, "why", Progress())

    def local(self) -> list[str]:
        work = self.place.settings.work_dir
        return sorted(path.relative_to(work).as_posix() for path in work.glob("1/*/*/*"))

    def stored(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("artifacts/jobs/1/checkpoints/*"))


@pytest.fixture
def bench(store: Store, tmp_path: Path) -> Bench:
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    place = Workplace(
        settings=settings, store=store, artifacts=StoreClient(settings.artifacts_url),
        device=CpuDevice(total=1), node="box:0", drain=Drain(),
    )  # fmt: skip
    store.jobs.submit(submission(max_retries=0))
    return Bench(place=place, folder=tmp_path)


@SQLITE_ALONE
def test_a_job_that_was_queued_again_meanwhile_keeps_its_files(bench: Bench) -> None:
    """A person's retry and the next attempt's start, both between the end of an attempt and its cleaning up."""
    first = bench.attempt()
    ended = bench.end(first, Reason.CANCELLED)
    bench.place.store.jobs.retry(1, "ada")
    second = bench.attempt()
    clean(bench.place, first, ended)
    assert {path for path in bench.local() if "attempt-2" in path} == {
        f"1/attempt-2/checkpoints/checkpoint-{step}" for step in (5, 10, 15)
    }
    row = bench.place.store.jobs.get(1)
    assert row.checkpoint is not None and "2-15" in bench.stored(), "what the row names is there"

    ended = bench.end(second, Reason.CANCELLED)
    clean(bench.place, second, ended)
    assert (bench.local(), bench.stored()) == ([], [])


@SQLITE_ALONE
def test_a_job_that_was_queued_again_and_has_not_begun_keeps_its_files(bench: Bench) -> None:
    first = bench.attempt()
    ended = bench.end(first, Reason.CANCELLED)
    bench.place.store.jobs.retry(1, "ada")
    clean(bench.place, first, ended)
    assert bench.local() == [f"1/attempt-1/checkpoints/checkpoint-{step}" for step in (10, 15)]


@SQLITE_ALONE
def test_what_a_failed_job_leaves_is_bounded(bench: Bench) -> None:
    first = bench.attempt()
    clean(bench.place, first, bench.end(first, Reason.DRAINED))
    second = bench.attempt()
    (second.folder / "keeping" / "step-15").mkdir(parents=True)
    (second.folder / "result" / "adapter").mkdir(parents=True)
    (second.folder / READY).write_text("{}")
    clean(bench.place, second, bench.end(second, Reason.STORE_FAILED))
    kept = [f"1/attempt-2/checkpoints/checkpoint-{step}" for step in (10, 15)]
    assert bench.local() == [*kept, "1/attempt-2/result/adapter"]
    assert bench.place.store.jobs.get(1).checkpoint is not None and "2-15" in bench.stored()


@SQLITE_ALONE
def test_of_checkpoints_the_newest_stay_though_the_box_s_clock_has_gone_back(bench: Bench) -> None:
    first = bench.attempt()
    clean(bench.place, first, bench.end(first, Reason.DRAINED))
    second, now = bench.attempt(), time.time()
    for path in bench.place.settings.work_dir.glob("1/*/*/*"):
        step = int(path.name.rpartition("-")[2])
        os.utime(path, (now - step, now - step - 3600 * (path.parents[1].name == "attempt-2")))
    clean(bench.place, second, bench.end(second, Reason.DRAINED))
    assert bench.local() == [f"1/attempt-2/checkpoints/checkpoint-{step}" for step in (10, 15)]


@SQLITE_ALONE
def test_what_ended_jobs_left_makes_room_for_the_next_job_and_their_histories_say_so(bench: Bench) -> None:
    first = bench.attempt()
    clean(bench.place, first, bench.end(first, Reason.TIMED_OUT))
    waiting = bench.place.store.jobs.submit(submission())
    second = bench.attempt()
    clean(bench.place, second, bench.end(second, Reason.DRAINED))
    make_room(bench.place, bench.folder, 1)
    assert bench.local(), "there is room"
    make_room(bench.place, bench.folder, 1 << 60)
    assert bench.local() == []
    assert list(bench.place.settings.work_dir.glob(f"{waiting}/*/*/*")), "what a waiting job goes on from stays"
    text = f"what it left on {bench.place.settings.host} is removed: its disk was needed for another job"
    assert [event.text for event in bench.place.store.jobs.events(1)][-1] == text


class JobsAreRetriedNow(ResultVerbs):
    """Results in a lab where a person has just queued a job again."""

    retry: Callable[[], object]

    def over(self, job_ids: Collection[int], kept_since: dt.datetime | None = None) -> Over:
        told = super().over(job_ids, kept_since)
        self.retry()
        return told


@SQLITE_ALONE
def test_a_job_that_is_queued_again_while_another_makes_room_keeps_its_files(bench: Bench) -> None:
    first, store = bench.attempt(), bench.place.store
    clean(bench.place, first, bench.end(first, Reason.TIMED_OUT))
    store.results = results = JobsAreRetriedNow(store.begin)
    results.retry = lambda: store.jobs.retry(1, "ada")
    make_room(bench.place, bench.folder, 1 << 60)
    assert bench.local() == [f"1/attempt-1/checkpoints/checkpoint-{step}" for step in (10, 15)]


class JobsEndNow(ResultVerbs):
    """Results in a lab where jobs that have just ended remove what they left here."""

    work: Path

    def over(self, job_ids: Collection[int], kept_since: dt.datetime | None = None) -> Over:
        told = super().over(job_ids, kept_since)
        shutil.rmtree(self.work / "1")
        return told


def test_a_job_that_ends_while_another_makes_room_costs_that_one_nothing(bench: Bench) -> None:
    first = bench.attempt()
    bench.end(first, Reason.CANCELLED)
    bench.place.store.jobs.submit(submission())
    second = bench.attempt()
    clean(bench.place, second, bench.end(second, Reason.TIMED_OUT))
    store, work = bench.place.store, bench.place.settings.work_dir
    store.results = results = JobsEndNow(store.begin)
    results.work = work
    make_room(bench.place, bench.folder, 1 << 60)
    assert bench.local() == [] and not list(work.glob("2/*"))
    assert not [event for event in store.jobs.events(1) if event.kind == "removed"]
