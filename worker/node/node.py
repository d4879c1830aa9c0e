"""A node: one Celery worker for one device. It wakes, claims what fits into the free memory, and runs it.

    python -m loractl.worker.node --index 0

The process that consumes the queues never trains: its pool children, one for each job that may share the device, claim
and supervise, and trainer processes train. A monitor thread reports the device, reaps expired leases, wakes for
waiting rows and follows the free memory.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from loractl.common.artifacts import open_store
from loractl.common.errors import LoractlError, ServiceUnreachable
from loractl.common.placement.rule import MARGIN_BYTES, VRAM_CLASSES, default_max_jobs, queue_name, served_classes
from loractl.common.queue.app import WAKE_TASK, card_queue, make_app, wake_cards
from loractl.common.queue.valkey import broker_url
from loractl.common.settings import Settings, load_settings, make_private
from loractl.common.store.database import connect, make_engine, outage
from loractl.common.store.fleet import NODE_STALE_S
from loractl.common.store.records import Claim, Left, NodeState
from loractl.common.store.store import Store
from loractl.common.text import clean_text
from loractl.common.units import gib
from loractl.worker.attempt.supervisor import Drain, Supervisor
from loractl.worker.device.devices import Device, find_devices
from loractl.worker.device.occupancy import HIGH_WATER_S, LEFT_S, Watch, card_mark, end_leftovers, run_mark, runs_of
from loractl.worker.protocol.versions import installed_versions

log = logging.getLogger("loractl.worker")

SEE_S = 5.0
"""How often a node's row is written; with a short lease this, like the next two, is shorter too."""

MONITOR_TRIES = 5
"""After so many failures in a row the monitor ends its node, and the worker starts it again."""

HOLD_BACK_S = 10.0
"""A job is left so long to the card that the rule gives it to; then that card is taken for stuck."""

SETTLE_S = 15.0
"""After an outage of the database living supervisors beat first, before anybody reaps."""

AGAIN_S = 2.0
"""A node that finds no database when it starts tries again so much later."""

SWEEP_S = 5.0
"""How often a node looks for waiting rows and expired leases by itself: messages are hints and may be lost."""


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What the box's owner says of a device."""

    margin: int = MARGIN_BYTES  # bytes that stay free
    max_jobs: int | None = None  # None: by the card's size
    user_limit: int | None = None  # running jobs that one user may have in the fleet
    labels: dict[str, str] = field(default_factory=dict)
    high_water_s: float = HIGH_WATER_S  # other people's memory stays theirs for so long
    devices: int = 1  # that share the box's cores


