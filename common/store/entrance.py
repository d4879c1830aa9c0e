"""The way into a lab: its owner makes the tables, the roles and the invitations. An invitation is a login that lasts an
hour, and may only call the function that makes a box's or a person's own login.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from sqlalchemy import Connection, Engine, text

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.settings import Settings

from .database import connect, reachable
from .roles import WantedLogin, apply_roles, check_login, refuse_another_s, role_exists, verifier
from .schema import HEAD, lock_schema, mismatch, revision, upgrade

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
