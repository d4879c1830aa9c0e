"""What loractl gc takes and what it leaves, on each database with each kind of store."""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from loractl.common.artifacts import (
    ArtifactStore,
    Binding,
    Manifest,
    attempt_prefix,
    checkpoint_prefix,
    manifest_sha256,
)
from loractl.common.binding import result_binding
from loractl.common.errors import ArtifactError, UsageError
from loractl.common.files import Folder, Unfinished, open_files
from loractl.common.job.names import parse_reference
from loractl.common.job.status import Reason
from loractl.common.settings import Settings, load_settings
from loractl.common.store.records import Claim, Progress, StoredCheckpoint, StoredResult
from loractl.common.store.store import Store
from loractl.common.store.tables import Attempt, Event, Job, LogChunk, MetricPoint
from loractl.scheduler.garbage.cleaner import Cleaner, Cleared, Garbage, Kind, Policy

from .... import services
from ....conftest import kept_engine
from ...factories import Clock, submission, take

MONTH = dt.timedelta(days=30)


class BreaksOff(ArtifactStore):
    """A store that goes away after so many removals. `late`: it does the next one, too, but the answer is lost."""

    left, late = 0, False

    def remove(self, name: str) -> None:
        if self.left == 0:
            if self.late:
                super().remove(name)
            raise ArtifactError("the store has gone away")
        self.left -= 1
        super().remove(name)


@dataclass(kw_only=True)
class Lab:
    """A database, a store and a home, with a clock that stands at the time of day."""

    settings: Settings
    store: Store
    artifacts: ArtifactStore
    clock: Clock
    folder: Path

    def run(self, reason: Reason, name: str = "a") -> int:
        """A job with one ended attempt that has stored a file of 1000 bytes."""
        self.clock.forward(60)
        job_id = self.store.jobs.submit(submission(name=name, max_retries=3))
        self.attempt(reason)
        return job_id

    def attempt(self, reason: Reason | None) -> Claim:
        """Of the next waiting job; None: it goes on running."""
        claim = take(self.store)
        assert isinstance(claim, Claim)
        prefix = attempt_prefix(claim.job_id, claim.attempt)
        manifest = self.stores(prefix)
        if reason is not None:
            uri = f"{self.artifacts.url}/{prefix}"
            result = StoredResult(
                adapter_uri=f"{uri}/adapter",
                report_uri=f"{uri}/report.json",
                adapter_size=1000,
                adapter_sha256="0" * 64,
                manifest_sha256=manifest_sha256(manifest),
            )
            self.store.attempts.finish(
                claim, reason, "done", Progress(log="x" * 500), result if reason is Reason.OK else None
            )
        return claim

    def stores(self, prefix: str) -> Manifest:
        source = self.folder / "source" / prefix.replace("/", "-")
        source.mkdir(parents=True, exist_ok=True)
        (source / "weights").write_bytes(b"x" * 500)
        (source / "log.txt").write_bytes(b"x" * 500)
        return self.artifacts.put_result(source, prefix)

    def begins(self, name: str) -> None:
        """An upload that is killed before its end."""
        files = open_files(self.artifacts.url)
        if isinstance(files, Folder):
            files.write(f"{name}.part-123", b"half")
        else:
            bucket, key, _ = files._fs.split_path(files._at(name))
            upload = files._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
            files._fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")

    def data(self, content: str, job_id: int | None = None) -> str:
        """A stored data set, named by a job."""
        path = self.folder / "d.jsonl"
        path.write_text(content)
        uri, digest = self.artifacts.put_dataset(path)
        if job_id is not None:
            data = {"path": {"uri": uri, "sha256": digest}}
            with Session(self.store.engine) as session, session.begin():
                session.execute(update(Job).where(Job.job_id == job_id).values(data=data))
        return f"datasets/{digest}.jsonl"

    def cleaner(
        self, keep_last: int | None = None, artifacts: ArtifactStore | None = None, past_jobs: bool = False
    ) -> Cleaner:
        policy = Policy(keep_last=keep_last, older_than=MONTH, past_jobs=past_jobs)
        return Cleaner(self.settings, self.store, artifacts or self.artifacts, policy)

    def held(self) -> set[str]:
        return {held.name for part in ("jobs", "datasets") for held in self.artifacts.holdings(part)}

    def rows_lead_somewhere(self) -> None:
        """Every result that a row names is whole."""
        for job in self.store.jobs.matching():
            if job.report_uri is not None:
                self.artifacts.verify(result_binding(self.store, job))
        assert {a.job_id for a in self.store.adapters.all()} == {
            j.job_id for j in self.store.jobs.matching() if j.report_uri
        }