class Node:
    """One device, its queues and its monitor."""

    def __init__(self, settings: Settings, device: Device, options: NodeOptions) -> None:
        self.settings = settings
        self.device = device
        self.options = options
        self.name = f"{settings.host}:{device.index}"
        self.drain = Drain(settings.runtime_dir / f"drain-{device.uuid}")
        # a plan says nothing of a processor's memory, so it is not shared
        shared = 1 if device.kind == "cpu" else default_max_jobs(device.total)
        self.max_jobs = options.max_jobs or shared
        self.threads = max(1, (os.cpu_count() or 1) // (options.devices * self.max_jobs))
        self._instance = _instance(settings.runtime_dir / "instance")
        self._watch = Watch(device=device, node_pid=os.getpid(), high_water_s=options.high_water_s)
        # a pool child looks too seldom to know every trainer: what it takes for somebody else's must not stay theirs
        self._glance = Watch(device=device, node_pid=os.getpid(), high_water_s=0)
        self._left: dict[str, float] = {}  # node -> since when a job is left to it
        self._serving: set[int] = set(VRAM_CLASSES)
        self._drained = False  # by a person's order
        self._stop = threading.Event()
        self._in_database = threading.RLock()  # the monitor's, while it reads or writes there
        self._parent = os.getppid()
        self._card = card_mark(settings, self.name)
        self._pace = min(1.0, settings.lease_s / (2 * SETTLE_S))

    def serve(self) -> None:
        """Consume until told to stop. Blocks."""
        from celery import signals
        from celery.platforms import SecurityWarning

        # Celery warns root of pickled messages; this app takes JSON alone (common.queue).
        warnings.filterwarnings("ignore", category=SecurityWarning)
        # A wake message that comes while this node stops goes back to its queue, which needs no warning.
        logging.getLogger("kombu.transport.virtual.base").setLevel(logging.ERROR)
        lock = _only_one(self.settings.runtime_dir / f"node-{self.device.uuid}.lock")
        self.fork_between_transactions()
        self.drain.clear()
        broker = broker_url(self.settings)
        app = make_app(broker)
        self._await_database(lambda: self._take_over(self._open_store()))

        @app.task(name=WAKE_TASK, ignore_result=True)
        def wake(size_class: int) -> None:  # what the message says is a hint: the claim looks at what is free now
            self.wake()

        signals.worker_ready.connect(lambda sender, **_: self._start_monitor(app, sender), weak=False)
        signals.worker_shutting_down.connect(lambda **_: self._shut_down(), weak=False)
        worker = app.Worker(
            concurrency=self.max_jobs,
            pool="prefork",
            hostname=f"loractl@{self.name}",
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
            queues=[card_queue(self.name), *(queue_name(c) for c in VRAM_CLASSES)],
        )
        worker.start()
        self._stop.set()
        lock.close()

    def fork_between_transactions(self) -> None:
        """Let a new pool child come only while the monitor is not in the database.

        SQLite counts a process's locks in its memory. A child of a process in mid-transaction takes them over with
        nobody to give them back: for it the database is locked as long as it lives.
        """
        lock = self._in_database
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

    def _open_store(self) -> Store:
        return Store(_fresh_engine(self.settings), lease_s=self.settings.lease_s)

    def _await_database(self, work: Callable[[], None]) -> None:
        """Do what a node can't start without, again and again: the database may be away for long, and other cards of
        the box go on meanwhile."""
        while True:
            try:
                work()
                return
            except ServiceUnreachable as error:
                log.warning("%s: waiting for it", error.sentence)
            except DBAPIError as error:
                if (why := outage(error)) is None:
                    raise
                log.warning("the database is away, waiting for it: %s", why)
            time.sleep(AGAIN_S)
            if os.getppid() != self._parent:
                sys.exit("the loractl worker process is gone")

    def _take_over(self, store: Store) -> None:
        """Write the device's row, which a claim needs, and give back what an earlier node of this device left running.

        Raises LoractlError when another box has the same name: each would give back the other's jobs.
        """
        for run in runs_of(self._card):  # an earlier node was killed, and what its trainer started was not
            end_leftovers(run)
        connect(self.settings).dispose()  # its schema is ours
        before = next((row for row in store.nodes() if row.node == self.name), None)
        if before is not None and before.instance not in (None, self._instance):
            if (store.now() - before.seen_at).total_seconds() < NODE_STALE_S:
                raise LoractlError(
                    f"another box calls itself {self.settings.host} and serves its device {self.device.index}",
                    "give each its own name: LORACTL_HOST=...",
                )
        elif before is not None:  # the lock says that no process of that node is alive
            for job_id in store.give_back(self.name):
                log.warning("job %s: an earlier worker of this device left it, it waits again", job_id)
        self._look(store, None)

    def wake(self) -> None:
        """In a pool child: claim and run, until nothing waiting is for this card."""
        engine = _fresh_engine(self.settings)
        store = Store(engine, lease_s=self.settings.lease_s)
        supervisor = Supervisor(
            self.settings, store, open_store(self.settings), self.device, self.name, self.drain, self.threads
        )
        try:
            while self.drain.wish is None:
                claim = self._claim(store)
                if claim is None:
                    return
                if self.max_jobs > 1:
                    self._wake_cards([self.name])  # another slot may have room for the next job
                supervisor.run(claim)
                self._check_left(store, claim)
        except DBAPIError as error:
            if (why := outage(error)) is None:
                raise
            log.warning("the database is away: %s", why)
        finally:
            engine.dispose()

    def _check_left(self, store: Store, claim: Claim) -> None:
        """After an attempt no process and no memory of it remains; else the card is closed, and the reason says why."""
        job, deadline = str(claim.job_id), time.monotonic() + LEFT_S
        while (alive := end_leftovers(run_mark(claim.token))) or self._watch.look().used.get(job):
            if time.monotonic() > deadline:
                held = self._watch.look().used.get(job, 0)
                what = f"process {alive[0]}" if alive else f"{gib(held)} GiB of memory"
                reason = f"job {job} left {what} behind; look at the card, then loractl undrain {self.name}"
                log.error("%s is closed: %s", self.name, reason)
                store.drain(self.name, "loractl", reason)
                return
            time.sleep(0.5)

    def _claim(self, store: Store) -> Claim | None:
        """What the rule gives this card now; what it gives another one that does not take it, after a while."""
        while True:
            seen, now = self._glance.look(), time.monotonic()
            distrusted = frozenset(node for node, since in self._left.items() if now - since > HOLD_BACK_S)
            claim = store.claim(self.name, seen.outside, seen.used, distrusted)
            if not isinstance(claim, Left):
                self._left = {}
                return claim
            if claim.nodes:
                self._left = {node: self._left.get(node, now) for node in claim.nodes}
                self._wake_cards(claim.nodes)
                return None
            time.sleep(0.05)

    def _wake_cards(self, nodes: Iterable[str]) -> None:
        """A hint to other slots or cards; without it they look by themselves within SWEEP_S."""
        try:
            wake_cards(self.settings, nodes)
        except ServiceUnreachable as error:
            log.warning("%s", error.sentence)

    def _shut_down(self) -> None:
        if self.drain.wish is None:
            self.drain.ask("checkpoint")

    def _start_monitor(self, app: Any, consumer: Any) -> None:
        threading.Thread(target=self._monitor, args=(app, consumer), name="monitor", daemon=True).start()

    def _monitor(self, app: Any, consumer: Any) -> None:
        store = self._open_store()
        next_look, next_sweep, failures = 0.0, 0.0, 0
        while not self._stop.wait(0.25):
            if os.getppid() != self._parent:
                log.warning("the loractl worker process is gone, this node stops")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            now = time.monotonic()
            try:
                if now >= next_look:
                    next_look = now + SEE_S * self._pace
                    with self._in_database:
                        self._look(store, consumer)
                if now >= next_sweep:
                    next_sweep = now + SWEEP_S * self._pace * random.uniform(0.8, 1.2)  # noqa: S311  spreads nodes, guards nothing
                    with self._in_database:
                        self._sweep(store, app)
                failures = 0
            except ServiceUnreachable as error:
                log.warning("%s", error.sentence)
            except Exception as error:
                if (why := outage(error)) is not None:
                    log.warning("the database is away: %s", why)
                    next_sweep = now + SETTLE_S * self._pace
                    continue
                # a monitor that ends in silence would leave a node that looks offline and never comes back
                failures += 1
                log.exception("the monitor failed, %s of %s times", failures, MONITOR_TRIES)
                if failures >= MONITOR_TRIES:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    def _look(self, store: Store, consumer: Any) -> None:
        """Report the device, and consume the classes that fit into what is free now."""
        seen = self._watch.look()
        card = store.see_node(
            NodeState(
                node=self.name,
                host=self.settings.host,
                gpu=self.device.uuid,
                device_name=self.device.name,
                kind=self.device.kind,
                total=self.device.total,
                outside_bytes=seen.outside or 0,  # the monitor has looked before any job came
                outside=seen.others,
                used=seen.used,
                margin=self.options.margin,
                max_jobs=self.max_jobs,
                user_limit=self.options.user_limit,
                labels=self.options.labels,
                load=seen.load,
                temperature=seen.temperature,
                draining=self.drain.wish is not None and not self._drained,
                versions=installed_versions(),
                instance=self._instance,
            )
        )
        if consumer is None:
            return
        self._obey_drain(store)
        wanted = set(served_classes(card.free)) if card.open and card.slots else set()
        for size in wanted - self._serving:
            consumer.call_soon(consumer.add_task_queue, queue_name(size))
        for size in self._serving - wanted:
            consumer.call_soon(consumer.cancel_task_queue, queue_name(size))
        self._serving = wanted

    def _obey_drain(self, store: Store) -> None:
        """A person's order to drain at once gives running jobs back after a checkpoint; its end lets new ones in."""
        orders = store.drains()
        order = orders.get(self.name) or orders.get(self.settings.host)
        if order is not None and order.now and self.drain.wish is None:
            log.warning("drained by %s: %s", order.user, order.reason)
            self.drain.ask("checkpoint")
            self._drained = True
        elif order is None and self._drained:
            self.drain.clear()
            self._drained = False

    def _sweep(self, store: Store, app: Any) -> None:
        """Reap lost attempts, and wake for rows whose message was lost or came while nothing fitted."""
        self._end_strays(store)
        for job_id, _ in store.reap():
            log.warning("job %s: its worker was lost, it waits again", job_id)
        for job_id in store.preempt():
            log.info("job %s gives way to one of higher priority", job_id)
        for job_id, _ in store.end_patience():
            log.info("job %s has waited long enough for LoRA", job_id)
        waiting = store.waiting_classes(self._serving)
        if not waiting:
            return
        from kombu.exceptions import KombuError
        from redis.exceptions import RedisError

        try:
            with app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=3)
                for size in waiting:
                    if connection.default_channel.client.llen(queue_name(size)) == 0:
                        app.send_task(WAKE_TASK, (size,), queue=queue_name(size), retry=False, connection=connection)
        except (OSError, KombuError, RedisError) as error:
            log.warning("the queue is away: %s", error)

    def _end_strays(self, store: Store) -> None:
        """End processes of attempts that run no more: a killed supervisor's trainer may have left some behind."""
        marks = runs_of(self._card)  # first: whoever starts between the two looks has its claim
        if not marks:
            return
        for run in marks - {run_mark(token) for token in store.tokens(self.name)}:
            log.warning("what an attempt left behind on %s is ended", self.name)
            end_leftovers(run)


