"""TLS for the tests: an authority, certificates, and a terminator before a real server that speaks none itself."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from . import services

_POSTGRES_ASKS = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
"""PostgreSQL's SSLRequest: a length of 8, and 80877103 (its protocol's documentation, "SSL Session Encryption")."""


def make_authority(folder: Path) -> Path:
    """A new authority with a certificate for localhost; returns its own certificate, which clients trust."""
    folder.mkdir()
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    request += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]  # which Python 3.13 asks for
    server = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"]
    _openssl(folder, *request, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    _openssl(folder, *request, "-subj", "/CN=localhost", *server, "-keyout", "server.key", "-out", "server.pem")
    return folder / "ca.pem"


@contextlib.contextmanager
def terminator(authority: Path, upstream: int | Path, *, postgres: bool = False) -> Iterator[int]:
    """A port on which TLS ends, and from which bytes go on to a real server's port or unix socket."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.with_name("server.pem"), authority.with_name("server.key"))
    port = services.free_port()
    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=_accept, args=(listener, context, upstream, postgres), daemon=True).start()
        yield port


def _accept(listener: socket.socket, context: ssl.SSLContext, upstream: int | Path, postgres: bool) -> None:
    with contextlib.suppress(OSError):  # closed: the test is over
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, context, upstream, postgres), daemon=True).start()


def _serve(client: socket.socket, context: ssl.SSLContext, upstream: int | Path, postgres: bool) -> None:
    with contextlib.suppress(OSError), client:  # ssl.SSLError is one: the client did not like the certificate
        if postgres:
            if client.recv(8) != _POSTGRES_ASKS:
                return
            client.sendall(b"S")
        with context.wrap_socket(client, server_side=True) as outer, _connected(upstream) as inner:
            back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
            back.start()
            _copy(outer, inner)
            back.join()


def _connected(upstream: int | Path) -> socket.socket:
    if isinstance(upstream, int):
        return socket.create_connection(("127.0.0.1", upstream))
    inner = socket.socket(socket.AF_UNIX)
    inner.connect(str(upstream))
    return inner


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(65536):
            target.sendall(block)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
