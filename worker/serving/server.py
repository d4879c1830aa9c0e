"""The server's start: the base with its adapters is loaded, and uvicorn listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from loractl.common.errors import UsageError
from loractl.worker.protocol.trust import check_base

from .adapter_pool import BaseChoice, open_pool, warn_of_arithmetic
from .card import Footprint, take_card
from .decoding import Engine, Limits
from .http import Names
from .library import Library, Listed, same_base, usual_arithmetic

HEADERS_S = 10.0
"""Seconds in which the lines of a request must have arrived."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is loaded, and how. Memory in bytes."""

    base: str | None
    adapters: str | None
    max_batch: int
    adapter_memory: int
    cache_memory: int | None  # None: by what is free
    load_in_4bit: bool | None  # None: as the adapters were trained
    dtype: str
    gpu: str | None


def load_served(
    library: Library, options: ServeOptions, tell: Callable[[str], None], warn: Callable[[str], None]
) -> tuple[Engine, Names]:
    """Check every name before the base is loaded, for that takes long. Raises LoractlError."""
    given = _given(options.adapters, library)
    model, revision, trusted = _base_of(options.base, given, library)
    names = Names(given, library, model, revision)
    served = list(names.all().values())
    usual = usual_arithmetic(served, in_4bit=options.load_in_4bit, dtype=options.dtype)
    footprint = Footprint.of(model, revision, usual.method, usual.dtype, options.adapter_memory, options.cache_memory)
    device = take_card(library.settings, library.store, options.gpu, footprint)
    base = BaseChoice(
        model=model,
        revision=revision,
        method=usual.method,
        device=device,
        dtype=options.dtype if options.dtype != "auto" else usual.on(device).dtype,
        run_code=trusted,
    )
    pool = open_pool(base, library, list((given or {}).values()), tell, warn, options.adapter_memory)
    if given is None:
        warn_of_arithmetic(pool, served, warn)
    engine = Engine(pool, Limits(rows=options.max_batch, cache_bytes=options.cache_memory))
    shown = ", ".join(sorted(names.all())) or "none is stored yet"
    tell(f"Models: base; adapters: {shown}.")
    return engine, names


def listen(app: Any, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        _Server(configure(app, host, port), tell).run()


def configure(app: Any, host: str, port: int) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5, http=Connection, ws="none"
    )


def _given(text: str | None, library: Library) -> dict[str, Listed] | None:
    """--adapters a=12,b=support:prod or 12,support. Raises UsageError, AdapterNotFound."""
    if text is None:
        return None
    given: dict[str, Listed] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, equals, reference = part.partition("=")
        if name == "base" or name in given:
            raise UsageError(f"--adapters: the name {name} is taken", "give each adapter a name of its own")
        given[name] = library.find(reference if equals else name)
    if not given:
        raise UsageError("--adapters names none", "like --adapters support=12,notebook=notebook:prod")
    return given


def _base_of(model: str | None, given: Mapping[str, Listed] | None, library: Library) -> tuple[str, str | None, bool]:
    """(base, revision, whether its own code may run). Raises UsageError where adapters are for another base."""
    name, _, wanted = (model or "").partition("@")
    place = str(Path(name).absolute()) if Path(name).exists() else name
    if given:
        first = next(iter(given.values()))
        base, _ = same_base(list(given.values()))
        revision = library.revision(first)
        if model is not None and (place != base or wanted not in ("", revision, first.spec.revision)):
            raise UsageError(f"the adapters are for {base}, not for {model}", "leave --base out")
        return base, revision, library.may_run_code(first)
    if model is None:
        raise UsageError("there is nothing to serve", "name --adapters or a --base")
    check_base(place, library.settings.model_roots)
    return place, wanted or None, f"{place}@{wanted}" in library.settings.trusted_code


class Connection(H11Protocol):
    """A caller's connection, which ends when the lines of a request don't arrive in time.

    uvicorn itself waits for them forever: a few hundred callers who send a byte now and then would hold all of a
    process's connections. What still comes after an answer must be the next request.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADERS_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._late is None and self._idle:
            self._late = self.loop.call_later(HEADERS_S, self._give_up)
        super().data_received(data)
        if not self._idle:
            self._in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        """No request has come whole, or the last one is answered."""
        return self.cycle is None or self.cycle.response_complete

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._idle and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn, which says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[str], None]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                self._tell(f"Serving at http://{shown}:{port}/v1; Ctrl-C ends it.")
