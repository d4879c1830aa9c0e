"""The claims of a node: what the placement rule gives its card, and what it leaves to others."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Collection

from loractl.common.store.records import Claim, Left
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import Watch
from loractl.worker.node.health.self_test import NOT_TESTED
from loractl.worker.protocol.idle_trainer import by_mark

HOLD_BACK_S = 10.0
"""Seconds for which a job is left to the card that the rule gives it to; after that the card counts as stuck."""

SETTLE_S = 5.0
"""Seconds for which the first claim waits for the box's other cards, which start at the same time. Else the first of
them would take as many waiting jobs as may share it, and the others would be idle beside it."""

SETTLE_LOOK_S = 0.2  # another node's row tells nobody that it has come

AGAIN_S = 0.05
"""After another node's claim was faster."""


class Claimer:
    """Claims for the slots of one device, one at a time: two at once would both count on the same bytes."""

    def __init__(self, place: Workplace, watch: Watch, *, devices: int = 1) -> None:
        """`devices`: how many cards of the box are served, with this one."""
        self._place = place
        self._watch = watch
        self._claiming = threading.Lock()
        self._left: dict[str, float] = {}  # node -> since when a job is left to it
        self._others = devices - 1
        self._settled = devices < 2
        self._made = place.clock.now()
        self._began: float | None = None  # when the first claim was asked for
        self._since: dt.datetime | None = None  # of this node, by the database's time

    def claim(self) -> Claim | None:
        """What the rule gives this card now. What it gives another card that does not take it, after a while."""
        others: Collection[str] = ()
        with self._place.clock.holding(self._claiming):
            claim = None
            while self._place.drain.wish is None:
                if not self._has_settled():
                    self._place.clock.sleep(SETTLE_LOOK_S)
                    continue
                claim = self._try()
                if not isinstance(claim, Left):
                    self._left = {}
                    if claim is not None and self._place.hosts is not None:
                        self._place.hosts.let_go(claim.leaving)  # before another claim's trainer starts
                    break
                if others := claim.nodes:
                    break
                self._place.clock.sleep(AGAIN_S)
        if isinstance(claim, Claim):
            return claim  # at once: nothing beats for it yet
        self._place.wake_others(others)  # outside the lock: the queue may be away
        return None

    def _has_settled(self) -> bool:
        """Whether the box's other cards serve, too, or were waited for long enough. This one has to be ready itself.

        One serves where it was seen since this node began.
        """
        if self._settled or self._watch.fault is not None:
            return True
        place, now = self._place, self._place.clock.now()
        self._began = self._began or now
        self._since = self._since or place.store.now() - dt.timedelta(seconds=now - self._made)
        # a worker that was killed has left the rows of its cards, which say nothing of those that start now
        others = [row for row in place.store.cards.nodes(place.settings.host) if row.node != place.node]
        ready = sum(row.fault != NOT_TESTED and row.seen_at >= self._since for row in others)
        self._settled = ready >= self._others or now - self._began > SETTLE_S
        return self._settled

    def _try(self) -> Claim | Left | None:
        seen, now = self._watch.look(), self._place.clock.now()
        if seen.fault is not None:
            return None  # its row says so with the next look
        distrusted = frozenset(node for node, since in self._left.items() if now - since > HOLD_BACK_S)
        place = self._place
        can = {"joins": place.hosts is not None, "gangs": place.device.kind != "cpu"}
        claim = place.store.attempts.claim(place.node, seen.outside, by_mark(seen.used), distrusted, **can)
        if isinstance(claim, Left):
            self._left = {node: self._left.get(node, now) for node in claim.nodes}
        return claim
