"""The schema's revision, and its migration to the newest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import IntegrityError

from loractl.common.errors import LoractlError, SchemaMismatch, SchemaTooOld, WrongState

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0053"
"""The newest migration in migrations/versions; a test holds it equal to Alembic's own head."""

OLDEST = "0031"
"""The revision that the first migration makes: `UPGRADER` brings an older database or backup to it."""

UPGRADER = "loractl 0.5.0, commit 18a2d29e"


def mismatch(found: str | None, what: str = "the database") -> SchemaMismatch:
    """Why a schema of this revision is not used; None: there is none."""
    if found is not None and found < OLDEST:
        return SchemaTooOld(found, OLDEST, upgrader=UPGRADER, what=what)
    return SchemaMismatch(found, HEAD, what=what)


def revision(engine: Engine) -> str | None:
    """The schema's revision, None for a database without loractl's tables."""
    with engine.connect().execution_options(read_only=True) as connection:
        if not engine.dialect.has_table(connection, "alembic_version"):
            return None
        number = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return None if number is None else str(number)


def require_own(engine: Engine) -> None:
    """Raises SchemaMismatch for tables of another version: they may go on under a process that runs."""
    if (found := revision(engine)) != HEAD:
        raise mismatch(found)


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Migrate to HEAD; returns the revision before and after. Several processes may call it at once.

    Raises SchemaMismatch for a database newer than this loractl, or older than what it upgrades.
    """
    from alembic import command

    from .checks import hold

    before = revision(engine)
    if before is not None and not OLDEST <= before <= HEAD:
        raise mismatch(before)
    with migrating(engine) as connection, alembic_config(connection) as config:
        if engine.dialect.name == "postgresql":
            for patience in ("statement_timeout", "lock_timeout"):
                connection.execute(text(f"SET LOCAL {patience} = 0"))  # a migration takes what it takes
            lock_schema(connection)
        command.upgrade(config, "head")
        hold(connection)
    return before, HEAD


@contextlib.contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A transaction in which a table may be replaced. On SQLite that would delete the rows that refer to it, so foreign
    keys rest, which can be said outside of a transaction alone, and are looked at before its end."""
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        is_sqlite = engine.dialect.name == "sqlite"
        if is_sqlite:
            driver.execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                yield connection
                if is_sqlite and (lost := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
                    raise LoractlError(f"a row of {lost[0]} would refer to none of {lost[2]}", "nothing was changed")
        finally:
            if is_sqlite:
                driver.execute("PRAGMA foreign_keys = ON")


def lock_schema(connection: Connection) -> None:
    """Wait until no other transaction makes tables, roles or invitations, and let none do so until this one's end.

    A login that only reads the table can't take this lock. Alembic finds the table that is made here.
    """
    if not inspect(connection).has_table("alembic_version"):
        with contextlib.suppress(IntegrityError), connection.begin_nested():  # another transaction has just made it
            connection.execute(text(_VERSION_TABLE))
    connection.execute(text("LOCK TABLE alembic_version IN EXCLUSIVE MODE"))


def require_unserved(engine: Engine, found: str) -> None:
    """Raises WrongState while workers serve tables of the revision `found`, which would be taken from beneath them."""
    if boxes := _serving_boxes(engine):
        raise WrongState(
            f"{', '.join(boxes)} still {'serves' if len(boxes) == 1 else 'serve'} with revision {found}",
            "stop them (Ctrl-C, or systemctl stop loractl-worker), then try again; db upgrade --force skips this check",
        )


def _serving_boxes(engine: Engine) -> list[str]:
    """Boxes whose workers have written their rows within a minute, whatever the tables' revision."""
    recent = {
        "postgresql": "seen_at > clock_timestamp() - interval '60 seconds'",
        "sqlite": "seen_at > datetime('now', '-60 seconds')",
    }
    with engine.connect().execution_options(read_only=True) as connection:
        if not engine.dialect.has_table(connection, "nodes"):
            return []
        hosts = f"SELECT DISTINCT host FROM nodes WHERE {recent[engine.dialect.name]} ORDER BY host"  # noqa: S608
        return list(connection.execute(text(hosts)).scalars())


_VERSION_TABLE = """
CREATE TABLE alembic_version (
  version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
)
"""


@contextlib.contextmanager
def alembic_config(connection: Connection | None) -> Iterator[Config]:
    """Alembic's configuration without an ini file; the scripts come from the installed package."""
    from alembic.config import Config

    with as_file(files("loractl.migrations")) as folder:
        config = Config()
        config.set_main_option("script_location", str(folder))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        yield config
