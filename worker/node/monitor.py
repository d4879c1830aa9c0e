"""The monitor of a node: a round of reports and looks, so that no job depends on a message alone."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

from loractl.common.errors import ServiceUnreachable
from loractl.common.placement.hosts import open_bases
from loractl.common.placement.lines import VRAM_CLASSES, served_classes
from loractl.common.queue.hints import HintQueues, card_queue, queue_name
from loractl.common.settings import pace_of
from loractl.common.store.database import REFUSALS, absence, outage, told_by
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.node.health.leftovers import end_strays

from .device_row import DeviceRow
from .health.stuck import StuckSupervisors
from .hosts import Hosts
from .slots import Slots

log = logging.getLogger("loractl.worker")

SEE_S = 5.0
"""How often a node's row is written; with a short lease this, like the next two, is shorter too."""

ROUND_S = 5.0
"""How often a node looks for waiting rows and expired leases by itself: messages are hints and may be lost."""

FLEET_ROUND_S = 3.5
"""The least time between two rounds for the fleet, which one node at a time makes: each node's own round may be one."""

SETTLE_S = 15.0
"""Seconds after an outage of the database in which living supervisors beat, before their attempts may be ended."""

FIRST_ROUND_S = 2.0
"""On a box of several cards the rule sees all of them by then; before, the first node up would take every job."""

CALM_S = 0.2
"""The least time between two looks, however many messages call for one."""

STOP_S = 5.0
"""A stopping node waits so long for its monitor."""

ASIDE_S = 60.0
"""How often a node whose turn it is looks for rows that can't be read; until then they fit nowhere. As often each node
looks for those with an older version's plan."""

TRIES = 5
"""After so many failures in a row the monitor ends its node, and the worker starts it again."""