@pytest.fixture(params=["embedded", "lab"])
def lab(
    request: pytest.FixtureRequest, shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    folder = shared_folder / f"home-{os.getpid()}"  # always the same, as the engine that is kept for its database
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    home = {"LORACTL_HOME": str(folder), "LORACTL_USER": "ada"}
    if request.param == "embedded":
        shutil.copy(request.getfixturevalue("sqlite_template"), folder / "loractl.db")
    else:
        server: services.S3 = request.getfixturevalue("s3_server")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        home["LORACTL_DATABASE_URL"] = (kept := request.getfixturevalue("kept_postgres")).url()
        home["LORACTL_ARTIFACTS_URL"] = f"{server.url}/{tmp_path.name}"
    settings, clock = load_settings(home), Clock()
    clock.now = dt.datetime.now(dt.UTC)
    engine = kept_engine(settings.database_url)
    artifacts = ArtifactStore(settings.artifacts_url)
    yield Lab(settings=settings, store=Store(engine, clock), artifacts=artifacts, clock=clock, folder=tmp_path)
    engine.dispose()
    if request.param == "lab":
        kept.empty()


EMBEDDED = pytest.mark.parametrize("lab", ["embedded", pytest.param("lab", marks=pytest.mark.long)], indirect=True)
"""For tests of what the cleaner decides: other tests send each of its statements to PostgreSQL, and its calls to S3."""


def names(found: Iterator[Garbage], *kinds: Kind) -> set[str]:
    return {garbage.name for garbage in found if not kinds or garbage.kind in kinds}


def test_what_attempts_left_goes_and_results_and_running_attempts_stay(lab: Lab) -> None:
    result = lab.run(Reason.OK)
    failed = lab.run(Reason.DIVERGED)
    lab.run(Reason.DRAINED)
    running = lab.attempt(None)
    for job_id in (result, failed, running.job_id):
        lab.stores(f"jobs/{job_id}/checkpoints/checkpoint-3")

    wanted = {f"jobs/{failed}/attempt-1", f"jobs/{running.job_id}/attempt-1"}
    wanted |= {f"jobs/{job_id}/checkpoints" for job_id in (result, failed)}
    before = lab.held()
    assert names(lab.cleaner().find(), Kind.ATTEMPT, Kind.CHECKPOINTS) == wanted
    assert [(g.name, g.size) for g in lab.cleaner().find() if g.kind is Kind.LOG] == [(f"jobs/{result}/attempt-1", 500)]
    assert lab.held() == before, "a dry run changes nothing"

    gone = list(lab.cleaner().remove())
    assert names(iter(gone), Kind.ATTEMPT, Kind.CHECKPOINTS) == wanted
    assert all(g.size > 1000 for g in gone if g.kind is not Kind.LOG)
    assert lab.held() == before - wanted
    assert lab.held() >= {f"jobs/{result}/attempt-1", f"jobs/{running.job_id}/attempt-2"}
    assert list(lab.cleaner().remove()) == []
    assert lab.store.results.spent_logs() == [], "the log of the result is stored with it"
    lab.rows_lead_somewhere()


@EMBEDDED
def test_results_beyond_the_newest_go_only_when_asked_for(lab: Lab) -> None:
    old, newer, other = lab.run(Reason.OK), lab.run(Reason.OK), lab.run(Reason.OK, name="b")
    assert names(lab.cleaner().find(), Kind.RESULT) == set()
    assert names(lab.cleaner(keep_last=1).find(), Kind.RESULT) == {f"jobs/{old}/attempt-1"}
    assert names(lab.cleaner(keep_last=1).remove(), Kind.RESULT) == {f"jobs/{old}/attempt-1"}
    assert lab.held() == {f"jobs/{job_id}/attempt-1" for job_id in (newer, other)}
    assert [a.job_id for a in lab.store.adapters.all()] == [newer, other]
    assert lab.store.jobs.events(old)[-1].text == "adapter and report removed by ada (loractl gc)"
    lab.rows_lead_somewhere()


@pytest.mark.parametrize(
    ("lab", "removals"),
    [
        *(("embedded", removals) for removals in range(4)),
        *(pytest.param("lab", removals, marks=[] if removals == 2 else pytest.mark.long) for removals in range(4)),
    ],
    indirect=["lab"],
)
def test_a_crash_leaves_no_row_that_leads_to_nothing_and_the_next_look_finishes(lab: Lab, removals: int) -> None:
    jobs = [lab.run(Reason.OK) for _ in range(3)]
    lab.run(Reason.DIVERGED)
    breaks = BreaksOff(lab.artifacts.url)
    breaks.left, breaks.late = removals, removals == 1
    try:
        list(lab.cleaner(keep_last=1, artifacts=breaks).remove())
        assert removals == 3
    except ArtifactError:
        lab.rows_lead_somewhere()
    list(lab.cleaner(keep_last=1).remove())
    assert lab.held() == {f"jobs/{jobs[-1]}/attempt-1"}
    lab.rows_lead_somewhere()


def test_what_a_killed_upload_has_left_goes_a_day_later_and_no_file_of_a_result(lab: Lab) -> None:
    kept, failed = lab.run(Reason.OK), lab.run(Reason.DIVERGED)
    lab.store.jobs.submit(submission())
    runs = lab.attempt(None).job_id
    mine = {f"jobs/{kept}/attempt-1/weights", f"jobs/{runs}/checkpoints/1-5/state", f"datasets/{'a' * 64}.jsonl"}
    others = {f"jobs/{failed}/attempt-1/weights", "jobs/notes", "elsewhere"}
    for name in mine | others:
        lab.begins(name)
    assert names(lab.cleaner().find(), Kind.UNFINISHED, Kind.DATA) == set(), "they may go on"
    lab.clock.forward(2 * 86400)
    assert names(lab.cleaner().find(), Kind.UNFINISHED, Kind.DATA) == mine, "that of a failed attempt goes with it"
    assert mine <= names(lab.cleaner().remove(), Kind.UNFINISHED)
    assert names(lab.cleaner().find(), Kind.UNFINISHED) == set()
    lab.rows_lead_somewhere()


def test_a_store_that_lists_no_uploads_ends_no_gc(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    class Silent(ArtifactStore):
        def unfinished(self, before: dt.datetime) -> list[Unfinished]:
            raise ArtifactError("listing what was not ended: Access Denied")

    lab.run(Reason.DIVERGED)
    lab.clock.forward(MONTH.total_seconds())
    assert names(lab.cleaner(artifacts=Silent(lab.artifacts.url)).remove(), Kind.ATTEMPT)
    assert "leftovers of killed uploads stay: listing" in caplog.text


def test_an_upload_that_can_t_be_removed_ends_no_gc(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    class Kept(ArtifactStore):
        def drop(self, file: Unfinished) -> None:
            raise ArtifactError(f"removing {file.name}: Access Denied")

    data = {lab.data("nobody's")}
    lab.begins(f"datasets/{'a' * 64}.jsonl")
    lab.clock.forward(MONTH.total_seconds() + 86400)
    gone = list(lab.cleaner(artifacts=Kept(lab.artifacts.url)).remove())
    assert (names(gone, Kind.DATA), names(gone, Kind.UNFINISHED)) == (data, set())
    assert f"leftovers of a killed upload stay: removing datasets/{'a' * 64}.jsonl" in caplog.text


def test_old_data_go_once_no_job_may_read_them(lab: Lab) -> None:
    waiting = lab.store.jobs.submit(submission(lora=200, qlora=200))
    kept, removed, failed = lab.run(Reason.OK), lab.run(Reason.OK), lab.run(Reason.DIVERGED)
    needed = {lab.data("waiting", waiting), lab.data("kept", kept)}
    unneeded = {lab.data("removed", removed), lab.data("failed", failed), lab.data("nobody's")}
    lab.store.results.remove(removed, "ada")
    assert names(lab.cleaner().find(), Kind.DATA) == set(), "all are new"
    lab.clock.forward(MONTH.total_seconds() + 86400)
    assert names(lab.cleaner().find(), Kind.DATA) == unneeded
    assert names(lab.cleaner(keep_last=1).find(), Kind.DATA) == unneeded
    assert names(lab.cleaner().remove(), Kind.DATA) == unneeded
    assert {n for n in lab.held() if n.startswith("datasets/")} == needed


def test_data_that_are_submitted_while_others_are_removed_stay(lab: Lab) -> None:
    """A slow store takes minutes for many."""
    contents = {lab.data(content): content for content in ("one", "other")}
    later = MONTH.total_seconds() + 86400
    lab.clock.forward(later)
    going = lab.cleaner().remove()
    (second,) = contents.keys() - {next(going).name}
    lab.data(contents[second], lab.store.jobs.submit(submission()))
    lab.clock.forward(-later)  # a store's dates are real: so this one's is new
    assert names(going, Kind.DATA) == set() and second in lab.held()


@EMBEDDED
def test_a_removed_result_needs_its_data_no_more_and_a_dry_run_says_so(lab: Lab) -> None:
    old = lab.run(Reason.OK)
    name = lab.data("old", old)
    lab.clock.forward(MONTH.total_seconds() + 86400)
    lab.run(Reason.OK)
    assert names(lab.cleaner().find(), Kind.DATA) == set()
    assert names(lab.cleaner(keep_last=1).find(), Kind.DATA) == {name}
    assert names(lab.cleaner(keep_last=1).remove(), Kind.DATA) == {name}


def test_what_is_here_goes_when_its_job_has_ended_or_nobody_used_it_for_long(lab: Lab) -> None:
    ended, waiting = lab.run(Reason.DIVERGED), lab.store.jobs.submit(submission(lora=200, qlora=200))
    work, cache = lab.settings.work_dir, lab.settings.cache_dir
    for name in (str(ended), str(waiting), "99", "notes", f"0{ended}"):
        (work / name / "attempt-1").mkdir(parents=True)
        (work / name / "attempt-1" / "log.txt").write_bytes(b"x" * 1000)
    needed = lab.data("needed", waiting).rpartition("/")[2]
    entries = {}
    for part, name in (
        ("datasets", needed), ("datasets", "old"), ("tokenised", "old"), ("tokenised", "new"), ("adapters", "old"),
        ("tokenised", ".part-killed"), ("tokenised", ".part-new"),
    ):  # fmt: skip
        entry = cache / part / name
        entry.mkdir(parents=True)
        (entry / "set.json").write_bytes(b"x" * 500)
        age = 0 if name.endswith("new") else 2 * 86400 if name.endswith("killed") else 40 * 86400
        os.utime(entry, (lab.clock.now.timestamp() - age,) * 2)
        entries[part, name] = entry

    wanted = {
        str(work / str(ended)),
        str(entries["datasets", "old"]),
        str(entries["tokenised", "old"]),
        str(entries["adapters", "old"]),
        str(entries["tokenised", ".part-killed"]),
    }
    here = (Kind.WORK, Kind.CACHE)
    assert names(lab.cleaner().find(), *here) == wanted
    gone = [g for g in lab.cleaner().remove() if g.kind in here]
    assert {(g.name, g.size) for g in gone} == {(n, 1000 if n.startswith(str(work)) else 500) for n in wanted}
    assert {p.name for p in work.iterdir()} == {str(waiting), "99", "notes", f"0{ended}"}
    assert (
        entries["datasets", needed].exists()
        and entries["tokenised", "new"].exists()
        and entries["tokenised", ".part-new"].exists()
    )


def test_a_measurement_goes_when_no_row_names_it_or_nobody_used_it_for_long(lab: Lab) -> None:
    lab.store.jobs.submit(submission())
    claim = take(lab.store, node=f"{lab.settings.host}:0")
    assert isinstance(claim, Claim)
    ages = {"a": 3600, "b": 2 * 86400, "c": 40 * 86400, "d": 3600, "e": 2 * 86400}  # d and e have no row
    lab.store.attempts.beat(claim, Progress(kept=tuple((one * 64, one * 64) for one in "abc")))
    measured = lab.settings.cache_dir / "measured"
    measured.mkdir(parents=True)
    for name, age in ages.items():
        (measured / (name * 64)).write_bytes(b"x")
        os.utime(measured / (name * 64), (lab.clock.now.timestamp() - age,) * 2)
    gone = [(Path(g.name).name[0], g.why) for g in lab.cleaner().remove() if g.kind is Kind.CACHE]
    assert sorted(gone) == [("c", gone[0][1]), ("e", "the database does not name it")]
    assert gone[0][1].startswith("last used") and sorted(path.name[0] for path in measured.iterdir()) == ["a", "b", "d"]


def test_a_job_that_is_retried_after_gc_names_no_checkpoint_that_is_gone(lab: Lab) -> None:
    lab.run(Reason.DRAINED)
    claim = take(lab.store)
    assert isinstance(claim, Claim)
    prefix = checkpoint_prefix(claim.job_id, claim.attempt, 3)
    lab.stores(prefix)
    assert lab.store.attempts.keep_checkpoint(claim, StoredCheckpoint(step=3, prefix=prefix))
    lab.store.attempts.finish(claim, Reason.DRAINED, "stopped", Progress())
    checkpoints = f"jobs/{claim.job_id}/checkpoints"
    assert checkpoints not in names(lab.cleaner().find())
    assert lab.store.results.forget_checkpoint(claim.job_id) is None, "it waits, and goes on from there"

    lab.store.jobs.cancel(claim.job_id, "ada")
    assert names(lab.cleaner().remove(), Kind.CHECKPOINTS) == {checkpoints}
    lab.store.jobs.retry(claim.job_id, "ada")
    again = take(lab.store)
    assert isinstance(again, Claim) and again.checkpoint is None


@EMBEDDED
def test_a_job_that_is_retried_while_gc_removes_what_it_left_here_keeps_its_new_folder(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = lab.run(Reason.DIVERGED)
    before, after = (lab.settings.work_dir / str(job_id) / f"attempt-{number}" for number in (1, 2))
    before.mkdir(parents=True)
    forget = lab.store.results.forget_finished

    def then_retry(*asked: Any) -> bool:
        forgotten = forget(*asked)
        lab.store.jobs.retry(job_id, "ada")
        after.mkdir()
        return forgotten

    monkeypatch.setattr(lab.store.results, "forget_finished", then_retry)
    assert names(lab.cleaner().remove(), Kind.WORK) == {str(before.parent)}
    assert not before.exists() and after.exists()


@EMBEDDED
def test_what_a_retry_stores_while_gc_removes_the_old_checkpoint_stays(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = lab.run(Reason.DIVERGED)
    older, newer = checkpoint_prefix(job_id, 1, 3), checkpoint_prefix(job_id, 2, 1)
    lab.stores(older)
    forget = lab.store.results.forget_checkpoint

    def then_retry(job: int) -> int | None:
        forgotten = forget(job)
        lab.store.jobs.retry(job, "ada")
        claim = take(lab.store)
        assert isinstance(claim, Claim)
        lab.stores(newer)
        assert lab.store.attempts.keep_checkpoint(claim, StoredCheckpoint(step=1, prefix=newer))
        return forgotten

    cleaner = lab.cleaner()
    monkeypatch.setattr(lab.store.results, "forget_checkpoint", then_retry)
    assert names(cleaner.remove(), Kind.CHECKPOINTS) == {f"jobs/{job_id}/checkpoints"}
    assert lab.artifacts.verify(Binding(prefix=newer, manifest_sha256=None))
    with pytest.raises(ArtifactError):
        lab.artifacts.verify(Binding(prefix=older, manifest_sha256=None))


def test_files_of_jobs_that_the_database_does_not_know_are_named_and_left(lab: Lab) -> None:
    lab.stores("jobs/77/attempt-1")
    with pytest.raises(UsageError, match=r"this database does not know: 77\b"):
        lab.cleaner().check_own_store()
    assert list(lab.cleaner().remove()) == []
    assert lab.held() == {"jobs/77/attempt-1"}


@EMBEDDED
def test_log_lines_stay_while_the_stored_log_is_not_the_one_that_its_row_binds(lab: Lab) -> None:
    job_id = lab.run(Reason.OK)
    lab.run(Reason.OK, "b")
    forged = lab.folder / "source" / attempt_prefix(job_id, 1).replace("/", "-") / "log.txt"
    forged.write_bytes(b"nothing happened")
    lab.artifacts.put_result(forged.parent, attempt_prefix(job_id, 1))
    assert [g.job_id for g in lab.cleaner().remove() if g.kind is Kind.LOG] == [job_id + 1]
    assert lab.store.jobs.log(job_id)[0].text.startswith("xxx")


def test_old_jobs_without_a_result_go_with_all_their_rows_when_asked(lab: Lab) -> None:
    kept, failed, tagged = lab.run(Reason.OK), lab.run(Reason.DIVERGED), lab.run(Reason.OK)
    lab.store.adapters.tag(parse_reference(str(tagged)), "prod", "ada")
    cancelled = lab.store.jobs.submit(submission(lora=200, qlora=200))
    lab.store.jobs.cancel(cancelled, "ada")
    waiting = lab.store.jobs.submit(submission(lora=200, qlora=200))
    lab.clock.forward(MONTH.total_seconds() + 86400)
    fresh = lab.run(Reason.DIVERGED)
    rows = (Kind.JOB, Kind.COURSE)
    assert names(lab.cleaner().find(), *rows) == names(lab.cleaner().remove(), *rows) == set(), "nobody asked"
    wanted = {f"{failed} a of ada", f"{cancelled} tiny of ada"}
    found = list(lab.cleaner(past_jobs=True).find())
    assert names(iter(found), *rows) == wanted
    assert min(garbage.size for garbage in found if garbage.kind is Kind.JOB) >= 2000
    assert len(lab.store.jobs.matching()) == 6, "a dry run changes nothing"
    assert names(lab.cleaner(past_jobs=True).remove(), *rows) == wanted
    assert sorted(job.job_id for job in lab.store.jobs.matching()) == [kept, tagged, waiting, fresh]
    with Session(lab.store.engine) as session:
        for table in (Attempt, Event, LogChunk, MetricPoint):
            left = select(func.count()).select_from(table).where(table.job_id.in_([failed, cancelled]))
            assert session.scalar(left) == 0
    assert lab.store.jobs.submit(submission()) > fresh, "a number is never given twice"
    lab.cleaner().check_own_store()
    lab.rows_lead_somewhere()


def test_a_job_with_files_in_the_store_keeps_its_row(lab: Lab) -> None:
    failed = lab.run(Reason.DIVERGED)
    lab.clock.forward(MONTH.total_seconds() + 86400)
    breaks = BreaksOff(lab.artifacts.url)
    with pytest.raises(ArtifactError):
        list(lab.cleaner(artifacts=breaks, past_jobs=True).remove())
    assert lab.store.jobs.get(failed), "else no one could say whose files those are"
    assert names(lab.cleaner(past_jobs=True).remove(), Kind.JOB) == {f"{failed} a of ada"}
    assert lab.store.jobs.matching() == [] and lab.held() == set()


@EMBEDDED
def test_a_dry_run_counts_the_jobs_whose_results_would_go_as_well(lab: Lab) -> None:
    old = lab.run(Reason.OK)
    lab.clock.forward(MONTH.total_seconds() + 86400)
    lab.run(Reason.OK)
    both = lab.cleaner(keep_last=1, past_jobs=True)
    assert names(both.find(), Kind.JOB) == names(both.remove(), Kind.JOB) == {f"{old} a of ada"}


def test_what_went_is_one_value_for_a_program() -> None:
    data = Garbage(kind=Kind.DATA, name="datasets/a.csv", size=100, why="no job needs it")
    log = Garbage(kind=Kind.LOG, name="jobs/1/attempt-1", size=7, why="stored with the result", job_id=1)
    assert Cleared(dry_run=True, removed=(data, log)).as_json() == {
        "dry_run": True,
        "bytes": 100,
        "removed": [
            {"kind": "data set", "name": "datasets/a.csv", "size": 100, "why": "no job needs it"},
            {"kind": "log", "name": "jobs/1/attempt-1", "size": 7, "why": "stored with the result"},
        ],
    }
