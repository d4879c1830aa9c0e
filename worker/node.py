"""A node: one Celery worker for one device. It wakes, claims what fits into the free memory, and runs it.

    python -m loractl.worker.node --index 0

The process that consumes the queues never trains: a pool child claims and supervises, a trainer process trains. A
monitor thread reports the device, reaps expired leases, wakes for waiting rows and follows the free memory.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from loractl import __version__
from loractl.common.artifacts import open_store
from loractl.common.broker import broker_url
from loractl.common.database import connect, is_outage, make_engine
from loractl.common.errors import LoractlError, ServiceUnreachable
from loractl.common.policy import VRAM_CLASSES, queue_name, served_classes
from loractl.common.queue import WAKE_TASK, make_app
from loractl.common.records import NodeState
from loractl.common.settings import Settings, load_settings
from loractl.common.store import Store

from .devices import Device, find_devices
from .supervisor import Drain, Supervisor

log = logging.getLogger("loractl.worker")

SEE_S = 5.0
"""How often a node's row is written."""

MONITOR_TRIES = 5
"""After so many failures in a row the monitor ends its node, and the worker starts it again."""

SETTLE_S = 15.0
"""After an outage of the database living supervisors beat first, before anybody reaps."""

SWEEP_S = 5.0
"""How often a node looks for waiting rows and expired leases by itself: messages are hints and may be lost."""


class Node:
    """One device, its queues and its monitor."""

    def __init__(self, settings: Settings, device: Device, devices: int) -> None:
        self.settings = settings
        self.device = device
        self.name = f"{socket.gethostname()}:{device.index}"
        self.drain = Drain(settings.runtime_dir / f"drain-{device.uuid}")
        self.threads = max(1, (os.cpu_count() or 1) // devices)
        self._busy = threading.Event()
        self._serving: set[int] = set(VRAM_CLASSES)
        self._stop = threading.Event()

    def serve(self) -> None:
        """Consume until told to stop. Blocks."""
        from celery import signals
        from celery.platforms import SecurityWarning

        # Celery warns root of pickled messages; this app takes JSON alone (common.queue).
        warnings.filterwarnings("ignore", category=SecurityWarning)
        lock = _only_one(self.settings.runtime_dir / f"node-{self.device.uuid}.lock")
        self.drain.clear()
        broker = broker_url(self.settings)
        app = make_app(broker)

        @app.task(name=WAKE_TASK, ignore_result=True)
        def wake(size_class: int) -> None:  # what the message says is a hint: the claim looks at what is free now
            self.wake()

        signals.worker_ready.connect(lambda sender, **_: self._start_monitor(app, sender), weak=False)
        signals.worker_shutting_down.connect(lambda **_: self._shut_down(), weak=False)
        worker = app.Worker(
            concurrency=1,
            pool="prefork",
            hostname=f"loractl@{self.name}",
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
            queues=[queue_name(c) for c in VRAM_CLASSES],
        )
        worker.start()
        self._stop.set()
        lock.close()

    def wake(self) -> None:
        """In the pool child: claim and run, until nothing waiting fits."""
        engine = _fresh_engine(self.settings)
        store = Store(engine)
        supervisor = Supervisor(
            self.settings, store, open_store(self.settings), self.device, self.name, self.drain, self.threads
        )
        try:
            while self.drain.wish is None:
                claim = store.claim(
                    self.name, self.device.uuid, self.device.look().free, plan_holds=self.device.kind != "cpu"
                )
                if claim is None:
                    return
                supervisor.run(claim)
        except DBAPIError as error:
            if not is_outage(error):
                raise
            log.warning("the database is away: %s", str(error.orig).strip())
        finally:
            engine.dispose()

    def _shut_down(self) -> None:
        if self.drain.wish is None:
            self.drain.ask("checkpoint")

    def _start_monitor(self, app: Any, consumer: Any) -> None:
        threading.Thread(target=self._monitor, args=(app, consumer), name="monitor", daemon=True).start()

    def _monitor(self, app: Any, consumer: Any) -> None:
        store = Store(_fresh_engine(self.settings))
        parent, next_look, next_sweep, failures = os.getppid(), 0.0, 0.0, 0
        while not self._stop.wait(0.25):
            if os.getppid() != parent:
                log.warning("the loractl worker process is gone, this node stops")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            now = time.monotonic()
            try:
                if now >= next_look:
                    next_look = now + SEE_S
                    self._look(store, consumer)
                if now >= next_sweep:
                    next_sweep = now + SWEEP_S * random.uniform(0.8, 1.2)  # noqa: S311  spreads nodes, guards nothing
                    self._sweep(store, app)
                failures = 0
            except ServiceUnreachable as error:
                log.warning("%s", error.sentence)
            except Exception as error:
                if isinstance(error, DBAPIError) and is_outage(error):
                    log.warning("the database is away: %s", str(error.orig).strip())
                    next_sweep = now + SETTLE_S
                    continue
                # a monitor that ends in silence would leave a node that looks offline and never comes back
                failures += 1
                log.exception("the monitor failed, %s of %s times", failures, MONITOR_TRIES)
                if failures >= MONITOR_TRIES:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    def _look(self, store: Store, consumer: Any) -> None:
        """Report the device, and consume the classes that fit into what is free now."""
        from celery.worker import state as worker_state

        seen = self.device.look()
        store.see_node(
            NodeState(
                node=self.name,
                host=socket.gethostname(),
                gpu=self.device.uuid,
                device_name=self.device.name,
                kind=self.device.kind,
                total=self.device.total,
                free=seen.free,
                outside=seen.outside,
                load=seen.load,
                temperature=seen.temperature,
                draining=self.drain.wish is not None,
                versions={"loractl": __version__},
            )
        )
        if worker_state.active_requests:
            return  # our own job takes the memory, and nothing more is fetched meanwhile
        wanted = set(served_classes(seen.free))
        for size in wanted - self._serving:
            consumer.call_soon(consumer.add_task_queue, queue_name(size))
        for size in self._serving - wanted:
            consumer.call_soon(consumer.cancel_task_queue, queue_name(size))
        self._serving = wanted

    def _sweep(self, store: Store, app: Any) -> None:
        """Reap lost attempts, and wake for rows whose message was lost or came while nothing fitted."""
        for job_id, _ in store.reap():
            log.warning("job %s: its worker was lost, it waits again", job_id)
        waiting = [size for size in store.waiting_classes() if size in self._serving]
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


def _fresh_engine(settings: Settings) -> Engine:
    """An engine of this process's own: a connection must not cross a fork."""
    return make_engine(settings.database_url)


def _only_one(path: Path) -> IO[str]:
    """A lock that this node holds while it lives, pool child included. Waits, and says so, while another one has it.

    Two nodes on one device would both claim by the same free memory. After a node was killed, its pool child may still
    be finishing a job.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("another worker serves this device, or finishes its last job: waiting for it (%s)", path)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def main() -> None:
    """Serve the device with the given index."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=int, required=True)
    index = parser.parse_args().index
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    log.setLevel(logging.INFO)
    settings = load_settings()
    connect(settings).dispose()
    devices = find_devices(settings)
    device = next(d for d in devices if d.index == index)
    try:
        Node(settings, device, len(devices)).serve()
    except LoractlError as error:
        log.error("%s\nHint: %s", error.sentence, error.hint)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
