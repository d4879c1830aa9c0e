"""How the site listens: uvicorn with limits, and the address to open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn

from loractl.common.errors import UsageError
from loractl.common.listener import KEEP_ALIVE_S, WAITING, Connection, Listener, check_port

from .access import is_loopback

if TYPE_CHECKING:
    from .access import Access

AT_ONCE = 200
"""Requests answered at a time, beside connections that wait; further ones are asked to come later."""


def listen(app: Any, host: str, port: int, access: Access, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises UsageError if nothing can listen there."""
    check_port(host, port)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        http=Connection,
        limit_concurrency=WAITING + AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=3,
    )
    server = Listener(config, lambda at: tell(_address(host, at.rpartition(":")[2], access)))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    except SystemExit as error:  # the port was taken in between; uvicorn has said why
        raise UsageError(f"can't listen on {host}:{port}", "choose another --host or --port") from error


def _address(host: str, port: str, access: Access) -> str:
    name = "localhost" if is_loopback(host) else host
    if host in ("0.0.0.0", "::"):  # noqa: S104  all addresses: a person opens one of them
        name = min(access.names - {"localhost"}, key=lambda name: (len(name), name), default="localhost")
    name = f"[{name}]" if ":" in name else name
    token = "" if access.token is None else f"?token={access.token}"
    return f"The lab's page: http://{name}:{port}/{token}  (read-only; Ctrl-C ends it)"
