"""PostgreSQL's roles of a lab and its logins: what each may do is in roles.sql, and nowhere else.

The way into a lab is an invitation: a login that lasts an hour, and may only call the function that makes a box's or a
person's own login. The lab's owner makes the tables, the roles and the invitations.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from sqlalchemy import Connection, Engine, text

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.settings import Settings

from .database import connect, reachable
from .schema import HEAD, lock_schema, mismatch, revision, upgrade

SUBMIT, WORK, SHOW = "loractl_submit", "loractl_worker", "loractl_web"
ROLES = (SUBMIT, WORK, SHOW)

MOST_CONNECTIONS = 20
"""Of a person's login, as in invitations.sql: one must not use up all that the server has."""

_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,62}", re.ASCII)
_LEAST_CHARACTERS = 12
"""Of a password that somebody else has chosen: anybody who reaches the server may guess."""


@dataclass(frozen=True, kw_only=True)
class WantedLogin:
    """A login that is to have one of ROLES. `password`: None for one that is made here."""

    name: str
    role: str
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class RoleLogin:
    """A login that has its role now. `url` with its password: None where it had one already, which stays."""

    name: str
    role: str
    new: bool
    url: str | None = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RolesDone:
    """What was done, at which revision of the tables. `new_roles`: those that were not there before."""

    revision: str
    new_roles: tuple[str, ...]
    logins: tuple[RoleLogin, ...]

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names; of each login its `url` with the password, null if that stays."""
        return {**vars(self), "new_roles": list(self.new_roles), "logins": [vars(login) for login in self.logins]}


def apply_roles(engine: Engine, wanted: Sequence[WantedLogin] = (), *, renew: bool = False) -> RolesDone:
    """Make the roles, say what each may do, and give the logins theirs: all or nothing, any number of times.

    `renew`: logins that are there get a new password, too. Raises UsageError for SQLite, a name that none can have or a
    short password, WrongState for a login that is somebody else, and Forbidden.
    """
    if engine.dialect.name != "postgresql":
        raise UsageError("only PostgreSQL has roles", "SQLite's file is its owner's alone: chmod does what roles do")
    for login in wanted:
        check_login(login, [other.name for other in wanted])
    with engine.begin() as connection:
        lock_schema(connection)
        new_roles = tuple(role for role in ROLES if not role_exists(connection, role))
        said = files(__package__).joinpath("roles.sql").read_text("utf-8")
        connection.exec_driver_sql(said.replace("%", "%%"))  # the driver looks for its placeholders
        logins = tuple(_give(connection, login, renew) for login in wanted)
    return RolesDone(revision=HEAD, new_roles=new_roles, logins=logins)


def has_roles(engine: Engine) -> bool:
    """Whether the database's server has the roles; SQLite never has."""
    with engine.connect() as connection:
        return engine.dialect.name == "postgresql" and role_exists(connection, SUBMIT)


def unbounded(connection: Connection) -> tuple[str, ...]:
    """What a login that submits could fill the server's disk or table of locks with, though nothing of loractl's needs
    it."""
    found = connection.execute(text(_UNBOUNDED), {"role": SUBMIT}).one()
    return tuple(name.replace("_", " ") for name, is_open in found._mapping.items() if is_open)


_UNBOUNDED = """
SELECT has_database_privilege(:role, current_database(), 'TEMPORARY') AS temporary_tables,
  has_function_privilege(:role, 'lo_creat(integer)', 'EXECUTE')
    OR has_function_privilege(:role, 'lo_create(oid)', 'EXECUTE')
    OR has_function_privilege(:role, 'lo_from_bytea(oid, bytea)', 'EXECUTE') AS large_objects,
  has_function_privilege(:role, 'pg_advisory_lock(bigint)', 'EXECUTE') AS advisory_locks,
  EXISTS (SELECT FROM pg_database WHERE datname IN ('postgres', 'template1') AND datname <> current_database()
    AND datallowconn AND has_database_privilege(:role, oid, 'CONNECT')) AS what_other_databases_allow,
  coalesce(
    (SELECT split_part(one, '=', 2) FROM pg_db_role_setting JOIN pg_database ON setdatabase = pg_database.oid,
      unnest(setconfig) AS one
      WHERE datname = current_database() AND setrole = 0 AND starts_with(one, 'temp_file_limit=')),
    (SELECT reset_val FROM pg_settings WHERE name = 'temp_file_limit')) = '-1' AS temporary_files
"""


