"""Garbage: rows, and files in the artifact store and on this machine, that no job and no person needs.

Rows go before files: a crash in between leaves files that no row names, and the next run finds them again. Files of
a job that this database does not know are left alone: another database may know it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore, Holding, attempt_prefix
from loractl.common.binding import result_binding
from loractl.common.errors import AdapterNotFound, ArtifactError, LoractlError, UsageError, WrongState
from loractl.common.files import Unfinished, remove_tree
from loractl.common.settings import Settings
from loractl.common.store.records import PastJob
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import parse_duration

log = logging.getLogger("loractl")

LEAST_AGE = dt.timedelta(days=1)
"""Data and cache entries younger than this are never removed: a submit or a trainer may be about to name them."""

JOBS_AT_ONCE = 200
"""Jobs removed in one transaction: many, since each transaction costs a disk write; few, since others wait for it."""

LONGEST_S = 100 * 365 * 86400.0
"""A longer time means the same, and would exceed the calendar's range."""

_JOB = re.compile(r"jobs/(\d+)/(?:attempt-(\d+)|checkpoints)", re.ASCII)
_NUMBER = re.compile(r"[1-9]\d{0,17}", re.ASCII)


class Kind(enum.StrEnum):
    """What kind of thing goes, in the order of removal."""

    RESULT = "result"  # adapter and report of an older run
    ATTEMPT = "attempt"  # what an attempt stored, but not a result
    CHECKPOINTS = "checkpoints"  # in the store, of an ended job
    UNFINISHED = "unfinished"  # in the store, of a killed upload
    DATA = "data set"
    WORK = "work folder"  # on this machine, of an ended job
    CACHE = "cache"  # on this machine, not used for long
    LOG = "log"  # lines in the database, stored with the result as well
    COURSE = "course"  # values of single steps in the database, of a job that keeps its result
    JOB = "job"  # all rows of a job without a result

    @property
    def is_file(self) -> bool:
        """False: it is in the database, which keeps the space for new rows."""
        return self not in (Kind.LOG, Kind.COURSE, Kind.JOB)


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One thing that is not needed any more."""

    kind: Kind
    name: str  # in the store, a path on this machine, or the attempt that logged the lines
    size: int  # bytes
    why: str
    job_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cleared:
    """What one run has removed, or would remove."""

    dry_run: bool
    removed: tuple[Garbage, ...]

    @property
    def size(self) -> int:
        """Bytes of files; without rows, since a database keeps their space for new ones."""
        return sum(each.size for each in self.removed if each.kind.is_file)

    def as_json(self) -> dict[str, Any]:
        """`dry_run`; `bytes`: of the files; `removed`: each with `kind`, `name`, `size` and `why` nobody needs it."""
        rows = [{"kind": g.kind.value, "name": g.name, "size": g.size, "why": g.why} for g in self.removed]
        return {"dry_run": self.dry_run, "bytes": self.size, "removed": rows}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a person wants to keep."""

    keep_last: int | None  # results of each user and job name; None: all
    older_than: dt.timedelta  # data sets, cache entries, leftovers of failed jobs, past jobs; at least LEAST_AGE
    past_jobs: bool = False  # also remove rows of jobs that ended longer ago than that


def parse_age(text: str) -> dt.timedelta:
    """What --older-than says. Raises UsageError, also below LEAST_AGE."""
    try:
        age = dt.timedelta(seconds=min(parse_duration(text), LONGEST_S))
    except ValueError:
        raise UsageError(f"--older-than {text!r} is not a duration", "write it like 30d or 36h") from None
    if age < LEAST_AGE:
        raise UsageError(
            f"--older-than {text} is too short: a submit may be about to use what it stored", "at least 1d"
        )
    return age


