"""A node: the process that serves one device. A message wakes its slots; they claim the jobs that fit and supervise
them.

    python -m loractl.worker.node --index 0

It never imports torch and never trains: trainers are separate processes. Celery consumes in the main thread; the slots
and the monitor are threads. `loractl worker` holds the node's stdin: a line there is an order, and its end means that
the worker is gone.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import IO, Any

from loractl.common.errors import CardTaken, Forbidden, LoractlError, NameTaken, SchemaMismatch
from loractl.common.placement.cards import default_max_jobs
from loractl.common.placement.lines import VRAM_CLASSES
from loractl.common.queue.app import make_app
from loractl.common.queue.hints import WAKE_TASK, card_queue, queue_name
from loractl.common.queue.valkey import broker_url
from loractl.common.settings import Settings, load_settings, make_private, pace_of
from loractl.common.store.database import CONNECTIONS, NODE_IDLE_S, REFUSALS, connect, make_engine, told_by
from loractl.common.store.store import Store
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Patience, Workplace
from loractl.worker.delivery.messenger import Messenger
from loractl.worker.device.devices import Device, find_device
from loractl.worker.device.occupancy import Watch
from loractl.worker.node.health.leftovers import end_all, end_strays, has_ranks
from loractl.worker.node.health.self_test import SelfTest

from .fork_server import ForkServer
from .lock import DeviceLock, read_identity
from .monitor import DeviceRow, Monitor, NodeOptions
from .slots import Slots
from .terminal import LogHandler, Terminal

log = logging.getLogger("loractl.worker")

GANG_S = 1.0
"""Seconds between two looks at the jobs that have this card as one of several, while the node stops."""

AGAIN_S = 2.0
"""Seconds before a node that found no database at its start tries again."""


class DeviceNode:
    """One device, its queues, its slots and its monitor."""

    def __init__(self, place: Workplace, options: NodeOptions) -> None:
        """`place`: from `place_of`, or made by a test."""
        settings, device, max_jobs = place.settings, place.device, _max_jobs(place.device, options)
        self._settings = settings
        self._place = place
        self._lock: DeviceLock | None = None
        self._fork_server = ForkServer(self._place, self._starts_a_job) if options.fork_server else None
        watch = Watch(
            device=device,
            node_pid=os.getpid(),
            high_water_s=options.high_water_s,
            home=settings.home,
            clock=place.clock,
        )
        self._watch = watch
        self._place = replace(
            self._place, forks=self._fork_server, held=lambda job_id: watch.look().used.get(str(job_id), 0)
        )
        self._row = DeviceRow(self._place, watch, options, max_jobs=max_jobs, box=read_identity(settings))
        self._self_test = SelfTest(self._place, watch, lambda: self._monitor.look_soon())
        self._monitor = Monitor(self._place, self._row, devices=options.devices)
        self._messenger = Messenger(self._place.store, settings, clock=place.clock)
        self._slots = Slots(
            self._place,
            watch,
            max_jobs,
            changed=self._changed,
            overheard=self._monitor.pass_on,
            devices=options.devices,
        )

    def serve(self) -> None:
        """Consume until told to stop, then wait for the running jobs. Blocks.

        Raises SchemaMismatch, NameTaken, CardTaken.
        """
        # imported before the first message, which must be answered in milliseconds: a claim reads a spec
        from celery import signals
        from celery.platforms import SecurityWarning

        from loractl.common.job.spec import JobSpec  # noqa: F401

        # Celery warns root about pickled messages; this app accepts only JSON (common.queue).
        warnings.filterwarnings("ignore", category=SecurityWarning)
        # A wake message that comes while this node stops returns to its queue, which needs no warning.
        logging.getLogger("kombu.transport.virtual.base").setLevel(logging.ERROR)
        # Of a queue that is away it writes a line in each try, for ever; the monitor says it once.
        logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
        self._lock = DeviceLock(self._settings, self._place.device)
        app = make_app(broker_url(self._settings))
        # the database may be away for long; the box's other cards go on meanwhile
        Patience(first_s=AGAIN_S, most_s=AGAIN_S, clock=self._place.clock).repeat(self.take_over, _once())

        @app.task(name=WAKE_TASK, ignore_result=True)
        def wake(size_class: int) -> None:  # the message is only a hint: the claim checks what is free now
            self.wake()

        signals.worker_ready.connect(lambda sender, **_: self._ready(sender), weak=False)
        signals.worker_shutting_down.connect(lambda **_: self._shut_down(), weak=False)
        # until Celery sets its own handler: jobs that are claimed by then must be given back too
        signal.signal(signal.SIGTERM, lambda *_: self._shut_down())
        self.begin()
        try:
            self._consume(app)
        finally:
            self._shut_down()
            self.end()
            self._lock.close()
        if (why := self._place.drain.why) is not None:
            raise why

    def begin(self) -> None:
        """Start the threads. They find waiting jobs even without messages."""
        self._slots.start()
        self._monitor.start(self._slots)
        self._self_test.start()
        self._messenger.start()
        if self._fork_server is not None:
            self._place.artifacts.make_ready()  # a job's start also needs the process that fetches its data
            self._fork_server.start()

    def end(self) -> None:
        """Wait until every attempt has ended, then stop the threads."""
        self._slots.close()
        self._await_gangs()
        if self._fork_server is not None:
            self._fork_server.stop()
        self._monitor.stop()
        self._messenger.stop()
        self._self_test.stop()

    def wake(self) -> None:
        """Look for jobs at once, as after a message."""
        self._slots.wake()

    def _starts_a_job(self) -> bool:
        """Whether a fork server's imports would be in the way, since a job has not reached its first step, or of no
        use, since the card may take no jobs."""
        starting = any(one.heard.step == 0 and not one.own.closed for one in self._slots.attempts.values())
        return starting or self._watch.fault is not None

    def _consume(self, app: Any) -> None:
        """Let Celery consume until this node must stop. If Celery ends by itself, it restarts; running jobs go on."""
        while self._place.drain.asked is None:
            app.Worker(
                pool="solo",
                hostname=f"loractl@{self._place.node}",
                loglevel="WARNING",
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
                quiet=True,
                queues=[card_queue(self._place.node), *(queue_name(c) for c in VRAM_CLASSES)],
            ).start()
            self._monitor.follow(None)
            if self._place.drain.asked is None:
                log.warning("Celery ended by itself and is restarted")
                self._place.clock.sleep(AGAIN_S)

    def _await_gangs(self) -> None:
        """Stay while a job has this card as one of several: the node of its first card stops it, and would end it as
        lost if this node went silent meanwhile. If only this node ends, no other node stops the job, so it does not
        wait: the job returns to its last checkpoint, rather than keep the card out of service until it ends. While the
        database is away, the node waits only for a job that runs here, because nothing else could end the wait."""
        said = False
        while self._place.drain.wish != "now" and not self._place.drain.alone:
            try:
                if not self._place.store.cards.serves_beside(self._place.node):
                    return
            except REFUSALS as error:
                if not said:
                    log.warning(
                        "can't tell whether a job has %s as one of several cards: %s", self._place.node, told_by(error)
                    )
                said = True
                if not has_ranks(self._place):
                    return
            self._place.clock.sleep(GANG_S)

    def _ready(self, consumer: Any) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # by default Celery prints its threads
        self._say_served()
        self._monitor.follow(consumer)

    def _changed(self) -> None:
        """A job came or went here: so this node works, and the card's room has changed."""
        self._say_served()
        self._monitor.look_soon()

    def _say_served(self) -> None:
        if self._lock is not None:
            self._lock.say_served()

    def take_over(self) -> None:
        """Write the device's row, which a claim needs, and give back jobs that an earlier node of this device left
        running.

        The lock shows that no process of that node is alive, but only on this machine. Raises NameTaken, CardTaken.
        """
        end_all(self._place)
        connect(self._settings).dispose()  # checks that the schema is of this version
        arrival, first = self._row.arrive(), dict[str | None, dt.datetime]()  # when each other node was seen first
        while arrival.seen_at is not None:  # until the other node has been silent for so long that its row is free
            node, server = self._place.node, arrival.server
            if first.setdefault(server, arrival.seen_at) != arrival.seen_at:
                raise NameTaken(node) if server is None else CardTaken(node, server)
            how = "before this machine's last start or on a copy of it" if server is None else f"as {server}"
            log.warning("%s was just served, %s", node, how)
            self._place.clock.sleep(AGAIN_S)
            arrival = self._row.arrive()
        for job_id in arrival.given_back:
            log.warning("job %s: an earlier worker of this device left it, it waits again", job_id)
        end_strays(self._place)  # ranks of a job on several cards that their leader has not ended yet
        self._monitor.report()

    def _shut_down(self) -> None:
        """Begin to stop; may run in a signal handler. While Celery starts, it looks only at its own flag."""
        from celery.worker import state

        state.should_stop = 0
        self._monitor.follow(None)
        self._place.drain.ask("checkpoint")


