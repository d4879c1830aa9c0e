"""The monitor of a node: it writes the device's row and looks for work periodically, so that no job depends on a
message alone."""

from __future__ import annotations

import datetime as dt
import logging
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loractl.common.errors import ArtifactError, CardTaken, LoractlError, NameTaken, SchemaMismatch, ServiceUnreachable
from loractl.common.placement.cards import MARGIN_BYTES, Card
from loractl.common.placement.lines import VRAM_CLASSES, served_classes
from loractl.common.queue.hints import HintQueues, card_queue, queue_name
from loractl.common.settings import pace_of
from loractl.common.store.database import REFUSALS, absence, outage, told_by
from loractl.common.store.records import Arrival, BoxIdentity, NodeState
from loractl.worker.allowance import shows_bf16
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.device.occupancy import HIGH_WATER_S, Watch
from loractl.worker.node.health.leftovers import StuckSupervisors, end_strays
from loractl.worker.protocol.versions import installed_versions

from .slots import Slots


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The options of `loractl worker`, as its nodes get them."""

    margin: int = MARGIN_BYTES  # bytes that stay free
    max_jobs: int | None = None  # None: by the card's size
    user_limit: int | None = None  # running jobs that one user may have in the fleet
    keeps_jobs: bool = False  # its jobs yield to no shorter ones
    labels: dict[str, str] = field(default_factory=dict)
    high_water_s: float = HIGH_WATER_S  # how long other people's programs keep the most memory that they held
    fork_server: bool = True  # whether trainers are forks of a process that has done the imports
    until: float | None = None  # when the worker stops by itself, by the database's clock, in seconds since 1970
    window_s: float | None = None  # from its start until then
    grace_s: float | None = None  # how long a stop may take; None: no limit
    devices: int = 1  # the number that share the box's cores
    store_mark: str | None = None  # the mark of the lab's artifact store; see ArtifactStore


class DeviceRow:
    """What the node reports of its device: what it is, what is on it now, what its owner allows.

    `box` distinguishes this box from another one with the same name.
    """

    def __init__(
        self, place: Workplace, watch: Watch, options: NodeOptions, *, max_jobs: int, box: BoxIdentity
    ) -> None:
        self._place = place
        self._watch = watch
        self._options = options
        self._max_jobs = max_jobs
        self._box = box
        self._versions = installed_versions()
        self._processor = {"bf16": shows_bf16()} if place.device.kind == "cpu" else None  # it needs no test

    def arrive(self) -> Arrival:
        """Write the row of a node that is about to serve, unless another one has its name. Raises NameTaken."""
        return self._place.store.cards.arrive(self._state(draining=False))

    def write(self, *, draining: bool) -> Card:
        """Look at the device and write its row; returns the card with what runs on it. Raises NameTaken,
        CardTaken."""
        return self._place.store.cards.see(self._state(draining=draining))

    def _state(self, *, draining: bool) -> NodeState:
        place, device = self._place, self._place.device
        seen = self._watch.look()
        return NodeState(
            node=place.node,
            host=place.settings.host,
            gpu=device.uuid,
            device_name=device.name,
            kind=device.kind,
            total=device.total,
            outside_bytes=seen.outside or 0,  # never unknown: the first look comes before any job
            outside=seen.others,
            used=seen.used,
            margin=self._options.margin,
            max_jobs=self._max_jobs,
            user_limit=self._options.user_limit,
            keeps_jobs=self._options.keeps_jobs,
            labels=self._options.labels,
            load=seen.load,
            temperature=seen.temperature,
            draining=draining,
            gangs=device.kind != "cpu",
            fault=seen.fault or place.artifacts.fault,
            self_test=self._processor or seen.self_test,
            versions=self._versions,
            until=None if self._options.until is None else dt.datetime.fromtimestamp(self._options.until, dt.UTC),
            window_s=self._options.window_s,
            **vars(self._box),
        )


log = logging.getLogger("loractl.worker")

SEE_S = 5.0
"""How often a node writes its row. A shorter lease shortens this and the next two."""

ROUND_S = 5.0
"""How often a node looks for waiting rows and expired leases by itself: messages are hints and may be lost."""

FLEET_ROUND_S = 3.5
"""The least time between two of the fleet's rounds, which one node at a time does as part of its own round."""

SETTLE_S = 15.0
"""Seconds after an outage of the database in which living supervisors can beat before lost attempts are ended."""

