"""Connections to SQLite or PostgreSQL. SQLite is refused on a network file system, where its locks do not work."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from loractl.common.errors import (
    Forbidden,
    LoractlError,
    NotYours,
    SchemaMismatch,
    ServiceRefused,
    ServiceUnreachable,
    UsageError,
    ValueRefused,
    WrongState,
)
from loractl.common.settings import OWN_HOME, Settings, make_private, redacted

from .columns import write_json
from .schema import HEAD, OLDEST, mismatch, require_unserved, revision, upgrade

MOUNTS = Path("/proc/self/mountinfo")

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|afs|ceph|lustre|gpfs|beegfs|glusterfs|fuse\.(sshfs|ceph|glusterfs|s3fs|rclone)"
)


def network_disk(folder: Path) -> str | None:
    """The kind of network file system that holds the folder, like nfs4; None: a disk of this machine."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return None  # another system than Linux
    place, kind, depth = folder.resolve(), "", 0
    for point, found in map(_mount, lines):
        if place.is_relative_to(point) and len(point.parts) >= depth:  # a later one on the same point covers it
            kind, depth = found, len(point.parts)
    return kind if _NETWORK.fullmatch(kind) else None


def _mount(line: str) -> tuple[Path, str]:
    """Where it is mounted, and the kind of file system (proc_pid_mountinfo(5))."""
    before, _, after = line.partition(" - ")
    point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
    return Path(point), after.split()[0]


DatabaseError = DBAPIError
"""What a database driver raises, by the name under which other rooms catch it."""

REFUSALS = (SQLAlchemyError, Forbidden, ValueRefused, SchemaMismatch, OverflowError, UnicodeError)
"""All that a verb of the store may raise because of the database: it is away (see `outage`), it refuses values, or its
tables are another version's."""

SQLITE_BUSY_MS, SQLITE_READER_MS = 30_000, 2_000
"""How long to wait for a lock of SQLite's; while a reader waits, somebody looks at a page."""

ROOM = 2**17
"""Bytes that SQLite's -shm and a few pages of its -wal take at least."""

NODE_IDLE_S = 8
"""PostgreSQL ends a node's transaction that is idle for this long: a frozen box must not hold the fleet's round or a
row. A transaction of ours waits for nothing but the database. With a short lease it is less (`pace_of`)."""

KEPT, CONNECTIONS = 3, 13
"""PostgreSQL connections that a process keeps open, and the most that it may have unless it says otherwise."""

_POSTGRES_OPTIONS = {
    # A half-open connection (a host that vanished) would otherwise block a heartbeat for the kernel's 15 minutes.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,  # ms
}
_IDLE_S = 60  # a command may read 100,000 rows and look at them
_INSUFFICIENT_PRIVILEGE = "42501"
_CHECK_VIOLATION = "23514"
_CHECKED = re.compile(r"ck_(\w+)_[0-9a-f]{8}")
_NOT_YOURS, _TOO_MUCH = "LR004", "LR005"  # of loractl's functions: somebody else's job, and a bound
_READ_ONLY = "25006"  # a standby, or a primary that a failover has stepped down
LOCK_NOT_FREE = "55P03"
_PASSING = (_READ_ONLY, "40", "53", LOCK_NOT_FREE, "57")
"""SQLSTATEs, and classes of them, where another try may help: the server's state, not the statement, is the cause.

Rolled back (a deadlock), short of resources, a lock that was not free, stopped by an operator or a time limit.
"""
_TOO_LARGE = "54"  # the statement exceeds a limit of the server
_TOO_MANY = "number of parameters must be between"  # the driver's words, without a state


