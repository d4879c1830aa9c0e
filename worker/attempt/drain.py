"""The request that a node stop its jobs: after a checkpoint, or now."""

from __future__ import annotations

import threading
from typing import Literal

Wish = Literal["checkpoint", "now"]

STOP_SHARE = 2 / 3
"""Of a bounded stop, for the current step and its checkpoint. The rest is for its way into the artifact store."""


class Drain:
    """What was asked of this node. Any thread may ask, and all threads read it.

    The worker's request ends this process and is never withdrawn. A person's order ends with another order.
    """

    def __init__(self, grace_s: float | None = None) -> None:
        """`grace_s`: how long a stop may take; None: as long as it needs."""
        self.grace_s = grace_s
        self._lock = threading.RLock()  # a signal handler asks, in whatever the main thread does at that moment
        self._asked: Wish | None = None
        self._ordered = False
        self._alone = False

    def ask(self, how: Wish) -> None:
        """The worker stops. A late first Ctrl-C must not undo the second one's "now"."""
        with self._lock:
            if self._asked is None or how == "now":
                self._asked = how

    def end_alone(self) -> None:
        """The coming stop is only this node's: its worker starts another, and the nodes of other cards continue."""
        self._alone = True

    def order(self, holds: bool) -> None:
        """A person drains this device at once, or opens it for jobs again."""
        self._ordered = holds

    @property
    def asked(self) -> Wish | None:
        """What the worker wants, whatever people have ordered."""
        return self._asked

    @property
    def alone(self) -> bool:
        """Whether this node ends by itself, or its worker ends it, while other nodes continue."""
        return self._alone

    @property
    def ordered(self) -> bool:
        return self._ordered

    @property
    def wish(self) -> Wish | None:
        """What the attempts here must obey."""
        return self._asked or ("checkpoint" if self._ordered else None)