FIRST_ROUND_S = 2.0
"""A node's first round waits this long on a box of several cards, until the rule sees all of them: else the first node
to start would take every job."""

CALM_S = 0.2
"""The least time between two looks, however many messages call for one."""

STOP_S = 5.0
"""How long a stopping node waits for its monitor."""

PLANS_S = 60.0
"""How often each node looks for rows with an older version's plan."""

TRIES = 5
"""After this many failures in a row the monitor ends its node, and the worker restarts it."""


class Monitor:
    """A thread next to the slots, with a round of periodic tasks. A vital task that keeps failing ends the node."""

    def __init__(self, place: Workplace, row: DeviceRow, *, devices: int = 1) -> None:
        self._place = place
        self._row = row
        self._queues = HintQueues(place.settings)
        self._stuck = StuckSupervisors(place)
        self._pace = pace_of(place.settings.lease_s)
        self._first_round_s = FIRST_ROUND_S if devices > 1 else 0.0
        self._next_plans = 0.0  # when this node next looks for rows with an older version's plan
        self._failures: dict[str, int] = {}  # in a row, by what failed
        self._serving: set[int] = set(VRAM_CLASSES)  # classes that fit into the free memory
        self._consumed: set[int] = set(VRAM_CLASSES)  # the classes whose queues Celery consumes
        self._consumer: Any = None  # Celery's; None before it starts and once it stops
        self._called = threading.Event()  # something has changed: look at once
        self._stopped = threading.Event()
        self._pass_on = False  # a message came while no slot of this node could take a job
        self._thread: threading.Thread | None = None
        self._asides: dict[str, threading.Thread] = {}  # the last thread of each kind
        self._queue_away = False

    def start(self, slots: Slots) -> None:
        """Begin the rounds, which read the rows even while the queue is away."""
        self._thread = self._place.clock.start(lambda: self._run(slots), "monitor")

    def look_soon(self) -> None:
        """Look at once: what the device can take has changed."""
        self._called.set()

    def pass_on(self) -> None:
        """Wake the cards to which the rule gives the waiting jobs: a message came while no slot here was idle."""
        self._pass_on = True
        self._called.set()

    def follow(self, consumer: Any) -> None:
        """Set Celery's consumer, which consumes the classes that fit from now on; None: Celery is stopping."""
        self._consumer = consumer

    def stop(self) -> None:
        self._stopped.set()
        self._called.set()
        if self._thread is not None:
            self._place.clock.join(self._thread, STOP_S)  # a hanging driver must not keep the node from ending

    def report(self) -> None:
        """Write the device's row, and consume the classes that fit into the free memory."""
        card = self._row.write(draining=self._place.drain.asked is not None)
        self._serving = set(served_classes(card.free)) if card.open and card.slots else set()
        if (consumer := self._consumer) is not None:
            consumer.call_soon(self._consume, consumer)

    def _consume(self, consumer: Any) -> None:
        """Runs in Celery's thread. Several calls that piled up there make one change."""
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
                next_round = now + ROUND_S * self._pace * random.uniform(0.8, 1.2)  # noqa: S311  it only spreads nodes
                self._try("the tables", self._place.store.require_own_tables)
                self._try("the round", lambda: self._go_round(slots))
                self._try("the fleet's round", self._tend_fleet, vital=False)
                self._try("planning again", self._plan_anew, vital=False)
                self._try("the queue's thread", lambda: self._aside("queue", self._trim_queues), vital=False)
                if self._place.artifacts.fault is not None:
                    self._try("the store's thread", lambda: self._aside("store", self._find_store), vital=False)
            if clock.wait(self._called, max(0.05, min(next_look, next_round, now + 1.0) - clock.now())):
                clock.wait(self._stopped, max(0.0, looked + CALM_S - clock.now()))

    def _try(self, what: str, work: Callable[[], None], *, vital: bool = True) -> None:
        """Do a part of the round. A vital part that keeps failing while its services answer ends the node.

        A refusal by the database never does: it would refuse a new node too, and the jobs here would stop for nothing.
        """
        try:
            work()
        except ServiceUnreachable as error:
            log.warning("%s", error.sentence)
        except (SchemaMismatch, NameTaken, CardTaken) as error:
            self._leave(error)
        except REFUSALS as error:
            if (why := outage(error)) is not None:
                log.warning("%s", absence(why))
            else:
                log.exception("%s failed: the database refuses it: %s", what, told_by(error))
        except Exception:
            # if the monitor ended silently, the node would look offline forever
            self._failures[what] = self._failures.get(what, 0) + 1
            log.exception("%s failed, %s of %s times", what, self._failures[what], TRIES)
            if vital and self._failures[what] >= TRIES:
                self._place.drain.alone = True
                os.kill(os.getpid(), signal.SIGTERM)
            return
        self._failures[what] = 0

    def _leave(self, why: LoractlError) -> None:
        """End the node: what this version reads and writes may mean something else in these tables, or another node
        serves in its place."""
        if self._place.drain.why is None:
            what = "claims nothing more, and ends once its jobs have saved a checkpoint"
            log.error("%s: %s %s", why.sentence, self._place.node, what)
            self._place.drain.why = why
            self._place.drain.alone = not isinstance(why, SchemaMismatch)
            self._place.drain.ask("checkpoint")
            os.kill(os.getpid(), signal.SIGTERM)

    def _look(self, slots: Slots) -> None:
        self.report()
        self._obey_drain(slots)
        if self._pass_on:
            self._pass_on = False  # a message that no slot here could use goes on, by the rule that claims use
            given = {d.placed.node for d in self._place.store.cards.fleet().decisions if d.placed is not None}
            self._place.wake_others(given - {self._place.node})

    def _obey_drain(self, slots: Slots) -> None:
        """Follow drains. An order to drain at once gives running jobs back after a checkpoint, until it is lifted.

        A job on several cards is given back if any of them is drained at once.
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
        place.drain.ordered = at_once  # supervisors see it from here on, so the wishes above must say whose order it is

    def _go_round(self, slots: Slots) -> None:
        """Look for jobs whose message was lost, or came while they did not fit."""
        end_strays(self._place)
        if self._place.drain.wish is None and self._place.store.jobs.waiting_classes(self._serving):
            slots.wake()

    def _plan_anew(self) -> None:
        """Plan again the jobs that have waited since before an upgrade: each node those whose bases its box has."""
        if self._place.clock.now() < self._next_plans:
            return
        planned = self._place.store.jobs.replan_outdated()
        for job_id in planned:
            log.info("job %s is planned again for this version's steps", job_id)
        if not planned:  # otherwise there may be more
            self._next_plans = self._place.clock.now() + PLANS_S * self._pace

    def _aside(self, name: str, work: Callable[[], None]) -> None:
        """Do this in a thread: a server that hangs takes seconds to time out, and the fleet's round must not wait for
        that, or no lost worker would be noticed meanwhile."""
        if name not in self._asides or self._place.clock.join(self._asides[name], 0.0):
            self._asides[name] = self._place.clock.start(partial(self._try, f"the {name}", work), name)

    def _find_store(self) -> None:
        """Open the card again once the lab's artifact store is here: its share was mounted, say."""
        try:
            self._place.artifacts.check()
        except (ArtifactError, ServiceUnreachable) as error:
            log.debug("%s", error.sentence)
            return
        log.info("the lab's artifact store is here again, and %s takes jobs", self._place.node)
        self._pass_on = True
        self.look_soon()

    def _trim_queues(self) -> None:
        """Discard excess messages: they are only hints, and nobody should keep a node busy by sending many."""
        queues = (card_queue(self._place.node), *map(queue_name, VRAM_CLASSES))
        try:
            if thrown := self._queues.trim(queues):
                log.warning("%s excess messages were on the queue and are discarded", thrown)
        except ServiceUnreachable as error:
            if not self._queue_away:
                log.warning("%s: %s; until then this node finds jobs by itself", error.sentence, error.hint)
            self._queue_away = True
            return
        if self._queue_away:
            log.info("the queue answers again")
        self._queue_away = False

    def _tend_fleet(self) -> None:
        """Do the fleet's round unless another node has done it: end lost attempts, make jobs give way, end patience."""
        store, pace = self._place.store, self._pace
        turn = store.cards.take_turn(FLEET_ROUND_S * pace, SETTLE_S * pace)
        if turn is None:
            return
        for job_id, _ in () if turn.settling else store.attempts.reap():
            log.warning("job %s: its worker was lost, it waits again", job_id)
        for job_id in store.cards.preempt():
            log.info("job %s gives way to another one", job_id)
        for job_id, _ in store.jobs.end_patience():
            log.info("job %s has waited long enough for LoRA", job_id)
