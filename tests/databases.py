"""Databases of PostgreSQL for tests: a fresh one for each, or one that is emptied between two."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text

from loractl.common.store.database import make_engine
from loractl.common.store.roles import apply_roles, invite
from loractl.common.store.schema import upgrade

SQLITE_ALONE = pytest.mark.parametrize("upgraded_url", ["sqlite"], indirect=True)
"""For tests of what is decided above the database: every statement that they send goes to PostgreSQL in other tests."""

_numbers = itertools.count()


UPGRADED = "upgraded"
"""The database that others are copied from: a copy takes a tenth of the migrations' time."""


def make_template(server: str) -> None:
    """Make UPGRADED, and the roles of a lab: they are the server's, and two tests at once would both make them."""
    with _admin(server) as connection:
        connection.execute(text(f"CREATE DATABASE {UPGRADED}"))
    engine = make_engine(_url(server, UPGRADED))
    upgrade(engine)
    engine.dispose()
    with database(server, UPGRADED) as url:
        engine = make_engine(url)
        apply_roles(engine)
        invite(engine, [], valid_s=0)
        engine.dispose()


@contextlib.contextmanager
def database(server: str, template: str = "template1") -> Iterator[str]:
    """The URL of a database of its own, a copy of the template."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    admin = create_engine(psycopg_url(server), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(_COPY.format(name, template)))
    yield _url(server, name)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def fill(server: str, url: str) -> None:
    """Put a copy of UPGRADED in the place of an empty database."""
    name = make_url(url).database
    with _admin(server) as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        connection.execute(text(_COPY.format(name, UPGRADED)))


_COPY = "CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY"


@contextlib.contextmanager
def _admin(url: str) -> Iterator[Connection]:
    engine = create_engine(psycopg_url(url), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


def _url(server: str, name: str) -> str:
    base, _, query = server.partition("?")
    return psycopg_url(base.rpartition("/")[0] + f"/{name}" + (f"?{query}" if query else ""))


def psycopg_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


OPEN_LAB = "INSERT INTO lab_settings VALUES ('changes', 'open')"
"""People of tests change each other's jobs, where a test is not about that."""


class KeptDatabase:
    """An upgraded PostgreSQL database that one test after the other gets empty. To make one for each takes ten times as
    long. A test that changes more than rows leaves the next one a new copy of the template."""

    rows = OPEN_LAB
    """What is written into an empty one."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._open: contextlib.ExitStack | None = None
        self._url, self._form = "", ""

    def url(self) -> str:
        if self._open is None:
            self._open = contextlib.ExitStack()
            self._url = self._open.enter_context(database(self._server, UPGRADED))
            self.furnish(self._open, self._url)
            with _admin(self._url) as connection:
                self._form = self._form_of(connection)
                connection.execute(text(self.rows))
        return self._url

    def empty(self) -> None:
        """End what is still connected, and delete all rows."""
        with _admin(self._url) as connection:
            connection.execute(text(_END_OTHERS))
            changed = self._form_of(connection) != self._form
            if not changed:
                connection.execute(text("SET session_replication_role = replica"))  # no foreign key is looked at
                connection.execute(text(_DELETE_ALL))
                connection.execute(text(self.rows))
        if changed:
            self.close()

    def furnish(self, until: contextlib.ExitStack, url: str) -> None:
        """Give a new copy what it has beside its tables, until it is dropped."""

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _form_of(self, connection: Connection) -> str:
        return str(connection.execute(text(_FORM)).scalar())


class KeptFile:
    """An upgraded SQLite file that one test after the other gets empty, so that its engine stays connected: to read the
    schema at a connect takes as long as a short test. A test that changes more than rows leaves the next one a copy."""

    def __init__(self, template: Path) -> None:
        self._template = template
        self._file = template.with_name(f"{os.getpid()}.db")
        self._own: sqlite3.Connection | None = None
        self._tables: list[str] = []
        self._form: tuple[object, ...] = ()

    def url(self) -> str:
        if self._own is None:
            for end in ("", "-wal", "-shm"):
                self._file.with_name(self._file.name + end).unlink(missing_ok=True)
            shutil.copy(self._template, self._file)
            self._own = sqlite3.connect(self._file, timeout=1, isolation_level=None, check_same_thread=False)
            found = self._own.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            self._tables = [name for (name,) in found if name not in ("alembic_version", "locks")]
            self._form = self._form_of(self._own)
        return f"sqlite:///{self._file}"

    def empty(self) -> bool:
        """Delete all rows; false if a new copy is next, since this one changed or somebody is still writing."""
        assert self._own is not None
        try:
            if self._form_of(self._own) == self._form:
                self._own.execute("BEGIN IMMEDIATE")
                for table in self._tables:
                    self._own.execute(f'DELETE FROM "{table}"')
                self._own.execute(OPEN_LAB)
                self._own.execute("COMMIT")
                return True
        except (sqlite3.Error, OSError):
            pass  # a test may have removed or broken it
        self.close()
        return False

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None

    def _form_of(self, own: sqlite3.Connection) -> tuple[object, ...]:
        """The file, and which tables and revision it has."""
        asked = ("PRAGMA schema_version", "SELECT version_num FROM alembic_version", "SELECT count(*) FROM locks")
        return (self._file.stat().st_ino, *(own.execute(one).fetchone() for one in asked))


_END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_DELETE_ALL = """
DO $$ DECLARE each record; BEGIN
  FOR each IN SELECT tablename FROM pg_tables WHERE schemaname = 'public'
      AND tablename NOT IN ('alembic_version', 'locks') LOOP
    EXECUTE format('DELETE FROM %I', each.tablename);
  END LOOP;
  FOR each IN SELECT sequencename FROM pg_sequences WHERE schemaname = 'public' LOOP
    EXECUTE format('ALTER SEQUENCE %I RESTART', each.sequencename);
  END LOOP;
END $$
"""
_FORM = """
SELECT md5(concat(
  (SELECT string_agg(concat(relname, relkind, relacl, relrowsecurity), ',' ORDER BY relname) FROM pg_class
     WHERE relnamespace = 'public'::regnamespace),
  (SELECT string_agg(concat(attrelid, attname, atttypid, attnotnull, attacl), ',' ORDER BY attrelid, attnum)
     FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid WHERE relnamespace = 'public'::regnamespace),
  (SELECT count(*) FROM pg_constraint), (SELECT count(*) FROM pg_trigger), (SELECT count(*) FROM pg_policy),
  (SELECT count(*) FROM pg_proc), (SELECT string_agg(setconfig::text, ',') FROM pg_db_role_setting),
  (SELECT datacl::text FROM pg_database WHERE datname = current_database()),
  (SELECT nspacl::text FROM pg_namespace WHERE nspname = 'public'),
  (SELECT version_num FROM alembic_version)))
"""