def place_of(settings: Settings, device: Device, options: NodeOptions, drain: Drain) -> Workplace:
    """What all attempts on the device share. Its store has enough connections for the threads of a DeviceNode."""
    max_jobs = _max_jobs(device, options)
    # for each slot, its upload and the monitor; they rarely need them at once, so that only one stays open
    connections = max(CONNECTIONS, 2 * max_jobs + 2)
    idle_s = NODE_IDLE_S * pace_of(settings.lease_s)
    engine = make_engine(settings.database_url, connections=connections, kept=1, idle_s=idle_s)
    return Workplace(
        settings=settings,
        store=Store(engine, lease_s=settings.lease_s),
        artifacts=StoreClient(settings.artifacts_url, mark=options.store_mark),
        device=device,
        node=f"{settings.host}:{device.number}",
        drain=drain,
        trainers=options.devices * max_jobs,
    )


def _max_jobs(device: Device, options: NodeOptions) -> int:
    """Jobs that may share the device. A plan says nothing about a processor's memory, so jobs don't share that."""
    return options.max_jobs or (1 if device.kind == "cpu" else default_max_jobs(device.total))


def obey(orders: IO[str], drain: Drain) -> None:
    """Follow the worker's orders in a thread. If the worker is gone, stop as after SIGTERM."""

    def listen() -> None:
        for line in orders:
            if line.strip() == "now":
                drain.ask("now")
            elif line.strip() == "alone":
                drain.alone = True
        if drain.wish is None:
            log.warning("the loractl worker process is gone, this node stops")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, name="orders", daemon=True).start()


