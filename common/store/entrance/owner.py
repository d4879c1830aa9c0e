"""What the owner of a lab's tables does with its database: the tables, the roles, the invitations."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, text

from loractl.common.errors import SchemaMismatch
from loractl.common.settings import Settings
from loractl.common.store.database import connect, reachable
from loractl.common.store.roles import apply_roles
from loractl.common.store.schema import HEAD, revision, upgrade

from .invitations import Invitation, invite


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
            raise SchemaMismatch(before, HEAD)
        return before, apply_roles(self._engine).new_roles

    def invite(self, invitations: Sequence[Invitation], valid_s: float) -> dt.datetime:
        """As `invite` says. Raises SchemaMismatch where nothing was prepared."""
        if (before := revision(self._engine)) != HEAD:
            raise SchemaMismatch(before, HEAD)
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
