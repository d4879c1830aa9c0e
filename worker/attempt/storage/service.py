"""A process for a node's calls of the artifact store: it reads orders on stdin, one JSON object per line, one after the
other, and writes answers and progress on stdout. It ends with its stdin.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from loractl.common.artifacts import ArtifactStore, Binding, Manifest, StoredFile
from loractl.common.errors import ArtifactError, NotStorable, ResultTaken, ServiceUnreachable, WrongStore
from loractl.common.settings import load_settings


def carry_out(store: ArtifactStore, name: str, arguments: list[Any]) -> Any:
    """Do what the node asks; the answer is JSON. Raises what the store raises."""
    return _CALLS[name](store, *arguments)


def manifest_of(answer: dict[str, Any]) -> Manifest:
    """The manifest that put_result wrote, or of what pull copied."""
    return {name: StoredFile(**file) for name, file in answer.items()}


def as_answer(error: Exception) -> dict[str, Any]:
    """An error for the pipe."""
    if isinstance(error, WrongStore):
        return {"kind": "wrong store", "facts": [error.facts[1], error.facts[3]]}
    if isinstance(error, ServiceUnreachable):
        return {"kind": "unreachable", "facts": list(error.facts)}
    if isinstance(error, ArtifactError):
        own = "taken" if isinstance(error, ResultTaken) else "not storable" if isinstance(error, NotStorable) else None
        return {"kind": own or "artifact", "facts": [error.sentence, error.hint]}
    if isinstance(error, OSError):
        named = error.filename and str(error.filename)
        return {"kind": "os", "facts": [error.errno, error.strerror or str(error), named]}
    return {"kind": "other", "facts": [repr(error)]}


def as_error(answer: dict[str, Any]) -> Exception:
    """The error in an answer."""
    kinds: dict[str, Callable[..., Exception]] = {
        "unreachable": ServiceUnreachable,
        "wrong store": WrongStore,
        "artifact": ArtifactError,
        "taken": ResultTaken,
        "not storable": NotStorable,
        "os": OSError,
    }
    return kinds.get(answer["kind"], RuntimeError)(*answer["facts"])


def _as_json(manifest: Mapping[str, StoredFile]) -> dict[str, Any]:
    return {name: vars(file) for name, file in manifest.items()}


_CALLS: dict[str, Callable[..., Any]] = {
    "check": ArtifactStore.check,
    "fetch_dataset": lambda store, uri, sha256, folder: str(store.fetch_dataset(uri, sha256, Path(folder))),
    "pull": lambda store, stored, target, part: _as_json(store.pull(Binding(**stored), part, Path(target))),
    "put_result": lambda store, folder, prefix: _as_json(store.put_result(Path(folder), prefix)),
    "remove_checkpoint": ArtifactStore.remove_checkpoint,
    "remove_checkpoints": ArtifactStore.remove_checkpoints,
}


TELL_S = 1.0
"""Seconds between two lines that say the same."""


class _Teller:
    """Reports progress; a moved block is a sign of life."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._lock = threading.Lock()  # S3's client reports from its own thread
        self._said = ("", 0.0)

    def doing(self, what: str) -> None:
        now = time.monotonic()
        if what != self._said[0] or now - self._said[1] >= TELL_S:
            self._said = what, now
            self.write({"doing": what})

    def write(self, answer: dict[str, Any]) -> None:
        with self._lock:
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


def main() -> None:
    """Serve the orders until stdin ends."""
    import fsspec  # noqa: F401  any store's calls need it: now, not when one is waited for; the node needs it never

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), name="orders", daemon=True).start()
    teller, stores, keys = _Teller(answers), dict[tuple[str, str | None], ArtifactStore](), load_settings().s3
    while True:
        order = json.loads(orders.get())
        try:
            if (named := (order["url"], order["mark"])) not in stores:
                stores[named] = ArtifactStore(
                    named[0], doing=teller.doing, keys=keys, mark=named[1], is_own=order["is_own"]
                )
            teller.write({"value": carry_out(stores[named], order["call"], order["arguments"])})
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001  told to the node, which raises it
            if (answer := as_answer(error))["kind"] == "other":
                traceback.print_exc()
            teller.write({"error": answer})


def _read(orders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)  # the node is gone; the main thread may hang in a call