class Monitor:
    """A thread beside the slots that goes round. What fails again and again ends the node."""

    def __init__(self, place: Workplace, row: DeviceRow, hosts: Hosts | None = None, *, devices: int = 1) -> None:
        self._place = place
        self._row = row
        self._hosts = hosts
        self._queues = HintQueues(place.settings)
        self._stuck = StuckSupervisors(place)
        self._pace = pace_of(place.settings.lease_s)
        self._first_round_s = FIRST_ROUND_S if devices > 1 else 0.0
        self._next_aside = 0.0  # when this node next looks for rows that can't be read
        self._looked_at: int | None = None  # the waiting job that it looked at last
        self._next_plans = 0.0  # and for those with an older version's plan
        self._failures: dict[str, int] = {}  # in a row, by what failed
        self._serving: set[int] = set(VRAM_CLASSES)  # classes that fit into what is free
        self._joinable = False  # a trainer here may be joined, by a job of any class: its base is here already
        self._consumed: set[int] = set(VRAM_CLASSES)  # those whose queues Celery consumes
        self._consumer: Any = None  # Celery's; None when it consumes nothing (any more)
        self._called = threading.Event()  # something has changed: do not wait for the next look
        self._stopped = threading.Event()
        self._pass_on = False  # a message came that no slot of this node could take
        self._thread: threading.Thread | None = None

    def start(self, slots: Slots) -> None:
        """Begin the rounds. They read the rows even while the queue is away."""
        self._thread = self._place.clock.start(lambda: self._run(slots), "monitor")

    def look_soon(self) -> None:
        """What the device can take has changed."""
        self._called.set()

    def pass_on(self) -> None:
        """A message came while no slot was idle: wake the cards that the rule gives the waiting jobs to."""
        self._pass_on = True
        self._called.set()

    def follow(self, consumer: Any) -> None:
        """Let Celery consume what fits from now on; with None nothing, since it is stopping."""
        self._consumer = consumer

    def stop(self) -> None:
        self._stopped.set()
        self._called.set()
        if self._thread is not None:
            self._place.clock.join(self._thread, STOP_S)  # a driver that hangs must not keep a node from ending

    def report(self) -> None:
        """Write the device's row, and consume the classes that fit into what is free now."""
        card = self._row.write(draining=self._place.drain.asked is not None)
        self._serving = set(served_classes(card.free)) if card.open and card.slots else set()
        if self._hosts is not None:
            self._joinable = bool(open_bases(card))
            self._hosts.trim(card)
        if (consumer := self._consumer) is not None:
            consumer.call_soon(self._consume, consumer)

    def _consume(self, consumer: Any) -> None:
        """In Celery's thread: what piled up there meanwhile is one change."""
        wanted = self._serving
        for size in wanted - self._consumed:
            consumer.add_task_queue(queue_name(size))
        for size in self._consumed - wanted:
            consumer.cancel_task_queue(queue_name(size))
        self._consumed = wanted

    def _run(self, slots: Slots) -> None:
        clock = self._place.clock
        looked, next_look, next_round = 0.0, 0.0, clock.now() + self._first_round_s
        while not self._stopped.is_set():
            now = clock.now()
            self._try("the check of the supervisors", lambda: self._stuck.end(slots.attempts))
            if now >= next_look or (self._called.is_set() and now >= looked + CALM_S):
                self._called.clear()
                looked, next_look = now, now + SEE_S * self._pace
                self._try("the look", lambda: self._look(slots))
            if now >= next_round:
                next_round = now + ROUND_S * self._pace * random.uniform(0.8, 1.2)  # noqa: S311  spreads nodes, guards nothing
                self._try("the round", lambda: self._go_round(slots))
                self._try("the fleet's round", self._tend_fleet, vital=False)
                self._try("planning anew", self._plan_anew, vital=False)
                self._try("the queue", self._trim_queues)
            if clock.wait(self._called, max(0.05, min(next_look, next_round, now + 1.0) - clock.now())):
                clock.wait(self._stopped, max(0.0, looked + CALM_S - clock.now()))

    def _try(self, what: str, work: Callable[[], None], *, vital: bool = True) -> None:
        """Do a part of the round. A vital one that fails again and again, with its services there, ends the node.

        What the database refuses ends nothing: a new node would be refused too, and what runs here would stop for it.
        """
        try:
            work()
        except ServiceUnreachable as error:
            log.warning("%s", error.sentence)
        except REFUSALS as error:
            if (why := outage(error)) is not None:
                log.warning("%s", absence(why))
            else:
                log.exception("%s failed: the database refuses it: %s", what, told_by(error))
        except Exception:
            # if the monitor ended silently, the node would look offline and never come back
            self._failures[what] = self._failures.get(what, 0) + 1
            log.exception("%s failed, %s of %s times", what, self._failures[what], TRIES)
            if vital and self._failures[what] >= TRIES:
                self._place.drain.end_alone()
                os.kill(os.getpid(), signal.SIGTERM)
            return
        self._failures[what] = 0

    def _look(self, slots: Slots) -> None:
        self.report()
        self._obey_drain(slots)
        if self._pass_on:
            self._pass_on = False
            self._wake_others()

    def _obey_drain(self, slots: Slots) -> None:
        """A person's order to drain at once gives running jobs back after a checkpoint; its end lets new ones in.

        A job on several cards is given back for each of them.
        """
        place, orders = self._place, self._place.store.cards.drains()
        order = orders.get(place.node) or orders.get(place.settings.host)
        at_once = order is not None and order.now
        if order is not None and at_once and not place.drain.ordered:
            log.warning("drained by %s: %s", order.user, order.reason)
        for attempt in slots.attempts.values():
            cards = [share.node for share in attempt.claim.shares] or [place.node]
            asked = ((card, orders.get(card) or orders.get(place.settings.host)) for card in cards)
            wanted = [f"{card} is drained by {o.user}: {o.reason}" for card, o in asked if o is not None and o.now]
            attempt.wishes.card_drained = wanted[0] if wanted else None
        place.drain.order(at_once)  # its supervisors look from here on, and find whose order it is
        if self._hosts is not None:
            self._hosts.closed = order is not None

    def _wake_others(self) -> None:
        """Pass on a message that no slot here could take, by the claim's own rule."""
        given = {d.placed.node for d in self._place.store.cards.fleet().decisions if d.placed is not None}
        self._place.wake_others(given - {self._place.node})

    def _go_round(self, slots: Slots) -> None:
        """Look for jobs with a lost message or one that came while nothing fitted."""
        end_strays(self._place)
        wanted = set(VRAM_CLASSES) if self._joinable else self._serving
        if self._place.drain.wish is None and self._place.store.jobs.waiting_classes(wanted):
            slots.wake()

    def _plan_anew(self) -> None:
        """Plan what waits since before an upgrade. Each node looks: it plans the jobs whose bases its box has."""
        if self._place.clock.now() < self._next_plans:
            return
        planned = self._place.store.jobs.plan_anew()
        for job_id in planned:
            log.info("job %s is planned again for this version's steps", job_id)
        if not planned:  # else there may be more
            self._next_plans = self._place.clock.now() + ASIDE_S * self._pace

    def _trim_queues(self) -> None:
        """Messages are hints, and a node looks by itself: nobody can keep it busy with more than it could need."""
        queues = (card_queue(self._place.node), *map(queue_name, VRAM_CLASSES))
        try:
            if thrown := self._queues.trim(queues):
                log.warning("%s excess messages were on the queue and are discarded", thrown)
        except ServiceUnreachable as error:
            log.debug("%s", error.sentence)  # Celery says so, too

    def _tend_fleet(self) -> None:
        """What concerns all jobs, unless another node sees to it: ending lost attempts, giving way, patience."""
        store, pace = self._place.store, self._pace
        turn = store.cards.take_turn(self._place.node, FLEET_ROUND_S * pace, SETTLE_S * pace)
        if turn is None:
            return
        for job_id, _ in () if turn.settling else store.attempts.reap():
            log.warning("job %s: its worker was lost, it waits again", job_id)
        if self._place.clock.now() >= self._next_aside:
            aside = store.jobs.set_aside_unreadable(self._looked_at)
            self._looked_at = aside.after
            if aside.after is None:  # else more wait behind, for the next turn
                self._next_aside = self._place.clock.now() + ASIDE_S * pace
            for job_id in aside.jobs:
                log.warning("job %s: its row can't be read, it is set aside", job_id)
        for job_id in store.cards.preempt():
            log.info("job %s gives way to one of higher priority", job_id)
        for job_id, _ in store.jobs.end_patience():
            log.info("job %s has waited long enough for LoRA", job_id)
