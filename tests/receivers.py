"""Receivers of messages on loopback, real sockets of which many misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Behaviour = Callable[[socket.socket], None]


@dataclass(frozen=True, kw_only=True)
class Received:
    """One request as it came."""

    line: str
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(kw_only=True)
class Receiver:
    """An HTTP server that answers as it is told: a behaviour a request, the last one for all that follow."""

    port: int
    behaviours: list[Behaviour]
    requests: list[Received] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook/S3CRET-PATH?key=S3CRET-KEY"


def answer(text: str) -> Behaviour:
    """Say this and close."""
    return lambda connection: connection.sendall(text.replace("\n", "\r\n").encode())


def status(code: int, *headers: str) -> Behaviour:
    lines = "".join(f"{line}\n" for line in headers)
    return answer(f"HTTP/1.1 {code} Whatever\n{lines}Content-Length: 19\n\nANSWER-OF-RECEIVER\n")


def hang(connection: socket.socket) -> None:
    """Say nothing until the other side goes."""
    connection.recv(1)


def close(connection: socket.socket) -> None:
    """Hang up on a request that was read."""


def endless_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def endless_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"a: b\r\n")


def trickle(connection: socket.socket) -> None:
    """A byte at a time, each soon enough for a limit on silence."""
    for byte in b"HTTP/1.1 200 OK\r\nlong: " + b"x" * 10_000:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


@contextlib.contextmanager
def receiver(*behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Receiver(port=listener.getsockname()[1], behaviours=list(behaviours))
        threading.Thread(target=_accept, args=(listener, made, tls), daemon=True).start()
        yield made


def _accept(listener: socket.socket, made: Receiver, tls: ssl.SSLContext | None) -> None:
    with contextlib.suppress(OSError):  # closed: the test is over
        while True:
            connection, _ = listener.accept()
            made.connections += 1
            threading.Thread(target=_serve, args=(connection, made, tls), daemon=True).start()


def _serve(connection: socket.socket, made: Receiver, tls: ssl.SSLContext | None) -> None:
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException), connection:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_side=True)
        with connection.makefile("rb") as file:
            line = file.readline().decode("latin-1").strip()
            headers = http.client.parse_headers(file)
            body = file.read(int(headers.get("Content-Length", "0")))
        made.requests.append(Received(line=line, headers=headers, body=body))
        behave = made.behaviours.pop(0) if len(made.behaviours) > 1 else made.behaviours[0]
        behave(connection)
