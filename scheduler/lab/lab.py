"""A lab on running services: its tables, its roles, and the join lines of its guests."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.common.errors import UsageError
from loractl.common.lab_store import SETTING, adopt, open_lab_store
from loractl.common.settings import Settings
from loractl.common.store.database import one_look
from loractl.common.store.entrance import DatabaseServer, Invitation, LabOwner, lab_owner
from loractl.common.store.roles import SUBMIT, WORK
from loractl.common.store.schema import HEAD
from loractl.common.store.store import Store

from .addresses import addresses_of, is_only_here
from .line import JoinLine, new_secret

VALID_S = 3600.0
"""How long a join line is valid."""


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A box or a person to invite. `name`: None to choose it on joining."""

    kind: str  # box or person
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class JoinTicket:
    """A join line, for one machine."""

    kind: str
    name: str | None
    line: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class LabAnswer:
    """What was done, and the lines. `host`: where they lead. `revision_before`: None for new tables."""

    host: str
    only_here: bool
    revision: str
    revision_before: str | None
    new_roles: tuple[str, ...]
    until: dt.datetime
    tickets: tuple[JoinTicket, ...]
    done: tuple[str, ...] = ()  # sentences about services

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        tickets = [vars(ticket) for ticket in self.tickets]
        lists = {"tickets": tickets, "new_roles": list(self.new_roles), "done": list(self.done)}
        return {**vars(self), **lists, "until": self.until.isoformat()}


def set_up_lab(
    settings: Settings, guests: Sequence[Guest], address: str | None, *, valid_s: float = VALID_S
) -> LabAnswer:
    """Create tables and roles that are missing, and invite the guests. It may be repeated.

    Raises UsageError, SchemaMismatch for tables of another version, ServiceUnreachable, Forbidden, and what invite
    raises.
    """
    with _owner(settings) as owner:
        before, new_roles = owner.prepare()
        return replace(_invited(settings, owner, guests, address, valid_s), revision_before=before, new_roles=new_roles)


def invite_guests(settings: Settings, guests: Sequence[Guest], address: str | None, *, valid_s: float) -> LabAnswer:
    """Lines for guests of an existing lab. Raises what set_up_lab raises."""
    with _owner(settings) as owner:
        return _invited(settings, owner, guests, address, valid_s)


@contextlib.contextmanager
def _owner(settings: Settings) -> Iterator[LabOwner]:
    if settings.embedded_database:
        hint = "--packages or --containers runs one here; or set LORACTL_DATABASE_URL to yours, as its owner"
        raise UsageError("a lab needs PostgreSQL", hint)
    with lab_owner(settings) as owner:
        yield owner


def _invited(
    settings: Settings, owner: LabOwner, guests: Sequence[Guest], address: str | None, valid_s: float
) -> LabAnswer:
    server = owner.server()
    addresses = replace(addresses_of(settings, server.tls, address), store_mark=_store_mark(settings))
    lines = [_line(server, addresses.database_tls, address) for _ in guests]
    pairs = list(zip(guests, lines, strict=True))
    until = owner.invite([_invitation(guest, line, addresses.text()) for guest, line in pairs], valid_s)
    host = lines[0].host
    return LabAnswer(
        host=host,
        only_here=is_only_here(host),
        revision=HEAD,
        revision_before=HEAD,
        new_roles=(),
        until=until,
        tickets=tuple(JoinTicket(kind=guest.kind, name=guest.name, line=line.text()) for guest, line in pairs),
    )


def _store_mark(settings: Settings) -> str:
    """The store's mark; a lab without one gets it here. Raises WrongStore, and what adopt raises."""
    with one_look(settings) as engine:
        store = Store(engine)
        if (known := store.lab.setting(SETTING)) is None:
            return adopt(settings, store)
        open_lab_store(settings, store).check()
        return known


def _line(server: DatabaseServer, tls: dict[str, str], address: str | None) -> JoinLine:
    number, secret = new_secret()
    host = address if address is not None and is_only_here(server.host) else server.host
    encrypted = server.tls or tls.get("sslmode", "prefer") not in ("disable", "allow", "prefer")
    # the authority's file is not on the other machine yet; the password proves a server that terminates TLS itself
    mode = {"sslmode": "require"} if encrypted else {}
    mode |= {"channel_binding": "require"} if server.tls else {}
    return JoinLine(host=host, port=server.port, database=server.database, number=number, secret=secret, tls=mode)


def _invitation(guest: Guest, line: JoinLine, addresses: str) -> Invitation:
    role = {"box": WORK, "person": SUBMIT}[guest.kind]
    sealed = line.seal(addresses)
    return Invitation(login=line.login, password=line.password, role=role, name=guest.name, sealed=sealed)
