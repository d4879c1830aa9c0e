"""A request that a node stops its jobs: after a checkpoint, or now."""

from __future__ import annotations

import threading
from typing import Literal

Wish = Literal["checkpoint", "now"]


class Drain:
    """What was asked of this node. Any thread may ask, and all of them look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wish: Wish | None = None

    def ask(self, how: Wish) -> None:
        """Ask for a stop. A first Ctrl-C that arrives late must not take back the second one's "now"."""
        with self._lock:
            if self._wish is None or how == "now":
                self._wish = how

    def clear(self) -> None:
        with self._lock:
            self._wish = None

    @property
    def wish(self) -> Wish | None:
        return self._wish
