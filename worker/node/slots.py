"""The slots of a device: one thread for each job that may run on it, asleep until it is woken. A slot claims only what
the placement rule gives its card.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import threading
from collections.abc import Callable

from loractl.common.errors import SchemaMismatch
from loractl.common.store.database import absence, outage
from loractl.common.store.records import Claim, Left
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import OwnTrainer, Watch

from .health.leftovers import close_if_left
from .health.self_test import NOT_TESTED

HOLD_BACK_S = 10.0
"""How long this card leaves a job to the card that the rule gives it to; after that, the other card counts as stuck."""

SETTLE_S = 5.0
"""Seconds for which the first claim waits for the box's other cards, which start at the same time. Otherwise the first
card would take as many waiting jobs as may share it, and leave the others idle."""

SETTLE_LOOK_S = 0.2  # polled: nothing announces another node's row

AGAIN_S = 0.05
"""How long a claim waits before it tries again, when another node's claim was faster."""


class Claimer:
    """Claims jobs for the slots of one device. They take turns: two claims at once would count on the same bytes."""

    def __init__(self, place: Workplace, watch: Watch, *, devices: int = 1) -> None:
        """`devices`: how many cards of the box are served, including this one."""
        self._place = place
        self._watch = watch
        self._left: dict[str, float] = {}  # node -> since when this card leaves a job to it
        self._others = devices - 1
        self._settled = devices < 2
        self._made = place.clock.now()
        self._began: float | None = None  # when a slot first asked for a claim
        self._since: dt.datetime | None = None  # when this node began, by the database's time

    def claim(self) -> Claim | None:
        """Claim what the rule gives this card now, or, after a while, what it gives a card that does not take it."""
        while self._place.drain.wish is None:
            if not self._has_settled():
                self._place.clock.sleep(SETTLE_LOOK_S)
                continue
            claim = self._try()
            if not isinstance(claim, Left):
                self._left = {}
                return claim
            if claim.nodes:
                self._place.wake_others(claim.nodes)
                break
            self._place.clock.sleep(AGAIN_S)
        return None

    def _has_settled(self) -> bool:
        """Whether the box's other cards serve too, or were waited for long enough. The wait starts when this card is
        ready itself.

        A card serves if its row was written after this node began.
        """
        if self._settled or self._watch.fault is not None:
            return True
        place, now = self._place, self._place.clock.now()
        self._began = self._began or now
        self._since = self._since or place.store.now() - dt.timedelta(seconds=now - self._made)
        # rows that a killed worker left behind say nothing about the nodes that start now
        others = [row for row in place.store.cards.nodes(place.settings.host) if row.node != place.node]
        ready = sum(row.fault != NOT_TESTED and row.seen_at >= self._since for row in others)
        self._settled = ready >= self._others or now - self._began > SETTLE_S
        return self._settled

    def _try(self) -> Claim | Left | None:
        seen, now = self._watch.look(), self._place.clock.now()
        if seen.fault is not None or self._place.artifacts.fault is not None:
            return None  # the next look writes the fault into its row
        distrusted = frozenset(node for node, since in self._left.items() if now - since > HOLD_BACK_S)
        place = self._place
        gangs = place.device.kind != "cpu"
        claim = place.store.attempts.claim(place.node, seen.outside, seen.used, distrusted, gangs=gangs)
        if isinstance(claim, Left):
            self._left = {node: self._left.get(node, now) for node in claim.nodes}
        return claim


log = logging.getLogger("loractl.worker")

CALM_S = 0.05
"""Seconds that a slot rests after a claim that found nothing: many messages must not become as many queries."""


