"""Starts the server: loads the base with its adapters, and lets uvicorn listen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from loractl.common.errors import UsageError
from loractl.common.listener import KEEP_ALIVE_S, Connection, Listener
from loractl.worker.protocol.trust import check_base
from loractl.worker.serving.adapter_pool import BaseChoice, open_pool, warn_of_arithmetic
from loractl.worker.serving.card import Footprint, take_card
from loractl.worker.serving.decoding.decoder import Decoder
from loractl.worker.serving.library import Library, Listed, same_base, usual_arithmetic

from .application import Names


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is loaded, and how. Memory in bytes."""

    base: str | None
    adapters: str | None
    max_batch: int
    adapter_memory: int
    cache_memory: int | None  # None: from the free memory
    load_in_4bit: bool | None  # None: as the adapters were trained
    dtype: str
    gpu: str | None


def load_served(
    library: Library, options: ServeOptions, tell: Callable[[str], None], warn: Callable[[str], None]
) -> tuple[Decoder, Names]:
    """Check every name before loading the base, which takes long. Raises LoractlError."""
    given = _given(options.adapters, library)
    model, revision, trusted = _base_of(options.base, given, library)
    names = Names(given, library, model, revision)
    served = list(names.all().values())
    usual = usual_arithmetic(served, in_4bit=options.load_in_4bit, dtype=options.dtype)
    footprint = Footprint.of((model, revision), usual, options.adapter_memory, options.cache_memory)
    device = take_card(library.settings, library.store, options.gpu, footprint)
    base = BaseChoice.of((model, revision), usual, device, dtype=options.dtype, run_code=trusted)
    pool = open_pool(base, library, list((given or {}).values()), tell, warn, options.adapter_memory)
    if given is None:
        warn_of_arithmetic(pool, served, warn)
    engine = Decoder(pool, rows=options.max_batch, cache_bytes=options.cache_memory)
    shown = ", ".join(sorted(names.all())) or "none is stored yet"
    tell(f"Models: base; adapters: {shown}.")
    return engine, names


def listen(app: Any, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        Listener(configure(app, host, port), lambda at: tell(f"Serving at http://{at}/v1; Ctrl-C ends it.")).run()


def configure(app: Any, host: str, port: int) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
        http=Connection,
        ws="none",
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
    """(base, revision, whether its own code may run). Raises UsageError if adapters are for another base."""
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
