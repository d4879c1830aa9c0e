"""loractl web: the lab as a page, and its numbers for Prometheus."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import LoractlError, UsageError

if TYPE_CHECKING:
    from .guard import Access

AT_ONCE = 200
"""Requests answered at a time, beside connections that wait; further ones are asked to come later."""


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The address to listen on; 0.0.0.0: all."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8470, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--token", "always", is_flag=True, help="Ask for the token even on this machine's own address.")
@click.option(
    "--allow-host", "names", multiple=True, metavar="NAME", help="A name that browsers may use for it; repeatable."
)
def web(host: str, port: int, always: bool, names: tuple[str, ...]) -> None:
    """Show the lab in a browser, and its metrics to Prometheus.

    It only reads: no address of it changes anything. On another address than this machine's own it asks for a token,
    which it draws once and prints with the address. /metrics has the lab's numbers for Prometheus.
    """
    _require_web()
    from loractl.common.lab_store import open_to_read
    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect_to_read
    from loractl.common.store.store import Store

    from .guard import access_to
    from .pages.shelf import ReportShelf
    from .site import make_site

    settings = load_settings()
    access = access_to(host, settings.home, names, always=always)
    store = Store(connect_to_read(settings))
    shelf = ReportShelf(store, lambda: open_to_read(settings, store))
    _listen(make_site(store, shelf, access), host, port, access)


def _require_web() -> None:
    try:
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LoractlError(
            "loractl web needs starlette, jinja2, uvicorn and prometheus_client", "pip install 'loractl[web]'"
        ) from error


def _listen(app: Any, host: str, port: int, access: Access) -> None:
    """Serve until Ctrl-C or SIGTERM, with the address on stderr. Raises UsageError if nothing can listen there."""
    import uvicorn

    from loractl.common.listener import KEEP_ALIVE_S, WAITING, Connection, Listener, check_port

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
    server = Listener(config, lambda at: click.echo(_address(host, at.rpartition(":")[2], access), err=True))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    except SystemExit as error:  # the port was taken in between; uvicorn has said why
        raise UsageError(f"can't listen on {host}:{port}", "choose another --host or --port") from error


def _address(host: str, port: str, access: Access) -> str:
    from .guard import is_loopback

    name = "localhost" if is_loopback(host) else host
    if host in ("0.0.0.0", "::"):  # noqa: S104  all addresses: a person opens one of them
        name = min(access.names - {"localhost"}, key=lambda name: (len(name), name), default="localhost")
    name = f"[{name}]" if ":" in name else name
    token = "" if access.token is None else f"?token={access.token}"
    return f"The lab's page: http://{name}:{port}/{token}  (read-only; Ctrl-C ends it)"
