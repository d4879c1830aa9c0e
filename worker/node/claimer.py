"""The claims of a node: what the placement rule gives its card, and what it leaves to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from loractl.common.store.records import Claim, Left
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch
from loractl.worker.protocol.spare import by_mark

HOLD_BACK_S = 10.0
"""Seconds for which a job is left to the card that the rule gives it to; after that the card counts as stuck."""

AGAIN_S = 0.05
"""After another node's claim was faster."""


class Claimer:
    """Claims for the slots of one device, one at a time: two at once would both count on the same bytes."""

    def __init__(self, place: Workplace, watch: Watch) -> None:
        self._place = place
        self._watch = watch
        self._claiming = threading.Lock()
        self._left: dict[str, float] = {}  # node -> since when a job is left to it

    def claim(self) -> Claim | None:
        """What the rule gives this card now. What it gives another card that does not take it, after a while."""
        others: Collection[str] = ()
        with self._claiming:
            claim = None
            while self._place.drain.wish is None:
                claim = self._try()
                if not isinstance(claim, Left):
                    self._left = {}
                    if claim is not None and self._place.hosts is not None:
                        self._place.hosts.let_go(claim.leaving)  # before another claim's trainer starts
                    break
                if others := claim.nodes:
                    break
                time.sleep(AGAIN_S)
        if isinstance(claim, Claim):
            return claim  # at once: nothing beats for it yet
        self._place.wake_others(others)  # outside the lock: the queue may be away
        return None

    def _try(self) -> Claim | Left | None:
        seen, now = self._watch.look(), time.monotonic()
        if seen.fault is not None:
            return None  # its row says so with the next look
        distrusted = frozenset(node for node, since in self._left.items() if now - since > HOLD_BACK_S)
        place = self._place
        can = {"joins": place.hosts is not None, "gangs": place.device.kind != "cpu"}
        claim = place.store.claim(place.node, seen.outside, by_mark(seen.used), distrusted, **can)
        if isinstance(claim, Left):
            self._left = {node: self._left.get(node, now) for node in claim.nodes}
        return claim
