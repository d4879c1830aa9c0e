"""How loractl's servers listen: uvicorn, without callers that hold a connection and send nothing. Needs uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import UsageError

HEADERS_S = 10.0
"""Seconds in which the lines of a request must have arrived."""

WAITING = 50
"""Connections of one address that may wait, for a request's lines or for a further request."""

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?", re.ASCII)


def host_name(hosts: Sequence[str]) -> str:
    """The name or address by which a request calls the server, by its Host headers; empty without a plain one.

    The framework's `request.url` is no substitute: it takes a Host that it can't read for the server's own address, and
    up to Starlette 1.0.0 a Host with a slash gave it another path.
    """
    match = _HOST.fullmatch(hosts[0].strip().lower()) if len(hosts) == 1 else None
    return "" if match is None else match[1] or match[2].rstrip(".")


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a name already is; None for one that somebody's DNS may point anywhere."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def check_port(host: str, port: int) -> None:
    """Raises UsageError where nothing can listen, before anything is loaded for it."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with contextlib.closing(socket.socket(family, kind)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UsageError(f"can't listen on {host}:{port}: {why}", "choose another --host or --port") from error


class Connection(H11Protocol):
    """A caller's connection, which ends when the lines of a request don't arrive in time.

    uvicorn itself waits for them forever: a few hundred callers that send a byte now and then would hold all of a
    process's connections. What still comes after an answer must be the next request. Of an address's waiting
    connections only the newest stay: a caller that asks at once is not shut out by older connections, its own or those
    of others behind its proxy.
    """

    _began = 0.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._began = self.loop.time()
        self._leave_the_newest()
        self._late = self.loop.call_later(HEADERS_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._late is None and self._idle:
            self._late = self.loop.call_later(HEADERS_S, self._give_up)
        super().data_received(data)
        if not self._idle:
            self._in_time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._leave_the_newest()  # those that came while this one was answered did not count it

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _leave_the_newest(self) -> None:
        for older in self._waiting_beside()[:-WAITING]:
            older._give_up()

    def _waiting_beside(self) -> list[Connection]:
        """The waiting connections of the same address, this one included, the oldest first."""
        host = (self.client or [None])[0]
        every = [other for other in self.connections if isinstance(other, Connection) and other._idle]
        mine = [other for other in every if (other.client or [None])[0] == host and not other.transport.is_closing()]
        return sorted(mine, key=lambda other: other._began)

    @property
    def _idle(self) -> bool:
        """Whether no request has arrived whole, or the last one is answered."""
        return self.cycle is None or self.cycle.response_complete

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._in_time()
        if self._idle and not self.transport.is_closing():
            self.transport.close()


class Listener(uvicorn.Server):
    """uvicorn that says where it listens once it does: each address with its port, as in a URL."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[str], None]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: Any = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                self._tell(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
