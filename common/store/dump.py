"""A dump of PostgreSQL, made without other programs: rows out into one file, as they were at one moment, and back into
an empty database.

The file is a ZIP with a member for each table, and one that says what they hold and when they were read. Each member
has a checksum, and a file that was cut off has no directory: both are noticed before a row is written.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, inspect, text

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.store import store  # noqa: F401  with it every table is known

from .checks import hold
from .schema import HEAD, OLDEST, alembic_config, lock_schema, mismatch
from .tables import Base, Lock

FORMAT = 1
CONTENTS = "contents.json"
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DumpedTable:
    """One table: its rows are in a member with its name."""

    name: str
    columns: Sequence[str]
    rows: int


@dataclass(frozen=True, kw_only=True)
class Dump:
    """What a dump holds."""

    revision: str
    made_at: str  # by the database's clock
    last_event: str  # time of the newest line of a history; "" without one
    newest: int  # number of the newest job; 0 without one
    sequences: Mapping[str, int]  # the last number that each has given
    tables: Sequence[DumpedTable]  # those that others refer to come first

    @property
    def jobs(self) -> int:
        return next((table.rows for table in self.tables if table.name == "jobs"), 0)


def member(table: str) -> str:
    """The name under which a table's rows are in the file."""
    return f"{table}.copy"


def write_contents(archive: zipfile.ZipFile, dump: Dump) -> None:
    """Close a dump."""
    archive.writestr(CONTENTS, json.dumps({"loractl_dump": FORMAT, **asdict(dump)}, indent=1))


def is_dump(file: Path) -> bool:
    """Whether a file may be a dump at all."""
    return zipfile.is_zipfile(file)


def read_dump(file: Path) -> Dump:
    """What the file holds; every byte of it was read. Raises UsageError for another or a damaged file, SchemaMismatch
    for one of a newer loractl, or of one too old."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (broken := archive.testzip()) is not None:
                raise _damaged(file, f"{broken} is not as it was written")
            told = json.loads(archive.read(CONTENTS))
            if told.pop("loractl_dump", None) != FORMAT:
                raise _damaged(file, "its form is not known")
            dump = Dump(**{**told, "tables": [DumpedTable(**table) for table in told["tables"]]})
            there = set(archive.namelist())
    # what zipfile, zlib and the reading of the contents raise if the file was cut off, changed or made otherwise
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError, NotImplementedError) as error:
        raise _damaged(file, str(error).strip("'")) from None
    if missing := [table.name for table in dump.tables if member(table.name) not in there]:
        raise _damaged(file, f"{missing[0]} is missing")
    if not OLDEST <= dump.revision <= HEAD:
        raise mismatch(dump.revision, "the backup")
    return dump


def blocks_of(archive: zipfile.ZipFile, table: str) -> Iterator[bytes]:
    """A table's rows, as COPY takes them."""
    with archive.open(member(table)) as stream:
        while block := stream.read(_BLOCK):
            yield block


def _damaged(file: Path, why: str) -> UsageError:
    return UsageError(
        f"{file} is not a loractl backup, or is damaged: {why}", "loractl db backup FILE makes one; take an older one"
    )


_SPEED = 3
"""zlib's level: rows are text, and higher levels gain little more."""

_JOBS = "jobs_job_id_seq"

_MOMENT = """
SELECT (SELECT coalesce(max(job_id), 0) FROM jobs),
  (SELECT coalesce((max(at) AT TIME ZONE 'UTC')::text, '') FROM events), (now() AT TIME ZONE 'UTC')::text
"""

_PATIENT = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


def dump(engine: Engine, file: Path) -> Dump:
    """Write the database into a new file, as it was at one moment; readers and writers continue.

    Raises SchemaMismatch for a database without loractl's tables, Forbidden.
    """
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        _be_patient(connection)
        connection.execute(text("SET TRANSACTION READ ONLY"))
        revision = _revision(connection)
        if revision is None:
            raise mismatch(None)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_SPEED) as archive:
            tables = [_copy_out(connection, name, archive) for name in _known_tables(connection)]
            newest, last_event, made_at = connection.execute(text(_MOMENT)).one()
            dumped = Dump(
                revision=revision,
                made_at=made_at,
                last_event=last_event,
                newest=newest,
                sequences=_sequences(connection),
                tables=tables,
            )
            write_contents(archive, dumped)
    return dumped


def load(engine: Engine, file: Path, beyond: Callable[[int], int]) -> Dump:
    """Fill an empty database from a dump, and bring it to this loractl's form: all or nothing.

    `beyond`: for the newest job's number, one up to which none is assigned again; called once the file is known to be
    whole. Raises UsageError and SchemaMismatch as read_dump does, WrongState for a database that is not empty.
    """
    from alembic import command

    dumped = read_dump(file)
    given = {**dumped.sequences, _JOBS: max(beyond(dumped.newest), dumped.newest, dumped.sequences.get(_JOBS, 0))}
    with engine.begin() as connection, zipfile.ZipFile(file) as archive, alembic_config(connection) as config:
        _be_patient(connection)
        lock_schema(connection)
        _refuse_filled(connection, dumped)
        command.upgrade(config, dumped.revision)
        for table in dumped.tables:
            _copy_in(connection, table, archive)
        _go_on_counting(connection, given)
        # no worker is alive, as this database sees it: the first one finds that these leases are over
        connection.execute(text("DELETE FROM nodes"))
        connection.execute(text("UPDATE jobs SET lease_expires_at = started_at WHERE status = 'running'"))
        command.upgrade(config, "head")
        hold(connection)
    return dumped