def _fresh_engine(settings: Settings) -> Engine:
    """An engine of this process's own: a connection must not cross a fork."""
    return make_engine(settings.database_url)


def _instance(path: Path) -> str:
    """This box's own mark, made once: names of boxes may be equal, as those of containers are."""
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(uuid.uuid4().hex)
    return path.read_text()


def _only_one(path: Path) -> IO[str]:
    """A lock that this node holds while it lives, pool child included. Waits, and says so, while another one has it.

    Two nodes on one device would both claim by the same free memory. After a node was killed, its pool child may still
    be finishing a job.
    """
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("another worker serves this device, or finishes its last job: waiting for it (%s)", path)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


class _PlainFormatter(logging.Formatter):
    """Lines without control characters: a model's error may hold what would steer the terminal of the box's owner."""

    def format(self, record: logging.LogRecord) -> str:
        return clean_text(super().format(record))


def main() -> None:
    """Serve the device with the given index."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="NodeOptions as JSON")
    arguments = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(logging.INFO)
    settings = load_settings()
    for folder in (settings.runtime_dir, settings.work_dir, settings.cache_dir):
        make_private(folder)  # logs, data sets, checkpoints
    device = next(d for d in find_devices(settings) if d.index == arguments.index)
    try:
        Node(settings, device, NodeOptions(**arguments.options)).serve()
    except LoractlError as error:
        log.error("%s\nHint: %s", error.sentence, error.hint)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