def connect_to_read(settings: Settings) -> Engine:
    """An engine that can't change anything: SQLite's file is opened read-only, PostgreSQL's transactions only read.

    Nothing is created and nothing upgraded. Raises ServiceUnreachable, SchemaMismatch, UsageError.
    """
    if not has_database(settings):
        raise LoractlError(
            f"there is no database yet: {redacted(settings.database_url)}", "loractl submit job.yaml makes it"
        )
    engine = make_engine(settings.database_url, read_only=True)
    with reachable(settings):
        current = revision(engine)
    if current != HEAD:
        raise mismatch(current)
    return engine


def has_database(settings: Settings) -> bool:
    """False if the embedded SQLite has not been made yet; about a server this says nothing."""
    return not settings.embedded_database or _file_of(settings.database_url).exists()


def connect(settings: Settings, *, check_schema: bool = True) -> Engine:
    """An engine for the database of `settings`.

    The embedded SQLite is created and upgraded on the way; another database is only checked.
    Raises ServiceUnreachable, SchemaMismatch, UsageError; WrongState where a worker serves the older tables.
    """
    engine = make_engine(settings.database_url)
    if not check_schema:
        return engine
    with reachable(settings):
        current = revision(engine)
        if current != HEAD and settings.embedded_database and (current is None or OLDEST <= current < HEAD):
            if current is not None:
                require_unserved(engine, current)
            upgrade(engine)
            current = HEAD
    if current != HEAD:
        raise mismatch(current)
    return engine


@contextlib.contextmanager
def one_look(settings: Settings) -> Iterator[Engine]:
    """An engine with one connection, which ends with it; nothing is upgraded. Raises ServiceUnreachable, UsageError."""
    engine = make_engine(settings.database_url, connections=1, kept=1)
    try:
        with reachable(settings):
            yield engine
    finally:
        engine.dispose()


@contextlib.contextmanager
def reachable(settings: Settings) -> Iterator[None]:
    """Turn the driver's connection errors into ServiceUnreachable with a sentence."""
    try:
        yield
    except DBAPIError as error:
        if (why := outage(error)) is None:
            raise
        raise unreachable(settings, why) from error


def absence(why: str) -> str:
    """An outage as a line of a log: a full disk does not mean that the database went away."""
    return (
        "the disk of the database is full" if any(words in why for words in _FULL) else f"the database is away: {why}"
    )


_FULL = ("database or disk is full", "No space left on device")
_NOT_WRITABLE = "attempt to write a readonly database"
_UNKNOWN_LOGIN = ("password authentication failed", "no password supplied", "role ", "no pg_hba.conf entry")


def unreachable(settings: Settings, why: str) -> LoractlError:
    """An outage as an error for people: a full disk, a file that can only be read and a wrong password do not mean that
    the server is down."""
    address = redacted(settings.database_url)
    if any(words in why for words in _FULL):
        return LoractlError(f"the disk of the database is full: {address}", "free space there; nothing is lost")
    if _NOT_WRITABLE in why:
        return LoractlError(f"the database can't be written to: {address}", "its folder must be one that you may write")
    if any(words in why for words in _UNKNOWN_LOGIN):
        return ServiceRefused("the database", address, "LORACTL_DATABASE_URL", why.rpartition("FATAL:")[2].strip())
    return ServiceUnreachable("the database", address, "LORACTL_DATABASE_URL", why)


def outage(error: BaseException) -> str | None:
    """How the database is away, as a sentence's end; None for any other error."""
    from sqlalchemy.exc import (
        InterfaceError,
        InternalError,
        OperationalError,
        PendingRollbackError,
        ResourceClosedError,
    )
    from sqlalchemy.exc import TimeoutError as NoConnectionFree

    if isinstance(error, NoConnectionFree):
        return "all connections of this process are in use"
    if isinstance(error, (PendingRollbackError, ResourceClosedError)):  # what a lost connection leaves behind
        return "the connection was lost in the middle of a transaction"
    if not isinstance(error, DBAPIError):
        return None
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_ERROR or _TOO_MANY in str(error.orig):
        return None  # it can't do what the statement says
    state = getattr(error.orig, "sqlstate", None) or ""
    passing = isinstance(error, (OperationalError, InterfaceError, InternalError)) or state.startswith(_PASSING)
    passing = passing or code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
    if not (error.connection_invalidated or passing) or state.startswith(_TOO_LARGE):
        return None
    return told_by(error) or "no answer"