def check_login(login: WantedLogin, names: Sequence[str] = ()) -> None:
    """Whether it can be a login. Raises UsageError."""
    if not _NAME.fullmatch(login.name) or login.name.startswith(("pg_", "loractl")) or login.name == "public":
        raise UsageError(
            f"{login.name!r} is not a valid login name", "small letters, digits, '_', '.' and '-', like ada"
        )
    if names.count(login.name) > 1:
        raise UsageError(f"{login.name} is named twice", "a login has one role: give a person and a box their own")
    if login.password is not None and (len(login.password) < _LEAST_CHARACTERS or not login.password.isprintable()):
        hint = "openssl rand -hex 24 makes one; without --passwords one is made here"
        raise UsageError(f"the password for {login.name} is no line of {_LEAST_CHARACTERS} characters or more", hint)


def role_exists(connection: Connection, name: str) -> bool:
    """Whether the server has it; a role is there for all its databases."""
    return connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": name}).scalar() == 1


def _give(connection: Connection, login: WantedLogin, renew: bool) -> RoleLogin:
    """Make the login where it is missing, and give it its role."""
    new = not role_exists(connection, login.name)
    quoted = connection.dialect.identifier_preparer.quote_identifier(login.name)
    if new:
        limit = f" CONNECTION LIMIT {MOST_CONNECTIONS}" if login.role == SUBMIT else ""
        connection.exec_driver_sql(f"CREATE ROLE {quoted} LOGIN{limit}")
    else:
        refuse_another_s(connection, login)
    connection.exec_driver_sql(f"GRANT {login.role} TO {quoted}")
    if not new and not renew and login.password is None:
        return RoleLogin(name=login.name, role=login.role, new=False, url=None)
    password = login.password or secrets.token_hex(24)
    connection.exec_driver_sql(f"ALTER ROLE {quoted} PASSWORD '{verifier(connection, login.name, password)}'")
    address = connection.engine.url.set(drivername="postgresql", username=login.name, password=password)
    url = address.render_as_string(hide_password=False)
    return RoleLogin(name=login.name, role=login.role, new=new, url=url)


def refuse_another_s(connection: Connection, login: WantedLogin) -> None:
    """A login with more rights would not be held by its role; one that has another of ROLES would have both."""
    facts = text(
        "SELECT rolsuper OR rolcreaterole OR NOT rolcanlogin OR rolname = session_user AS other,"
        " ARRAY(SELECT r.rolname::text FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid"
        " WHERE m.member = pg_roles.oid) AS has FROM pg_roles WHERE rolname = :name"
    )
    row = connection.execute(facts, {"name": login.name}).one()
    if row.other:
        raise WrongState(f"{login.name} has more rights than any role of a lab", "give this person or box another name")
    if others := sorted(set(row.has) & set(ROLES) - {login.role}):
        hint = f"REVOKE {others[0]} FROM {login.name}, or give this person or box another name"
        raise WrongState(f"{login.name} has the role {others[0]}", hint)


def verifier(connection: Connection, name: str, password: str) -> str:
    """What PostgreSQL keeps in a password's place (RFC 5802): a statement with the password could be logged."""
    driver: Any = connection.connection.driver_connection
    return str(driver.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode())


LOGIN = "loractl_join_"
"""The prefix of all logins of join lines; 12 hex digits follow."""