def _once() -> Callable[[str], None]:
    """Logs what the node waits for, each reason once: it tries every few seconds, and an outage may last all night."""
    said: set[str] = set()

    def tell(why: str) -> None:
        if why not in said:
            said.add(why)
            log.warning("%s: waiting for it", why)

    return tell


def main() -> None:
    """Serve the device with the given index."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", required=True, help="the device's number, like 0, or 0.1")
    parser.add_argument("--options", type=json.loads, default={}, help="NodeOptions as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(handlers=[LogHandler(Terminal(), "%(asctime)s %(message)s")], level=logging.WARNING)
    logging.captureWarnings(True)  # else a thread that warns waits for the terminal
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm notifies the whole allocation; the worker's order follows
    options = NodeOptions(**arguments.options)
    drain = Drain(options.grace_s)
    obey(sys.stdin, drain)
    settings = load_settings()
    for folder in (settings.runtime_dir, settings.work_dir, settings.cache_dir):
        make_private(folder)  # logs, data sets, checkpoints
    try:
        device = find_device(settings, arguments.index)
        DeviceNode(place_of(settings, device, options, drain), options).serve()
    except LoractlError as error:
        log.error("%s\nHint: %s", error.sentence, error.hint)
        sys.exit(os.EX_NOPERM if isinstance(error, (Forbidden, SchemaMismatch)) else error.exit_code)
