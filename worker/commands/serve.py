"""loractl serve: a base and its adapters behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import LoractlError, UsageError

if TYPE_CHECKING:
    from loractl.worker.serving.decoding import Engine
    from loractl.worker.serving.http import Names
    from loractl.worker.serving.library import Library, Listed

KEY_VARIABLE = "LORACTL_API_KEY"


@click.command()
@click.option("--base", "base", metavar="MODEL", help="Hub id or folder of the base; else that of the first adapter.")
@click.option(
    "--adapters", metavar="LIST", help="NAME=ADAPTER,... or ADAPTER,...; else all that are stored for the base."
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0: any free one."
)
@click.option(
    "--max-batch", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Answers at a time."
)
@click.option(
    "--adapter-memory", default="2GiB", show_default=True, metavar="SIZE", help="What loaded adapters may take."
)
@click.option("--cache-memory", metavar="SIZE", help="What keys and values may take; else by what is free.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    metavar="T",
    help="For requests that name none.",
)
@click.option("--load-in-4bit", is_flag=True, help="The base in NF4, as QLoRA trains it.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Number format; auto as in training.",
)
@click.option("--gpu", metavar="CARD", help="Use this card, by index or UUID; else the first, or the CPU.")
def serve(**options: Any) -> None:
    """Serve a base and its adapters over an OpenAI-compatible API.

    A request's model names the adapter: a name of --adapters, or an adapter as loractl adapters lists it. The base
    itself is served as base. Requests for different adapters share one batch. Set LORACTL_API_KEY to ask for a key;
    beyond this machine's own address one is required.
    """
    _require_fastapi()
    import uvicorn

    from loractl.common.settings import load_settings
    from loractl.worker.serving.http import make_app
    from loractl.worker.serving.library import Library

    key = os.environ.get(KEY_VARIABLE) or None
    _check_exposure(options["host"], key)
    library = Library(load_settings())
    engine, names = _load(library, Options(**{k: options[k] for k in Options.__dataclass_fields__}))
    config = uvicorn.Config(
        make_app(engine, names, library, key=key, temperature=options["temperature"]),
        host=options["host"],
        port=options["port"],
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    _Server(config).run()


def _require_fastapi() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LoractlError("loractl serve needs fastapi and uvicorn", "pip install 'loractl[serve]'") from error


def _check_exposure(host: str, key: str | None) -> None:
    """Without a key the API is for this machine alone. Raises UsageError."""
    if host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UsageError(
            f"--host {host!r} is no address", "like 127.0.0.1, or 0.0.0.0 for all of this machine"
        ) from None
    if not loopback and key is None:
        raise UsageError(
            f"--host {host} lets others on the network use this machine, and no key is set",
            f"set {KEY_VARIABLE}, or leave --host at 127.0.0.1",
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is loaded, and how."""

    base: str | None
    adapters: str | None
    max_batch: int
    adapter_memory: str
    cache_memory: str | None
    load_in_4bit: bool
    dtype: str
    gpu: str | None


def _load(library: Library, options: Options) -> tuple[Engine, Names]:
    """Check every name before the base is loaded, for that takes long."""
    from loractl.common.job.method import Method
    from loractl.common.units import parse_size
    from loractl.worker.serving.adapter_pool import Base, open_resident
    from loractl.worker.serving.decoding import Engine, Limits
    from loractl.worker.serving.http import Names

    from .chat import take_device, warn_of_other_base

    sizes = {}
    for name in ("adapter_memory", "cache_memory"):
        text = getattr(options, name)
        try:
            sizes[name] = None if text is None else parse_size(text)
        except ValueError as error:
            raise UsageError(f"--{name.replace('_', '-')}: {text!r} {error}") from None
    given = _given(options.adapters, library)
    model, revision, trusted = _base_of(options.base, given, library)
    base = Base(
        model=model,
        revision=revision,
        method=Method.QLORA if options.load_in_4bit else Method.LORA,
        device=take_device(library, options.gpu),
        dtype=options.dtype,
        run_code=trusted,
    )
    resident = open_resident(base, sizes["adapter_memory"], tell=lambda text: click.echo(text, err=True))
    warn_of_other_base(library, list((given or {}).values()))
    engine = Engine(resident, Limits(rows=options.max_batch, cache_bytes=sizes["cache_memory"]))
    names = Names(given, library, model, revision)
    shown = ", ".join(sorted(names.all())) or "none is stored yet"
    click.echo(f"Models: base; adapters: {shown}.", err=True)
    return engine, names


def _given(text: str | None, library: Library) -> dict[str, Listed] | None:
    """--adapters a=12,b=support:prod or 12,support. Raises UsageError, AdapterNotFound."""
    if text is None:
        return None
    found: dict[str, Listed] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, equals, reference = part.partition("=")
        if name == "base" or name in found:
            raise UsageError(f"--adapters: the name {name} is taken", "give each adapter a name of its own")
        found[name] = library.find(reference if equals else name)
    if not found:
        raise UsageError("--adapters names none", "like --adapters support=12,notebook=notebook:prod")
    return found


def _base_of(model: str | None, given: Mapping[str, Listed] | None, library: Library) -> tuple[str, str | None, bool]:
    """(base, revision, whether its own code may run). Raises UsageError where adapters are for another base."""
    from pathlib import Path

    from loractl.worker.protocol.trust import check_base
    from loractl.worker.serving.library import same_base

    name, _, wanted = (model or "").partition("@")
    found = str(Path(name).absolute()) if Path(name).exists() else name
    if given:
        first = next(iter(given.values()))
        base, _ = same_base(list(given.values()))
        revision = library.revision(first)
        if model is not None and (found != base or wanted not in ("", revision, first.spec.revision)):
            raise UsageError(f"the adapters are for {base}, not for {model}", "leave --base out")
        return base, revision, library.may_run_code(first)
    if model is None:
        raise UsageError("there is nothing to serve", "name --adapters or a --base")
    check_base(found, library.settings.model_roots)
    return found, wanted or None, f"{found}@{wanted}" in library.settings.trusted_code


class _Server:
    """uvicorn, which says where it listens once it does."""

    def __init__(self, config: Any) -> None:
        import uvicorn

        class Telling(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                for server in self.servers:
                    for socket in server.sockets:
                        host, port = socket.getsockname()[:2]
                        shown = f"[{host}]" if ":" in host else host
                        click.echo(f"Serving at http://{shown}:{port}/v1; Ctrl-C ends it.", err=True)

        self._server = Telling(config)

    def run(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            self._server.run()
