"""A server of `loractl serve` in the test's own process, on a port of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.worker.serving.adapter_pool import AdapterPool, BaseChoice
from loractl.worker.serving.decoding.decoder import Decoder
from loractl.worker.serving.http import server
from loractl.worker.serving.http.application import Names, make_app
from loractl.worker.serving.library import Library


def engine_of(model: Path) -> Decoder:
    """The base alone, in fp32."""
    return Decoder(AdapterPool(BaseChoice(model=str(model), revision=None, dtype="float32")))


@contextlib.contextmanager
def served(engine: Decoder, model: Path, home: Path, key: str | None = None) -> Iterator[int]:
    """The port of a server that answers."""
    settings = load_settings({"LORACTL_HOME": str(home)})
    connect(settings).dispose()
    library = Library(settings)
    app = make_app(engine, Names({}, library, str(model), None), library, key=key)
    running = uvicorn.Server(server.configure(app, "127.0.0.1", 0))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield int(running.servers[0].sockets[0].getsockname()[1])
    running.should_exit = True
    thread.join()