_REFUSED = {
    "spent": ("this join line is no longer valid", "on the server box: loractl lab invite"),
    "verifier": ("the database takes no password of this form", "loractl here and on the server box differ: upgrade"),
    "name": ("it can't be a login's name", "small letters, digits, '_', '.' and '-': loractl join --name NAME"),
    "taken": (
        "another login has this name",
        "join as another one with --name NAME, or on the server box: loractl lab invite with this name",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """One invitation. `login` and `password` are the join line's, and only that line can read `sealed`."""

    login: str
    password: str = field(repr=False)
    role: str  # SUBMIT or WORK
    name: str | None  # of the new login; None: the person chooses it when joining
    sealed: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Invited:
    """What a join line is for."""

    role: str
    name: str | None
    sealed: str = field(repr=False)


def invite(engine: Engine, invitations: Sequence[Invitation], valid_s: float) -> dt.datetime:
    """Make the logins of join lines, all or none, and remove spent ones; says when they end, by the database's clock.

    Raises UsageError for a name that none can have, WrongState for one that is somebody else's, Forbidden.
    """
    for invitation in invitations:
        if invitation.name is not None:
            check_login(WantedLogin(name=invitation.name, role=invitation.role))
    with engine.begin() as connection:
        lock_schema(connection)
        said = files(__package__).joinpath("invitations.sql").read_text("utf-8")
        connection.exec_driver_sql(said.replace("%", "%%"))  # the driver looks for its placeholders
        until: dt.datetime = connection.execute(
            text("SELECT clock_timestamp() + make_interval(secs => :s)"), {"s": valid_s}
        ).scalar_one()
        for invitation in invitations:
            _make(connection, invitation, until)
    return until


def _make(connection: Connection, invitation: Invitation, until: dt.datetime) -> None:
    quote = connection.dialect.identifier_preparer.quote_identifier
    login, kept = quote(invitation.login), verifier(connection, invitation.login, invitation.password)
    connection.exec_driver_sql(
        f"CREATE ROLE {login} LOGIN CONNECTION LIMIT 2 PASSWORD '{kept}' VALID UNTIL '{until.isoformat()}'"
    )
    connection.exec_driver_sql(f"GRANT loractl_join TO {login}")
    connection.exec_driver_sql(f"GRANT {login} TO loractl_registrar WITH ADMIN OPTION")  # which ends it
    if invitation.name is not None and role_exists(connection, invitation.name):
        refuse_another_s(connection, WantedLogin(name=invitation.name, role=invitation.role))
        if not connection.execute(text(_HAS_ADMIN), {"name": invitation.name}).scalar():
            connection.exec_driver_sql(f"GRANT {quote(invitation.name)} TO loractl_registrar WITH ADMIN OPTION")
    connection.execute(
        text(
            "INSERT INTO loractl_lab.invitations (login, role, name, sealed, expires_at)"
            " VALUES (:login, :role, :name, :sealed, :until)"
        ),
        {
            "login": invitation.login, "role": invitation.role, "name": invitation.name, "sealed": invitation.sealed,
            "until": until,
        },
    )  # fmt: skip


_HAS_ADMIN = "SELECT pg_has_role('loractl_registrar', CAST(:name AS name), 'MEMBER WITH ADMIN OPTION')"


def look(engine: Engine) -> Invited:
    """What the join line is for, by its own login's engine; the line stays valid. Raises WrongState."""
    with engine.connect() as connection:
        return Invited(**_asked(connection, None, None))


@contextlib.contextmanager
def entered(engine: Engine, name: str, password: str) -> Iterator[str]:
    """Make the login with this password; yields its name. Where the body raises, nothing was made, and the line serves.

    The server gets only the password's SCRAM verifier. Raises UsageError and WrongState.
    """
    with engine.begin() as connection:
        yield str(_asked(connection, name, verifier(connection, name, password))["name"])


def _asked(connection: Connection, name: str | None, kept: str | None) -> dict[str, Any]:
    statement = text("SELECT loractl_lab.enter(:name, :kept)")
    answer = connection.execute(statement, {"name": name, "kept": kept}).scalar_one()
    found: dict[str, Any] = json.loads(answer) if isinstance(answer, str) else answer
    if (why := found.get("refused")) is None:
        return found
    sentence, hint = _REFUSED.get(why, ("the database refuses it", None))
    kind: type[LoractlError] = UsageError if why == "name" else WrongState
    raise kind(f"{name}: {sentence}" if name and why != "spent" else sentence, hint)


@dataclass(frozen=True, kw_only=True)
class DatabaseServer:
    """Where it is by the owner's own address, and whether it offers encrypted connections itself."""

    host: str  # or the folder of a unix socket
    port: int
    database: str
    tls: bool


class LabOwner:
    """The owner of the tables, by an engine. Every method raises Forbidden for somebody else."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def server(self) -> DatabaseServer:
        """The server that has the database."""
        url, options = self._engine.url, dict(self._engine.url.query)
        host, port = url.host or options.get("host") or "localhost", url.port or options.get("port") or 5432
        with self._engine.connect() as connection:
            tls = connection.execute(text("SHOW ssl")).scalar_one() == "on"
        return DatabaseServer(host=str(host), port=int(str(port)), database=str(url.database), tls=tls)

    def prepare(self) -> tuple[str | None, tuple[str, ...]]:
        """Make missing tables and roles; returns the previous revision, and the new roles.

        Raises SchemaMismatch: upgrading tables in use is a decision of its own.
        """
        if (before := revision(self._engine)) is None:
            upgrade(self._engine)
        elif before != HEAD:
            raise mismatch(before)
        return before, apply_roles(self._engine).new_roles

    def invite(self, invitations: Sequence[Invitation], valid_s: float) -> dt.datetime:
        """As `invite` says. Raises SchemaMismatch where nothing was prepared."""
        if (before := revision(self._engine)) != HEAD:
            raise mismatch(before)
        return invite(self._engine, invitations, valid_s)


@contextlib.contextmanager
def lab_owner(settings: Settings) -> Iterator[LabOwner]:
    """The owner by the settings' address. Raises ServiceUnreachable."""
    engine = connect(settings, check_schema=False)
    try:
        with reachable(settings):
            yield LabOwner(engine)
    finally:
        engine.dispose()
