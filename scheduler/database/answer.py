"""The database as a whole: an upgrade of the tables while nobody uses them, a copy in one file, made while workers run,
and the way back; and the roles of a lab's database.

SQLite's own online backup copies a consistent state: readers and writers continue. Any tool can copy the artifacts that
the rows name. The queue needs no backup: the row is the truth, a message is only a hint.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.artifacts import open_store
from loractl.common.errors import Forbidden, LoractlError, UsageError, WrongState
from loractl.common.lab_store import adopt_if_sure
from loractl.common.settings import Settings, make_private, redacted
from loractl.common.store.checks import quarantined
from loractl.common.store.database import SQLITE_BUSY_MS, connect, make_engine, one_look, reachable
from loractl.common.store.dump import Dump, dump, is_dump, load
from loractl.common.store.roles import SHOW, SUBMIT, WORK, RolesDone, WantedLogin, apply_roles, has_roles
from loractl.common.store.schema import HEAD, OLDEST, mismatch, require_unserved, revision, upgrade
from loractl.common.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a database holds."""

    revision: str
    jobs: int
    newest: int  # number of the newest job; 0 if there is none
    last_event: str  # time of the newest history line, in UTC as the database writes it; "" if there is none

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        return dict(vars(self))


def path_of(settings: Settings) -> Path:
    """The embedded database's file."""
    return Path(settings.database_url.removeprefix("sqlite:///"))


def copy_to(source: Path, aside: Path) -> Contents:
    """Copy the database into one file, and read the copy. Raises sqlite3.Error, OSError."""
    with _opened(source) as database, _opened(aside) as copy:
        database.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without -wal and -shm
        return _contents_of_file(copy)


def check(file: Path) -> Contents:
    """What the backup holds. Raises UsageError for another file, SchemaMismatch for one of a newer loractl, or of one
    too old."""
    try:
        with _opened(file) as backup:
            whole = backup.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            contents = _contents_of_file(backup)
    except sqlite3.Error:
        whole = False
    if not whole:
        raise UsageError(f"{file} is not a loractl backup, or is damaged", "loractl db backup FILE makes one")
    if not OLDEST <= contents.revision <= HEAD:
        raise mismatch(contents.revision, "the backup")
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


def _contents_of_file(database: sqlite3.Connection) -> Contents:
    (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or ("",)
    jobs, newest = database.execute("SELECT count(*), coalesce(max(job_id), 0) FROM jobs").fetchone()
    (last_event,) = database.execute("SELECT coalesce(max(at), '') FROM events").fetchone()
    return Contents(revision=revision, jobs=jobs, newest=newest, last_event=last_event)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_BUSY_MS / 1000)) as connection:
        yield connection


SKIPPED_NUMBERS = 1000
"""Job numbers skipped when nobody can say which were used since the backup."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was restored, and what a person should know about it."""

    contents: Contents
    store_away: str | None  # why the artifact store could not be asked for the numbers of lost jobs
    roles_wanted: bool  # the database's roles need their rights again


class JobNumbers:
    """The highest number of a job that has stored something, even if no backup knows it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.store_away: str | None = None  # why the artifact store could not be asked

    def beyond(self, newest: int) -> int:
        """Numbers up to this one are not used again; `newest`: the newest of the backup's jobs."""
        try:
            store = open_store(self._settings)
            held = store.holdings("jobs")
            if newest and not held and not store.holdings("datasets"):
                self.store_away = "the artifact store is empty"  # it is restored later
        except LoractlError as error:
            self.store_away = error.sentence
        if self.store_away is not None:
            return newest + SKIPPED_NUMBERS
        return max((int(holding.name.split("/")[1]) for holding in held), default=0)


def back_up(settings: Settings, file: Path) -> Contents:
    """Copy the database into a new file. Raises UsageError, LoractlError, ServiceUnreachable."""
    source = path_of(settings)
    if settings.embedded_database and not source.exists():
        raise UsageError(f"there is no database at {source}", "LORACTL_HOME names the home; loractl submit makes one")
    if file.exists():
        raise UsageError(f"{file} exists already", "name a new file")
    aside = file.with_name(f"{file.name}.part")
    try:
        with _sentences(redacted(settings.database_url), str(file)):
            aside.unlink(missing_ok=True)
            aside.touch(mode=0o600)  # rows name people and paths
            contents = copy_to(source, aside) if settings.embedded_database else _dumped(settings, aside)
            aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)
    return contents


