"""The slots of a device: threads, one for each job that may run on it, that sleep until they are woken. Each claims
what the placement rule gives its card, and leaves the rest to others.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import threading
from collections.abc import Callable, Collection

from loractl.common.placement.hosts import PACK_MEMBERS
from loractl.common.store.database import absence, outage
from loractl.common.store.records import Claim, Left
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import OwnTrainer, Watch
from loractl.worker.protocol.idle_trainer import by_mark, host_name

from .health.leftovers import close_if_left
from .health.self_test import NOT_TESTED

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


log = logging.getLogger("loractl.worker")

CALM_S = 0.05
"""Seconds that a slot rests after a claim that found nothing: who fills the queue must not fill the database, too."""


class Slots:
    """Claims what the rule gives this device, and supervises it.

    `changed` is called when a job came or went, `overheard` when a message came for which no slot was idle.
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
        self._looked = 0  # how often they had been woken when one found nothing
        watch.own = self._own_trainers
        self._woken = threading.Condition()
        self._calls = 0  # how often the slots were woken
        self._idle = 0  # slots that sleep
        self._closing = False
        self._attempts: dict[int, SupervisedAttempt] = {}  # slot -> what it supervises
        self._max_jobs = max_jobs
        self._count = slots_of(max_jobs, hosts=place.hosts is not None)
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
        """What supervisors know of their trainers: numbers, and the memory that each says it holds."""
        return [
            OwnTrainer(
                job=_name_of(attempt),
                pids=attempt.run.pids,
                held=None if attempt.run.trainer is None else attempt.heard.peaks.held,
            )
            for attempt in self.attempts.values()
        ]

    def wake(self) -> None:
        """Let idle slots look for a job; returns at once. Where the card has as many as it may have, others are told: a
        slot that is idle then can only let a job join another."""
        with self._woken:
            self._calls += 1
            self._woken.notify_all()
            idle = self._idle and len(self._attempts) < self._max_jobs
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
                # if a slot ended silently, the node would look well and take no jobs
                if (why := outage(error)) is None:
                    log.exception("slot %s failed; it looks again when it is woken", slot)
                else:
                    log.warning("%s", absence(why))
            finally:
                if self._attempts.pop(slot, None) is not None:
                    self._changed()

    def _sleep(self, calls: int) -> int:
        """Wait for another call than those; returns how many there were."""
        with self._woken:
            self._idle += 1
            self._place.clock.wait_for(self._woken, lambda: self._closing, CALM_S)
            self._place.clock.wait_for(self._woken, lambda: self._closing or self._calls != calls)
            self._idle -= 1
            return self._calls

    def _take_jobs(self, slot: int, calls: int) -> None:
        """Claim and run, until nothing that waits is for this device. `calls`: those that woke this slot."""
        anew = False
        while not self._closing and (claim := self._claim(calls, anew=anew)) is not None:
            attempt = self._attempts[slot] = begin(claim, self._place.settings.work_dir, self._place.clock)
            self._changed()
            if self._count > 1:
                self.wake()  # another slot may have room for the next job
            elif self._calls != calls:
                self._overheard()  # it came while this slot claimed
            supervise(self._place, attempt)
            close_if_left(self._place, self._watch, claim, attempt.run.host)
            del self._attempts[slot]
            self._changed()
            calls, anew = self._calls, True

    def _claim(self, calls: int, *, anew: bool) -> Claim | None:
        """Claim, unless another slot has found nothing since this one was woken. `anew`: a job has just ended."""
        with self._place.clock.holding(self._claiming):
            if calls <= self._looked and not anew:
                return None
            began = self._calls
            claim = self._claimer.claim()
            if claim is None:
                self._looked = began
            return claim


def slots_of(max_jobs: int, *, hosts: bool) -> int:
    """The slots of a device that may have so many trainers: where hosts are kept, each may have several jobs."""
    return max_jobs * (PACK_MEMBERS if hosts else 1)


def _name_of(attempt: SupervisedAttempt) -> str:
    """What stands for a job in its trainer's environment."""
    host = None if attempt.run.trainer is None else attempt.run.trainer.host
    return str(attempt.claim.job_id) if host is None else host_name(host)
