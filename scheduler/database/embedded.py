"""The embedded database's file: copied while in use, inspected, and put back.

SQLite's own online backup copies a consistent state: readers and writers continue.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from loractl.common.errors import SchemaMismatch, UsageError, WrongState
from loractl.common.settings import Settings, make_private
from loractl.common.store.database import SQLITE_BUSY_MS
from loractl.common.store.schema import HEAD

from .contents import Contents


def path_of(settings: Settings) -> Path:
    """The embedded database's file."""
    return Path(settings.database_url.removeprefix("sqlite:///"))


def copy_to(source: Path, aside: Path) -> Contents:
    """Copy the database into one file, and read the copy. Raises sqlite3.Error, OSError."""
    with _opened(source) as database, _opened(aside) as copy:
        database.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without -wal and -shm
        return _contents(copy)


def check(file: Path) -> Contents:
    """What the backup holds. Raises UsageError for another file, SchemaMismatch when a newer loractl wrote it."""
    try:
        with _opened(file) as backup:
            whole = backup.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            contents = _contents(backup)
    except sqlite3.Error:
        whole = False
    if not whole:
        raise UsageError(f"{file} is not a loractl backup, or is damaged", "loractl db backup FILE makes one")
    if contents.revision > HEAD:
        raise SchemaMismatch(contents.revision, HEAD)
    return contents


def put_back(file: Path, target: Path, contents: Contents, beyond: Callable[[int], int], *, force: bool) -> None:
    """Replace the database with a backup. `beyond`: job numbers up to this are not used again.

    Raises WrongState, without `force`, when jobs have changed since the backup.
    """
    lost, last_number = _newer(target, contents)
    if lost and not force:
        raise WrongState(
            f"{lost} {'job has' if lost == 1 else 'jobs have'} changed here since {file.name} was made",
            "loractl db backup NEW keeps this state; --force gives it up",
        )
    last_number = max(last_number, beyond(contents.newest), contents.newest)
    make_private(target.parent)
    target.touch(mode=0o600)
    with _opened(file) as backup, _opened(target) as database:
        backup.backup(database)
        _wake_up(database, last_number)


def _wake_up(database: sqlite3.Connection, last_number: int) -> None:
    """Correct the rows: no worker is alive, and a job's number is never used twice."""
    with database:
        database.execute("DELETE FROM nodes")
        # The first worker sees that these leases have expired, and the jobs continue.
        database.execute("UPDATE jobs SET lease_expires_at = started_at WHERE status = 'running'")
        database.execute("DELETE FROM sqlite_sequence WHERE name = 'jobs'")
        database.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('jobs', ?)", (last_number,))


def _newer(target: Path, backup: Contents) -> tuple[int, int]:
    """How many jobs have changed in the target since the backup, and the last job number used there."""
    if not target.exists():
        return 0, 0
    with _opened(target) as database:
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone() is None:
            return 0, 0
        changed = "SELECT count(DISTINCT job_id) FROM events WHERE at > ?"
        (lost,) = database.execute(changed, (backup.last_event,)).fetchone()
        given = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
        return lost, given[0] if given else 0


def _contents(database: sqlite3.Connection) -> Contents:
    (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or ("",)
    jobs, newest = database.execute("SELECT count(*), coalesce(max(job_id), 0) FROM jobs").fetchone()
    (last_event,) = database.execute("SELECT coalesce(max(at), '') FROM events").fetchone()
    return Contents(revision=revision, jobs=jobs, newest=newest, last_event=last_event)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_BUSY_MS / 1000)) as connection:
        yield connection
