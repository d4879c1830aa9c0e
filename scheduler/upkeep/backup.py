"""A copy of the embedded database in one file, made while workers run, and the way back.

SQLite's own online backup copies a consistent state: readers and writers go on. Any tool
can copy the artifacts that the rows name. The queue needs no backup: the row is the truth, a message is only a hint.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loractl.common.artifacts import open_store
from loractl.common.errors import LoractlError, SchemaMismatch, UsageError, WrongState
from loractl.common.settings import Settings, make_private
from loractl.common.store.database import SQLITE_BUSY_MS
from loractl.common.store.schema import HEAD


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a database holds."""

    jobs: int
    newest: int  # job number
    last_event: str  # time of the newest, as SQLite keeps it; "" without one


def back_up(settings: Settings, file: Path) -> Contents:
    """Copy the embedded database into a new file. Raises UsageError, LoractlError."""
    source = _embedded_path(settings)
    if not source.exists():
        raise UsageError(f"there is no database at {source}", "LORACTL_HOME names the home; loractl submit makes one")
    if file.exists():
        raise UsageError(f"{file} exists already", "name a new file")
    aside = file.with_name(f"{file.name}.part")
    try:
        with _sentences(source, file):
            aside.unlink(missing_ok=True)
            aside.touch(mode=0o600)  # rows name people and paths
            with _opened(source) as database, _opened(aside) as copy:
                database.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # one file, without -wal and -shm beside it
                contents = _contents(copy)
            aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)
    return contents


def restore(settings: Settings, file: Path, *, force: bool) -> Contents:
    """Put a backup in the place of the embedded database.

    Raises WrongState while a worker serves this home, and, without `force`, when jobs have changed since the backup.
    """
    target = _embedded_path(settings)
    contents = _check_backup(file)
    with no_worker(settings), _sentences(file, target):
        lost, last_number = _newer(target, contents)
        if lost and not force:
            raise WrongState(
                f"{lost} {'job has' if lost == 1 else 'jobs have'} changed here since {file.name} was made",
                "loractl db backup NEW keeps this state; --force gives it up",
            )
        make_private(target.parent)
        target.touch(mode=0o600)
        last_number = max(last_number, *_stored_numbers(settings), contents.newest)
        with _opened(file) as backup, _opened(target) as database:
            backup.backup(database)
            _wake_up(database, last_number)
    return contents


def _wake_up(database: sqlite3.Connection, last_number: int) -> None:
    """Correct the rows: no worker is alive, and a job's number is never given twice."""
    with database:
        database.execute("DELETE FROM nodes")
        # The first worker sees that these leases are over, and the jobs go on.
        database.execute("UPDATE jobs SET lease_expires_at = started_at WHERE status = 'running'")
        database.execute("DELETE FROM sqlite_sequence WHERE name = 'jobs'")
        database.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('jobs', ?)", (last_number,))


def _embedded_path(settings: Settings) -> Path:
    if not settings.embedded_database:
        raise UsageError(
            "db backup and db restore are for the embedded database; this one is PostgreSQL's",
            "pg_dump -Fc and pg_restore do it: docs/deploy.md, Backup",
        )
    return Path(settings.database_url.removeprefix("sqlite:///"))


def _check_backup(file: Path) -> Contents:
    """What the backup holds. Raises UsageError for another file, SchemaMismatch when a newer loractl wrote it."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file", "loractl db backup FILE makes one")
    try:
        with _opened(file) as backup:
            whole = backup.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            revision = backup.execute("SELECT version_num FROM alembic_version").fetchone()
            contents = _contents(backup)
    except sqlite3.Error:
        whole, revision = False, None
    if not whole or revision is None:
        raise UsageError(f"{file} is no backup of loractl, or is damaged", "loractl db backup FILE makes one")
    if revision[0] > HEAD:
        raise SchemaMismatch(revision[0], HEAD)
    return contents


@contextlib.contextmanager
def no_worker(settings: Settings) -> Iterator[None]:
    """Hold the locks of this home's nodes, so that none starts meanwhile. Raises WrongState when one is alive."""
    with contextlib.ExitStack() as locks:
        for path in sorted(settings.runtime_dir.glob("node-*.lock")):
            lock = locks.enter_context(path.open("r+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WrongState("a worker serves this home", "stop it first: Ctrl-C, or systemctl stop") from None
        yield


def _newer(target: Path, backup: Contents) -> tuple[int, int]:
    """How many jobs have changed in the target since the backup, and the last number that was given there."""
    if not target.exists():
        return 0, 0
    with _opened(target) as database:
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone() is None:
            return 0, 0
        changed = "SELECT count(DISTINCT job_id) FROM events WHERE at > ?"
        (lost,) = database.execute(changed, (backup.last_event,)).fetchone()
        given = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
        return lost, given[0] if given else 0


def _stored_numbers(settings: Settings) -> list[int]:
    """Jobs that have stored something, also those that the backup does not know; none when the store is away."""
    try:
        return [0, *(int(held.name.split("/")[1]) for held in open_store(settings).holdings("jobs"))]
    except LoractlError:
        return [0]


def _contents(database: sqlite3.Connection) -> Contents:
    jobs, newest = database.execute("SELECT count(*), coalesce(max(job_id), 0) FROM jobs").fetchone()
    (last_event,) = database.execute("SELECT coalesce(max(at), '') FROM events").fetchone()
    return Contents(jobs=jobs, newest=newest, last_event=last_event)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_BUSY_MS / 1000)) as connection:
        yield connection


@contextlib.contextmanager
def _sentences(source: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise LoractlError(
            f"{source} can't be copied to {target}: {why}", "check that both can be read and written, and their disk"
        ) from error
