"""loractl web: the lab as a page, and its numbers for Prometheus."""

from __future__ import annotations

import click

from loractl.common.errors import LoractlError


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

    from .access import access_to
    from .pages.shelf import ReportShelf
    from .server import listen
    from .site import make_site

    settings = load_settings()
    access = access_to(host, settings.home, names, always=always)
    store = Store(connect_to_read(settings))
    shelf = ReportShelf(store, lambda: open_to_read(settings, store))
    listen(make_site(store, shelf, access), host, port, access, lambda text: click.echo(text, err=True))


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
