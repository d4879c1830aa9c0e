"""PostgreSQL's roles of a lab and its logins: what each may do is in roles.sql, and nowhere else."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from sqlalchemy import Connection, Engine, text

from loractl.common.errors import UsageError, WrongState

from .schema import HEAD, lock_schema

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
