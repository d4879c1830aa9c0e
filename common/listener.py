"""How loractl's servers listen: uvicorn, without callers that hold a connection and send nothing. Needs uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import resource
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import UsageError

HEADERS_S = 10.0
"""Seconds in which the lines of a request must have arrived."""

WAITING = 1000
"""Connections that may wait for their callers: for a request's lines, its body, or a further request."""

FILES = 4096
"""Open files that a server may have: the connections that one turn of its loop accepts, too, and the rest of it."""

KEEP_ALIVE_S = 75
"""Seconds in which a further request may come: longer than a proxy keeps a connection, which is 60 s for most."""

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

    uvicorn itself waits for them forever: a few thousand callers that send a byte now and then would hold all of a
    process's connections. What still comes after an answer must be the next request. When too many connections wait for
    their callers, the address with most of them loses its oldest: a caller that asks at once is shut out neither by
    another address nor by older connections of its own proxy, and a fleet behind one proxy loses none.
    """

    _began = 0.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._began = self.loop.time()
        self._make_room()
        self._late = self.loop.call_later(HEADERS_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._late is None and self._idle:
            self._late = self.loop.call_later(HEADERS_S, self._give_up)
        super().data_received(data)
        if not self._idle:
            self._in_time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._make_room()  # those that came while this one was answered did not count it

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        if len(self.connections) <= WAITING:
            return
        waiting = [other for other in self.connections if isinstance(other, Connection) and other._waits]
        for _ in range(len(waiting) - WAITING):
            counts = Counter(other._address for other in waiting)
            most = max(counts.values())
            oldest = min((one for one in waiting if counts[one._address] == most), key=lambda one: one._began)
            waiting.remove(oldest)
            self.connections.discard(oldest)
            oldest.transport.abort()  # close() waits for a caller that does not read its answer

    @property
    def _address(self) -> str | None:
        return (self.client or [None])[0]

    @property
    def _idle(self) -> bool:
        """Whether no request's lines have arrived, or the last request is answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _waits(self) -> bool:
        """Whether it is the caller's turn."""
        return self._idle or self.cycle.more_body

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
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, FILES)), hard))
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                self._tell(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