def names_nothing(error: BaseException) -> bool:
    """Whether a statement names a table, column or function that is not there."""
    driver = getattr(error, "orig", None)
    return getattr(driver, "sqlstate", None) in _NOT_THERE or any(words in str(driver) for words in _NOT_IN_SQLITE)


_NOT_THERE = ("42P01", "42703", "42883")
_NOT_IN_SQLITE = ("no such table", "no such column", "no such function", "has no column named")


def told_by(error: BaseException) -> str:
    """The first line of what the database, or its driver, said; without the statement and its values."""
    told = error.sentence if isinstance(error, LoractlError) else str(getattr(error, "orig", None) or error)
    return next(iter(told.strip().splitlines()), "")


def make_engine(
    url: str, *, connections: int = CONNECTIONS, kept: int = KEPT, idle_s: float = _IDLE_S, read_only: bool = False
) -> Engine:
    """An engine with the settings that both dialects need for many small guarded transactions.

    `connections`: the most at a time to PostgreSQL; `kept`: how many of them stay open. `idle_s`: PostgreSQL ends a
    transaction that is idle for this long. `read_only`: the database itself refuses every write.
    SQLite: WAL, and BEGIN IMMEDIATE for writers: with plain BEGIN, four writers fail with "database is locked".
    PostgreSQL: what the user's role forbids raises Forbidden. Connections to a server that only reads are given up:
    after a failover another one may write.
    """
    try:
        if not url.startswith("sqlite"):
            pool, options = _pool(connections, kept), _postgres_options(idle_s, read_only)
            engine = create_engine(url, connect_args=options, json_serializer=write_json, **pool)
            event.listen(engine, "handle_error", _look_at_error)
            return engine
        file = _file_of(url)
        if not read_only:
            _private_file(file)
        _refuse_network_disk(file.parent)
        opened = f"sqlite:///file:{quote(str(file))}?mode=ro&uri=true" if read_only else url
        busy_ms = SQLITE_READER_MS if read_only else SQLITE_BUSY_MS
        engine = create_engine(opened, connect_args={"timeout": busy_ms / 1000}, json_serializer=write_json)
    except ArgumentError as error:
        raise UsageError(
            f"LORACTL_DATABASE_URL is not a database URL: {redacted(url)}", "like postgresql://user@host/loractl"
        ) from error
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the driver for {redacted(url)} is not installed", "pip install 'loractl[postgres]'"
        ) from error

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's "begin" event below begins instead
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")  # one text must not hide the others
        # 16 MB of pages: by its default of 2, SQLite reads what waits of a long queue from the file at each claim
        for pragma in (f"busy_timeout={busy_ms}", "synchronous=FULL", "foreign_keys=ON", "cache_size=-16000"):
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            _write_ahead(connection)

    @event.listens_for(engine, "handle_error")
    def _look_at_error_of_sqlite(context: ExceptionContext) -> None:
        if isinstance(context.original_exception, sqlite3.IntegrityError):
            _refuse_value(context)
        if context.sqlalchemy_exception is not None and _is_full_disk(context.original_exception, file.parent):
            context.sqlalchemy_exception.orig = sqlite3.OperationalError(_FULL[0])

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = read_only or connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether SQLite failed for lack of room: where its -wal or -shm can't grow it says "disk I/O error" instead."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the lower byte is the kind
    if code not in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return False
    try:
        return shutil.disk_usage(folder).free < ROOM
    except OSError:
        return False


def _file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def _pool(connections: int, kept: int) -> dict[str, Any]:
    if not kept:
        return {"poolclass": NullPool}
    return {"pool_pre_ping": True, "pool_size": kept, "max_overflow": max(0, connections - kept)}