class Slots:
    """Claims the jobs that the rule gives this device, and supervises them.

    Calls `changed` when a job comes or goes, and `overheard` when a message comes while no slot is idle.
    """

    def __init__(
        self,
        place: Workplace,
        watch: Watch,
        max_jobs: int,
        *,
        changed: Callable[[], None],
        overheard: Callable[[], None],
        devices: int = 1,
    ) -> None:
        self._place = place
        self._watch = watch
        self._changed = changed
        self._overheard = overheard
        self._claimer = Claimer(place, watch, devices=devices)
        self._claiming = threading.Lock()
        self._looked = 0  # the value of `_calls` at the last claim that found nothing
        watch.own = self._own_trainers
        self._woken = threading.Condition()
        self._calls = 0  # how often the slots were woken
        self._idle = 0  # slots that sleep
        self._closing = False
        self._attempts: dict[int, SupervisedAttempt] = {}  # slot -> what it supervises
        self._count = max_jobs
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for slot in range(self._count):
            serve = functools.partial(self._serve, slot)
            self._threads.append(self._place.clock.start(serve, f"slot {slot}", daemon=False))

    @property
    def attempts(self) -> dict[int, SupervisedAttempt]:
        """Slot -> what is supervised there at this moment."""
        return self._attempts.copy()

    def _own_trainers(self) -> list[OwnTrainer]:
        """What supervisors know of their trainers: their PIDs, and the memory that each trainer reports."""
        return [
            OwnTrainer(
                job=str(attempt.claim.job_id),
                pids=attempt.own.pids,
                held=None if attempt.own.trainer is None else attempt.heard.peaks.held,
            )
            for attempt in self.attempts.values()
        ]

    def wake(self) -> None:
        """Let idle slots look for a job; returns at once. Without an idle slot, wakes other cards."""
        with self._woken:
            self._calls += 1
            self._woken.notify_all()
            idle = self._idle
        if not idle or self._place.drain.wish is not None:
            self._overheard()

    def close(self) -> None:
        """Wait until every attempt has ended; no slot claims again."""
        with self._woken:
            self._closing = True
            self._woken.notify_all()
        for thread in self._threads:
            self._place.clock.join(thread)

    def _serve(self, slot: int) -> None:
        calls = 0
        while not self._closing:
            calls = self._sleep(calls)
            try:
                self._take_jobs(slot, calls)
            except Exception as error:
                # if a slot ended silently, the node would look healthy but take no jobs
                if isinstance(error, SchemaMismatch):
                    log.debug("%s", error.sentence)  # the monitor says so, and ends the node
                elif (why := outage(error)) is None:
                    log.exception("slot %s failed; it looks again when it is woken", slot)
                else:
                    log.warning("%s", absence(why))
            finally:
                if self._attempts.pop(slot, None) is not None:
                    self._changed()

    def _sleep(self, calls: int) -> int:
        """Wait until more calls have come than `calls`; returns the new count."""
        with self._woken:
            self._idle += 1
            self._place.clock.wait_for(self._woken, lambda: self._closing, CALM_S)
            self._place.clock.wait_for(self._woken, lambda: self._closing or self._calls != calls)
            self._idle -= 1
            return self._calls

    def _take_jobs(self, slot: int, calls: int) -> None:
        """Claim and run jobs until no waiting job is for this device. `calls`: the count that woke this slot."""
        after_job = False
        while not self._closing and (claim := self._claim(calls, after_job=after_job)) is not None:
            attempt = begin(claim, self._place.settings.work_dir, self._place.clock, lambda: len(self._attempts) - 1)
            self._attempts[slot] = attempt
            self._changed()
            if self._count > 1:
                self.wake()  # another slot may have room for the next job
            elif self._calls != calls:
                self._overheard()  # it came while this slot claimed
            supervise(self._place, attempt)
            close_if_left(self._place, claim, self._supervised)
            del self._attempts[slot]
            self._changed()
            calls, after_job = self._calls, True

    def _supervised(self) -> set[int]:
        """The jobs of attempts that have not ended."""
        return {one.claim.job_id for one in self.attempts.values() if not one.own.closed}

    def _claim(self, calls: int, *, after_job: bool) -> Claim | None:
        """Claim, unless another slot has found nothing since this one was woken. `after_job`: a job has just ended."""
        with self._place.clock.holding(self._claiming):
            if calls <= self._looked and not after_job:
                return None
            began = self._calls
            claim = self._claimer.claim()
            if claim is None:
                self._looked = began
            return claim