class Cleaner:
    """Finds and removes garbage."""

    def __init__(self, settings: Settings, store: Store, artifacts: ArtifactStore, policy: Policy) -> None:
        self._settings = settings
        self._store = store
        self._artifacts = artifacts
        self._policy = policy

    def check_own_store(self) -> None:
        """Raises UsageError if the store has files of jobs that this database does not know.

        Two databases use the same job numbers: neither may judge what the other's jobs have stored.
        """
        stored = {_job_of(held)[0] for held in self._artifacts.holdings("jobs")}
        if unknown := sorted(stored - self._store.results.over(stored).known):
            numbers = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise UsageError(
                f"the artifact store has files of jobs that this database does not know: {numbers}",
                "check LORACTL_DATABASE_URL and LORACTL_ARTIFACTS_URL; if no other database uses that store: --force",
            )

    def find(self) -> Iterator[Garbage]:
        """What would go; nothing is changed."""
        old = self._old_results()
        gone = {job.job_id for job in old}
        below = [*self._results(old), *self._below_jobs()]
        yield from below
        gone_with = tuple(f"{garbage.name}/" for garbage in below)
        yield from (_unfinished(file) for file in self._unfinished() if not file.name.startswith(gone_with))
        yield from self._data(gone)
        yield from self._work()
        yield from self._cache(gone)
        yield from (_log(*spent) for spent in self._store.results.spent_logs())
        if self._policy.past_jobs:
            yield from (_course(job) for job in self._store.results.courses(self._limit()) if job.job_id not in gone)
            yield from (_past(job) for job in self._store.results.past_jobs(self._limit(), gone))

    def remove(self) -> Iterator[Garbage]:
        """Remove it and yield what was removed. Each kind is looked up just before it goes."""
        for garbage in self._results(self._old_results()):
            assert garbage.job_id is not None
            if self._store.results.remove(garbage.job_id, self._settings.user):
                self._artifacts.remove(garbage.name)
                yield garbage
        for garbage in self._below_jobs():
            assert garbage.job_id is not None
            if garbage.kind is Kind.ATTEMPT:
                self._artifacts.remove(garbage.name)
                yield garbage
            # a job queued again since then continues from its checkpoint, and a retry stores new ones
            elif (attempt := self._store.results.forget_checkpoint(garbage.job_id)) is not None:
                self._artifacts.remove_checkpoints(garbage.job_id, attempt)
                yield garbage
        for file in self._unfinished():
            try:
                self._artifacts.drop(file)
            except ArtifactError as error:  # a key without the right to end them, or a folder that is not writable
                log.warning("leftovers of a killed upload stay: %s", error.sentence)
            else:
                yield _unfinished(file)
        for garbage in self._data():
            # a submit since the listing has given it a new date
            if all(held.changed_at < self._limit() for held in self._artifacts.holdings(garbage.name)):
                self._artifacts.remove(garbage.name)
                yield garbage
        for garbage in self._work():
            # a job queued again since the listing continues from there, and its next attempt has a folder of its own
            folder = Path(garbage.name)
            left = _children(folder) if folder.is_dir() and not folder.is_symlink() else [folder]
            if garbage.job_id is not None and self._store.results.forget_finished(garbage.job_id, *self._here()):
                for path in left:
                    _remove_here(path)
                with contextlib.suppress(OSError):  # it is not empty, or gone
                    folder.rmdir()
                yield garbage
        for garbage in self._cache():
            _remove_here(Path(garbage.name))
            yield garbage
        for job_id, attempt, size in self._store.results.spent_logs():
            if self._is_stored(job_id):
                self._store.results.forget_log(job_id, attempt)
                yield _log(job_id, attempt, size)
        if self._policy.past_jobs:
            yield from self._forget_past()

    def _forget_past(self) -> Iterator[Garbage]:
        """Rows of jobs that ended long ago. A job with files in the store stays: otherwise no one could judge them."""
        limit = self._limit()
        for courses in _batches(self._store.results.courses(limit)):
            self._store.results.forget_courses([job.job_id for job in courses])
            yield from map(_course, courses)
        held = {_job_of(holding)[0] for holding in self._artifacts.holdings("jobs")}
        past = [job for job in self._store.results.past_jobs(limit) if job.job_id not in held]
        for jobs in _batches(past):
            gone = self._store.results.forget_jobs([job.job_id for job in jobs], limit)
            yield from (_past(job) for job in jobs if job.job_id in gone)

    def _old_results(self) -> list[Job]:
        return [] if self._policy.keep_last is None else self._store.results.beyond_newest(self._policy.keep_last)

    def _results(self, old: Collection[Job]) -> Iterator[Garbage]:
        sizes = {held.name: held.size for held in self._artifacts.holdings("jobs")} if old else {}
        for job in old:
            name, why = attempt_prefix(job.job_id, job.attempt), f"older than {job.user}'s newest of {job.name}"
            yield Garbage(kind=Kind.RESULT, name=name, size=sizes.get(name, 0), why=why, job_id=job.job_id)

    def _below_jobs(self) -> Iterator[Garbage]:
        """Stored attempts without a kept result, and checkpoints of ended jobs."""
        held = self._artifacts.holdings("jobs")
        over = self._store.results.over({_job_of(holding)[0] for holding in held}, self._limit())
        for holding in held:
            job_id, attempt = _job_of(holding)
            if attempt is None and job_id in over.jobs:
                kind, why = Kind.CHECKPOINTS, "the job has ended"
            elif attempt is not None and (job_id, attempt) in over.attempts:
                kind, why = Kind.ATTEMPT, "no result: the attempt ended otherwise, or was removed"
            else:
                continue
            yield Garbage(kind=kind, name=holding.name, size=holding.size, why=why, job_id=job_id)

    def _unfinished(self) -> Sequence[Unfinished]:
        """Uploads that nobody continues: a worker kills a call that moves nothing for minutes."""
        try:
            return self._artifacts.unfinished(self._store.now() - LEAST_AGE)
        except ArtifactError as error:  # a key without the right to list them, or a gateway that can't
            log.warning("leftovers of killed uploads stay: %s", error.sentence)
            return ()

    def _data(self, without: Collection[int] = ()) -> Iterator[Garbage]:
        limit = self._limit()
        held = [holding for holding in self._artifacts.holdings("datasets") if holding.changed_at < limit]
        needed = self._store.results.needed_data(limit, without) if held else set()
        for holding in held:
            if holding.name.rpartition("/")[2] not in needed:
                why = f"no job needs it, last submitted {holding.changed_at:%Y-%m-%d}"
                yield Garbage(kind=Kind.DATA, name=holding.name, size=holding.size, why=why)

    def _work(self) -> Iterator[Garbage]:
        folders = {int(p.name): p for p in _children(self._settings.work_dir) if _NUMBER.fullmatch(p.name)}
        for job_id in sorted(self._store.results.over(folders, self._limit()).jobs):
            folder, why = folders[job_id], f"job {job_id} has ended"
            yield Garbage(kind=Kind.WORK, name=str(folder), size=_size(folder), why=why, job_id=job_id)

    def _cache(self, without: Collection[int] = ()) -> Iterator[Garbage]:
        """Entries that were not read for a long time, except data that a job still needs; measurements that no job may
        read any more, like those of a job that has gone; and what was begun a day ago and has not got its name."""
        limit = self._limit()
        listed = {row.sha256 for row in self._store.cards.kept_files(self._settings.host)}
        needed = self._store.results.needed_data(limit, without)
        for part in ("datasets", "tokenised", "bases", "adapters", "measured"):
            for entry in _children(self._settings.cache_dir / part):
                with contextlib.suppress(FileNotFoundError):  # a trainer has just moved it into place
                    used_at = dt.datetime.fromtimestamp(entry.lstat().st_mtime, dt.UTC)
                    why = f"last used {used_at:%Y-%m-%d}" if used_at < limit and entry.name not in needed else ""
                    if part == "measured" and entry.name not in listed and used_at < self._store.now() - LEAST_AGE:
                        why = "the database does not name it"
                    if ".part-" in entry.name and used_at < self._store.now() - LEAST_AGE:
                        why = "a killed process had begun it"
                    if why:
                        yield Garbage(kind=Kind.CACHE, name=str(entry), size=_size(entry), why=why)

    def _is_stored(self, job_id: int) -> bool:
        """Whether its log can be read from the store, or was removed with its result. The lines stay if somebody has
        changed the result there."""
        job = self._store.jobs.get(job_id)
        if job.report_uri is None:
            return True
        try:
            self._artifacts.read_bytes(result_binding(self._store, job), "log.txt")
        except (ArtifactError, AdapterNotFound, WrongState):
            return False
        return True

    def _here(self) -> tuple[str, str]:
        return self._settings.host, f"loractl gc by {self._settings.user}"

    def _limit(self) -> dt.datetime:
        return self._store.now() - max(self._policy.older_than, LEAST_AGE)