def _postgres_options(idle_s: float, read_only: bool) -> dict[str, Any]:
    # A server that answers pings and nothing else must not hold a heartbeat until its lease is over.
    limits = {"statement": 20_000, "lock": 10_000, "idle_in_transaction_session": round(1000 * idle_s)}
    options = [f"-c {name}_timeout={ms}" for name, ms in limits.items()]
    # What is asked is read along an index. By its default, that of a spinning disk, PostgreSQL would rather go through
    # all jobs that have ended, by number, to the first that waits.
    options.append("-c random_page_cost=1.1")
    if read_only:
        options.append("-c default_transaction_read_only=on")
    return {**_POSTGRES_OPTIONS, "options": " ".join(options)}


def _look_at_error(context: ExceptionContext) -> None:
    state = getattr(context.original_exception, "sqlstate", None)
    if state == _READ_ONLY:
        context.is_disconnect = True  # the pool drops all its connections
    if state == _CHECK_VIOLATION:
        _refuse_value(context)
    told = next(iter(str(context.original_exception).splitlines()), "")
    if state == _NOT_YOURS:
        raise NotYours(told) from context.original_exception
    if state == _TOO_MUCH:
        raise WrongState(told, "what one login may write is bounded: docs/deploy.md") from context.original_exception
    if state == _INSUFFICIENT_PRIVILEGE:
        user = None if context.engine is None else context.engine.url.username
        raise Forbidden(user, _denial(told)) from context.original_exception


def _denial(told: str) -> str:
    """Whose right it is that a login lacks, in the place of the name of a table."""
    what = re.match(r"(permission denied for|must be) (?:\w+ )*?(?:table |function |relation )?([\w.]+)$", told)
    if what is None:
        return told
    if what[1] == "must be":
        return "only the lab's owner makes tables, roles and join lines"
    return _RIGHTS.get(what[2], f"only boxes and the lab's owner write {what[2]}")


_RIGHTS = {
    **dict.fromkeys(("quotas", "uses"), "only the lab's owner sets quotas"),
    **dict.fromkeys(("drains", "nodes"), "only boxes and the lab's owner drain and close cards"),
    **dict.fromkeys(("jobs", "attempts", "adapters"), "only boxes and the lab's owner run jobs and remove results"),
    "lab_settings": "only the lab's owner decides what holds for the whole lab",
    "loractl_submit": "a box's login submits no jobs, a person's does",
    "loractl_lab": "only the lab's owner makes join lines",
    "public": "only the lab's owner makes tables, roles and join lines",
}


def _refuse_value(context: ExceptionContext) -> None:
    """Name the column whose bound a statement would break (`checks`)."""
    if column := _CHECKED.search(str(context.original_exception)):
        raise ValueRefused(column[1]) from context.original_exception


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to WAL. The switch does not wait for its lock, even with busy_timeout. So several commands that open
    a new file at the same time have to try again."""
    deadline = time.monotonic() + SQLITE_BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _refuse_network_disk(folder: Path) -> None:
    """Two boxes on one SQLite file would not see each other's locks, and could run one job twice."""
    if (kind := network_disk(folder)) is not None:
        raise UsageError(
            f"{folder} is on a network disk ({kind}), where SQLite can't lock its file",
            "set LORACTL_HOME to a disk of this machine; several boxes need PostgreSQL: LORACTL_DATABASE_URL",
        )


def _private_file(path: Path) -> None:
    """An empty file for its owner alone, if there is none; SQLite gives its companions (-wal, -shm) the same mode."""
    try:
        make_private(path.parent)
        if path.is_absolute() and not os.path.exists(path):  # noqa: PTH110  Path's raises where a folder is closed
            path.touch(mode=0o600)
    except OSError as error:
        raise LoractlError(f"{error.filename} can't be made: {error.strerror}", OWN_HOME) from error
