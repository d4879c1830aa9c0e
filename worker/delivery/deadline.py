"""A connection that ends at its deadline, however slowly the other side speaks."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

from loractl.common.store.records import Delivery

CONNECT_S = 5.0
"""Seconds for each address of a receiver, and for each silence."""

DEADLINE_S = 15.0
"""Seconds for a whole exchange, including the connection; well within a message's lease."""


@contextlib.contextmanager
def connected(host: str, port: int, deadline_s: float = DEADLINE_S) -> Iterator[socket.socket]:
    """A connection that is shut down when its time runs out: a read then ends at once.

    Raises OSError; TimeoutError if the time ran out, even after part of an answer.
    """
    with socket.create_connection((host, port), timeout=min(CONNECT_S, deadline_s)) as connection:
        over = threading.Event()
        file = connection.dup()  # wrapping in TLS takes the socket away from its first object

        def end() -> None:
            over.set()
            with contextlib.suppress(OSError):
                file.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(deadline_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        finally:
            timer.cancel()
            file.close()
            if over.is_set():
                raise TimeoutError


def broken(error: Exception) -> Delivery:
    """A failed exchange in our own words: an error's text may contain an address, or the receiver's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = "its TLS certificate is not trusted"
    elif isinstance(error, ssl.SSLError):
        why = "TLS failed"
    elif isinstance(error, TimeoutError):
        why = "it does not answer in time"
    elif isinstance(error, ConnectionRefusedError):
        why = "the connection is refused"
    elif isinstance(error, socket.gaierror):
        why = "its name is not found"
    else:
        why = "the connection broke"
    return Delivery(again=True, why=why)
