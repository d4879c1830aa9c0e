"""loractl serve: a base and its adapters behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import ipaddress
import os
from typing import Any

import click

from loractl.common.errors import LoractlError, UsageError

from .terminal import GPU, IN_4BIT, warn

KEY_VARIABLE = "LORACTL_API_KEY"


@click.command()
@click.option("--base", "base", metavar="MODEL", help="Hub id or folder of the base; else that of the first adapter.")
@click.option(
    "--adapters", metavar="LIST", help="NAME=ADAPTER,... or ADAPTER,...; else all stored adapters of the base."
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0: any free one."
)
@click.option(
    "--max-batch", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Answers at a time."
)
@click.option(
    "--adapter-memory", default="2GiB", show_default=True, metavar="SIZE", help="The most memory for loaded adapters."
)
@click.option(
    "--cache-memory", metavar="SIZE", help="The most memory for keys and values; else set by the free memory."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    metavar="T",
    help="For requests that don't set one.",
)
@IN_4BIT
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Number format; auto as in training.",
)
@GPU
def serve(**options: Any) -> None:
    """Serve a base and its adapters over an OpenAI-compatible API.

    A request's model names the adapter: a name of --adapters, or an adapter as loractl adapters lists it. The base
    itself is served as base. Requests for different adapters share one batch. If LORACTL_API_KEY is set, requests need
    this key. It is required if --host lets other machines in.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    host, port, temperature = (options.pop(name) for name in ("host", "port", "temperature"))
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LoractlError("loractl serve needs fastapi and uvicorn", "pip install 'loractl[serve]'") from error
    _check_exposure(host, key)
    from loractl.common.listener import check_port
    from loractl.common.settings import load_settings
    from loractl.common.units import size_of

    for name, option in (("adapter_memory", "--adapter-memory"), ("cache_memory", "--cache-memory")):
        options[name] = None if options[name] is None else size_of(option, options[name])

    check_port(host, port)
    from loractl.worker.serving.http.application import make_app
    from loractl.worker.serving.http.server import ServeOptions, listen, load_served
    from loractl.worker.serving.library import Library

    library = Library(load_settings(), warn)
    engine, names = load_served(library, ServeOptions(**options), _tell, warn)
    listen(make_app(engine, names, library, key=key, temperature=temperature), host, port, _tell)


def _check_exposure(host: str, key: str | None) -> None:
    """Raises UsageError if other machines could use the API without a key."""
    if host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UsageError(
            f"--host {host!r} is not an address", "like 127.0.0.1, or 0.0.0.0 for all of this machine"
        ) from None
    if not loopback and key is None:
        raise UsageError(
            f"--host {host} lets others on the network use this machine, and no key is set",
            f"set {KEY_VARIABLE}, or leave --host at 127.0.0.1",
        )


def _tell(text: str) -> None:
    click.echo(text, err=True)