def _unfinished(file: Unfinished) -> Garbage:
    why = f"an unfinished upload, {file.changed_at:%Y-%m-%d}"
    return Garbage(kind=Kind.UNFINISHED, name=file.name, size=file.size, why=why)


def _log(job_id: int, attempt: int, size: int) -> Garbage:
    why = "stored with the result"
    return Garbage(kind=Kind.LOG, name=attempt_prefix(job_id, attempt), size=size, why=why, job_id=job_id)


def _course(job: PastJob) -> Garbage:
    why = f"ended {job.ended_at:%Y-%m-%d}; its report has the course"
    return Garbage(kind=Kind.COURSE, name=_numbered(job), size=job.points_size, why=why, job_id=job.job_id)


def _past(job: PastJob) -> Garbage:
    why = f"ended {job.ended_at:%Y-%m-%d} and has no result"
    return Garbage(kind=Kind.JOB, name=_numbered(job), size=job.size, why=why, job_id=job.job_id)


def _batches(jobs: Sequence[PastJob]) -> Iterator[Sequence[PastJob]]:
    return (jobs[first : first + JOBS_AT_ONCE] for first in range(0, len(jobs), JOBS_AT_ONCE))


def _numbered(job: PastJob) -> str:
    return f"{job.job_id} {job.name} of {job.user}"


def _job_of(holding: Holding) -> tuple[int, int | None]:
    """Job and attempt of an object below jobs/; no attempt for checkpoints."""
    match = _JOB.fullmatch(holding.name)
    assert match is not None, holding.name
    return int(match[1]), int(match[2]) if match[2] else None


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    """Bytes of a file or of all files below a folder; links count themselves."""
    size = 0
    for each in path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]:
        with contextlib.suppress(FileNotFoundError):  # somebody else has just removed it
            size += each.lstat().st_size if each.is_symlink() or not each.is_dir() else 0
    return size


def _remove_here(path: Path) -> None:
    try:
        remove_tree(path)
    except OSError as error:
        raise LoractlError(
            f"{error.filename or path} can't be removed: {error.strerror}", "run loractl gc as the worker's own user"
        ) from error
