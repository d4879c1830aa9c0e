"""A process for a node's calls of the artifact store: it reads orders on stdin, one JSON object per line, one after the
other, and writes answers and progress on stdout. It ends with its stdin."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from typing import IO, Any

import fsspec  # noqa: F401  any store's calls need it: not first when one is waited for

from loractl.common.artifacts import ArtifactStore
from loractl.common.settings import load_settings

from .calls import as_answer, carry_out

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
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), name="orders", daemon=True).start()
    teller, stores, keys = _Teller(answers), dict[str, ArtifactStore](), load_settings().s3
    while True:
        order = json.loads(orders.get())
        try:
            if (url := order["url"]) not in stores:
                stores[url] = ArtifactStore(url, doing=teller.doing, keys=keys)
            teller.write({"value": carry_out(stores[url], order["call"], order["arguments"])})
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
