"""The proxy does to a connection what it says, and heals."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from .proxy import Link, Proxy


@pytest.fixture
def link() -> Iterator[Link]:
    """A link to a server that answers what it hears."""
    server = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1024):
                connection.sendall(data)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed by the fixture
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with Proxy() as proxy:
        yield proxy.to_port(server.getsockname()[1])
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def call(link: Link) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", link.port), timeout=5)
    connection.sendall(b"a")
    assert connection.recv(1) == b"a"
    connection.settimeout(0.3)
    return connection


def test_a_cut_breaks_what_is_open_and_refuses_what_is_new(link: Link) -> None:
    connection = call(link)
    link.cut()
    with pytest.raises(ConnectionError):
        connection.sendall(b"b")
        if connection.recv(1) == b"":
            raise ConnectionError
    with pytest.raises((ConnectionError, TimeoutError, AssertionError)):
        call(link)
    link.heal()
    call(link)


def test_a_slow_link_delivers_after_its_delay(link: Link) -> None:
    connection = call(link)
    link.slow(0.5)
    connection.sendall(b"b")
    with pytest.raises(TimeoutError):  # after 0.3 s
        connection.recv(1)
    connection.settimeout(5)
    assert connection.recv(1) == b"b"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_silent_direction_delivers_late(link: Link, direction: str) -> None:
    connection = call(link)
    link.silence(direction)  # type: ignore[arg-type]
    connection.sendall(b"b")
    with pytest.raises(TimeoutError):
        connection.recv(1)
    link.heal()
    connection.settimeout(5)
    assert connection.recv(1) == b"b"