def _be_patient(connection: Connection) -> None:
    for patience in _PATIENT:
        connection.execute(text(f"SET LOCAL {patience} = 0"))


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    number = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if number is None else str(number)


def _known_tables(connection: Connection) -> list[str]:
    """Those of loractl's tables with rows to keep that are there: one of an older revision lacks some."""
    there = set(inspect(connection).get_table_names()) - {Lock.__tablename__}
    return [table.name for table in Base.metadata.sorted_tables if table.name in there]


def _sequences(connection: Connection) -> dict[str, int]:
    """The last number of each sequence, without sequences that gave none yet, or that this login may not see."""
    given = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = current_schema() AND last_value > 0"
    return {row.sequencename: row.last_value for row in connection.execute(text(given))}


def _go_on_counting(connection: Connection, given: Mapping[str, int]) -> None:
    """Continue each sequence after its table's last number, and after what it had given if that is known."""
    for name in _known_tables(connection):
        column = Base.metadata.tables[name].autoincrement_column
        if column is None:
            continue
        found = text("SELECT pg_get_serial_sequence(:table, :column)")
        sequence = connection.execute(found, {"table": name, "column": column.name}).scalar()
        if sequence is None:
            continue
        quoted = _quoted(connection, [column.name])
        counted = f"SELECT coalesce(max({quoted}), 0) FROM {_quoted(connection, [name])}"  # noqa: S608  our own names
        last = max(connection.exec_driver_sql(counted).scalar_one(), given.get(sequence.rpartition(".")[2], 0))
        position = {"name": sequence, "number": max(1, last), "given": last > 0}
        connection.execute(text("SELECT setval(CAST(:name AS regclass), :number, :given)"), position)


def _copy_out(connection: Connection, table: str, archive: zipfile.ZipFile) -> DumpedTable:
    columns = [column["name"] for column in inspect(connection).get_columns(table)]
    statement = f"COPY {_quoted(connection, [table])} ({_quoted(connection, columns)}) TO STDOUT"
    with _cursor(connection, table) as cursor, archive.open(member(table), "w", force_zip64=True) as target:
        with cursor.copy(statement) as rows:
            for block in rows:
                target.write(block)
        return DumpedTable(name=table, columns=columns, rows=cursor.rowcount)


def _copy_in(connection: Connection, table: DumpedTable, archive: zipfile.ZipFile) -> None:
    name = _quoted(connection, [table.name])
    # the triggers of loractl db roles hold people to what they may; these rows are not anybody's wish
    connection.exec_driver_sql(f"ALTER TABLE {name} DISABLE TRIGGER USER")
    with _cursor(connection, table.name) as cursor:
        with cursor.copy(f"COPY {name} ({_quoted(connection, table.columns)}) FROM STDIN") as rows:
            for block in blocks_of(archive, table.name):
                rows.write(block)
        if cursor.rowcount != table.rows:
            raise LoractlError(f"{table.name} got {cursor.rowcount} rows of {table.rows}", "nothing was changed")
    connection.exec_driver_sql(f"ALTER TABLE {name} ENABLE TRIGGER USER")


def _refuse_filled(connection: Connection, dumped: Dump) -> None:
    """Raises WrongState where something is that the dump would mix with."""
    hint = "make another database (createdb loractl2), name it in LORACTL_DATABASE_URL, and restore into that"
    holds = "SELECT EXISTS (SELECT FROM {})"
    known = _known_tables(connection)
    filled = [name for name in known if connection.exec_driver_sql(holds.format(_quoted(connection, [name]))).scalar()]
    if filled:
        raise WrongState(f"the database is not empty: there are rows in {', '.join(filled)}", hint)
    found = _revision(connection)
    if found is not None and found != dumped.revision:
        raise WrongState(f"the database's tables are of revision {found}, the backup's of {dumped.revision}", hint)


@contextlib.contextmanager
def _cursor(connection: Connection, table: str) -> Iterator[Any]:
    """The driver's own cursor, for what SQLAlchemy has no words for; its errors as sentences."""
    from psycopg import Error

    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor:
            yield cursor
    except Error as error:
        why = next(iter(str(error).splitlines()), "no answer")
        raise LoractlError(f"{table} could not be copied: {why}", "nothing was changed; try again") from error


def _quoted(connection: Connection, names: Sequence[str]) -> str:
    quote = connection.dialect.identifier_preparer.quote_identifier
    return ", ".join(map(quote, names))
