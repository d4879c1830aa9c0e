"""What one training has in a process that goes on with others: its tensors, its threads, its files."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loractl.worker.base.kept.remains import JOIN_S, open_files
from loractl.worker.protocol.messages import Start

LOOK_S = 0.02
"""Seconds between two looks at tensors: a step of the others that began with the training may hold them to its end."""


@dataclass(kw_only=True)
class Traces:
    """Note what a training makes; after its end, see what of that is still here.

    Tables that libraries make while others train can be told apart only when all have gone (kept/remains.py).
    """

    order: Start
    _tensors: list[weakref.ref[Any]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def note(self, tensors: Iterable[Any]) -> None:
        """These are the training's own."""
        self._tensors += map(weakref.ref, tensors)

    def note_thread(self, thread: threading.Thread) -> None:
        self._threads.append(thread)

    def left(self) -> str | None:
        """What is still here, in words."""
        for thread in self._threads:
            thread.join(timeout=JOIN_S)
            if thread.is_alive():
                return f"the thread {thread.name} still runs"
        gc.collect()  # a mapped file is open for as long as a cycle of an error holds it
        own = tuple(str(Path(folder).parent) + "/" for folder in (self.order.output_dir, self.order.checkpoint_dir))
        if files := sorted(name for name in open_files() if name.startswith(own)):
            return f"{files[0]} is still open"
        deadline = time.monotonic() + JOIN_S
        while (size := self._held()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return f"{size / 2**20:.1f} MiB of its tensors are still there" if size else None

    def _held(self) -> int:
        """Bytes of its tensors that live."""
        gc.collect()
        return sum(one.untyped_storage().nbytes() for ref in self._tensors if (one := ref()) is not None)