def restore(settings: Settings, file: Path, *, force: bool) -> Restored:
    """Put a backup in the place of the embedded database, or into an empty one of PostgreSQL.

    Raises WrongState while a worker serves this home or a database of PostgreSQL is not empty, and, without `force`,
    when jobs of the embedded one have changed since the backup.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file", "loractl db backup FILE makes one")
    if not settings.embedded_database:
        return _loaded(settings, file)
    if is_dump(file):
        raise UsageError(f"{file} is a backup of PostgreSQL, and this home's database is SQLite", _OTHER_KIND)
    target, contents = path_of(settings), check(file)
    numbers = JobNumbers(settings)
    with no_worker(settings), _sentences(str(file), str(target)):
        put_back(file, target, contents, numbers.beyond, force=force)
    return Restored(contents=contents, store_away=numbers.store_away, roles_wanted=False)


_OTHER_KIND = "set LORACTL_DATABASE_URL to a database of the kind that was backed up"


def _dumped(settings: Settings, aside: Path) -> Contents:
    engine = make_engine(settings.database_url)
    try:
        with reachable(settings):
            return _contents(dump(engine, aside))
    finally:
        engine.dispose()


def _loaded(settings: Settings, file: Path) -> Restored:
    with file.open("rb") as stream:
        start = stream.read(15)
    if start == b"SQLite format 3":
        raise UsageError(f"{file} is a backup of the embedded database, and this one is PostgreSQL's", _OTHER_KIND)
    numbers = JobNumbers(settings)
    engine = make_engine(settings.database_url)
    try:
        with reachable(settings), _sentences(str(file), redacted(settings.database_url)):
            contents = _contents(load(engine, file, numbers.beyond))
            roles = has_roles(engine)
    finally:
        engine.dispose()
    return Restored(contents=contents, store_away=numbers.store_away, roles_wanted=roles)


def _contents(dumped: Dump) -> Contents:
    return Contents(revision=dumped.revision, jobs=dumped.jobs, newest=dumped.newest, last_event=dumped.last_event)


@contextlib.contextmanager
def no_worker(settings: Settings) -> Iterator[None]:
    """Hold the locks of this home's nodes, so that none starts during the restore. Raises WrongState if one is
    alive."""
    with contextlib.ExitStack() as locks:
        for path in sorted(settings.runtime_dir.glob("node-*.lock")):
            lock = locks.enter_context(path.open("r+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WrongState("a worker serves this home", "stop it first: Ctrl-C, or systemctl stop") from None
        yield


@contextlib.contextmanager
def _sentences(source: str, target: str) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise LoractlError(
            f"{source} can't be copied to {target}: {why}", "check that both can be read and written, and their disk"
        ) from error


YIELDING = "0048"
"""From this revision on jobs yield to much shorter ones unless they say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Upgraded:
    """The outcome of an upgrade."""

    before: str | None  # None: there were no tables
    after: str
    saved: Contents | None  # what the backup holds; None: none was wanted, or there was nothing to do
    quarantined: int  # values that broke their columns' bounds, by this upgrade or earlier ones
    never_yielding: int  # waiting and running jobs of before, which keep their cards
    roles_wanted: bool  # the roles still need rights to what is new, which this login may not grant


def bring_to_head(settings: Settings, backup: Path | None, *, force: bool) -> Upgraded:
    """Upgrade the tables. Raises WrongState, without `force`, while workers of the older form serve; SchemaMismatch for
    a database newer than this loractl; what back_up raises."""
    with reachable(settings):
        engine = connect(settings, check_schema=False)
        try:
            found, saved = revision(engine), None
            if found is not None and OLDEST <= found < HEAD:
                if not force:
                    require_unserved(engine, found)
                saved = None if backup is None else back_up(settings, backup)
            before, after = upgrade(engine)
            wanted = before != after and has_roles(engine)
            if wanted:
                with contextlib.suppress(Forbidden):  # then somebody with the right must do it
                    apply_roles(engine)
                    wanted = False
            return Upgraded(
                before=before,
                after=after,
                saved=saved,
                quarantined=quarantined(engine),
                never_yielding=0 if before is None or before >= YIELDING else Store(engine).jobs.never_yielding(),
                roles_wanted=wanted,
            )
        finally:
            engine.dispose()


def store_unknown(settings: Settings) -> str | None:
    """Let the database know the lab's artifact store, as its owner. Why it still knows none; None: it does."""
    with one_look(settings) as engine:
        why = adopt_if_sure(settings, Store(engine))
    return None if why is None else why.sentence


def wanted_logins(
    people: Sequence[str], boxes: Sequence[str], pages: Sequence[str], passwords: Sequence[str] | None
) -> list[WantedLogin]:
    """Logins with their roles; `passwords` in the same order, None to generate them. Raises UsageError."""
    asked = [(name, role) for names, role in ((people, SUBMIT), (boxes, WORK), (pages, SHOW)) for name in names]
    if passwords is not None and len(passwords) != len(asked):
        what = f"{len(passwords)} passwords for {len(asked)} logins"
        raise UsageError(what, "a line a login: persons first, then boxes, then pages")
    given: Sequence[str | None] = [None] * len(asked) if passwords is None else passwords
    return [WantedLogin(name=name, role=role, password=word) for (name, role), word in zip(asked, given, strict=True)]


def set_up_roles(settings: Settings, wanted: Sequence[WantedLogin], *, renew: bool) -> RolesDone:
    """Create roles and logins in the database of `settings`. Raises what apply_roles raises, and SchemaMismatch."""
    if settings.embedded_database:
        raise UsageError("only PostgreSQL has roles, and this home's database is SQLite", "set LORACTL_DATABASE_URL")
    engine = connect(settings)
    try:
        with reachable(settings):
            return apply_roles(engine, wanted, renew=renew)
    finally:
        engine.dispose()
