"""The node's process: what a message does, what happens without the queue, and a supervisor that is stuck."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import event

from loractl.common.job.status import Reason, Status
from loractl.common.queue.hints import card_queue
from loractl.common.queue.valkey import broker_url
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import BoxIdentity, Claim
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.device.devices import SimulatedDevice
from loractl.worker.device.occupancy import Watch
from loractl.worker.node.monitor import DeviceRow, Monitor, NodeOptions
from loractl.worker.node.slots import CALM_S, Slots

from ..conftest import Cli
from ..models import write_job
from ..receivers import receiver, status
from ..unit.factories import node_state, submission

DEAF = """
import time

time.sleep(10**6)  # reads no order, tells nothing, and outlives its stdin
"""

QUICK = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.recipe.trainer import main

if __name__ == "__main__":
    main(lambda start, stop, tell: Ended(job_id=start.job_id, reason=Reason.BAD_DATA, message="nothing is trained"))
"""

HUB_MODEL = Path("org/base")
"""It is read by no trainer here, and nobody can say that it isn't there."""


SLOW = """
from loractl.common.job.status import Reason
from loractl.worker.protocol.messages import Ended
from loractl.worker.recipe.trainer import main


def run(start, stop, tell):
    stop.came.wait()
    return Ended(job_id=start.job_id, reason=Reason.DRAINED, message="stopped")


if __name__ == "__main__":
    main(run)
"""


@pytest.fixture
def run_with(make_cli: Callable[..., Cli], tmp_path: Path) -> Callable[..., Cli]:
    """A command line whose trainer is the given program."""

    def make(trainer: str, **more: str) -> Cli:
        (tmp_path / "stand_in_trainer.py").write_text(trainer)
        return make_cli(
            LORACTL_TRAINER="stand_in_trainer",
            PYTHONPATH=str(tmp_path),
            LORACTL_LEASE="3s",
            LORACTL_HOST="heron",
            **more,
        )

    return make


def test_a_supervisor_that_hangs_loses_its_trainer_and_the_slot_takes_the_next_job(
    run_with: Callable[..., Cli], tmp_path: Path
) -> None:
    """The order is longer than a pipe holds: writing it to a trainer that never reads blocks."""
    cli = run_with(DEAF)
    job = write_job(tmp_path, HUB_MODEL)
    names = ", ".join(f"a_module_with_quite_a_long_name_{n}" for n in range(4000))
    job.write_text(job.read_text().replace("lora: {", f"lora: {{target_modules: [{names}], "))
    cli("submit", job)
    store = Store(connect(load_settings(cli.environment)))
    worker = cli.start("worker", warm_start=True)
    try:
        _until(lambda: [a.reason for a in store.attempts.of_job(1)][:1] == [Reason.WORKER_LOST])
        store.jobs.hold(1, "tester") if store.jobs.get(1).status is Status.QUEUED else store.jobs.cancel(1, "tester")
        cli("submit", job)
        _until(lambda: bool(store.attempts.of_job(2)))
    finally:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGINT)
        said, _ = worker.communicate(timeout=90)
    assert "ending processes that an attempt left behind on heron:0" in said


def test_jobs_start_without_the_queue(run_with: Callable[..., Cli], home: Path, tmp_path: Path) -> None:
    """And their end is told to the user's channel, which needs no queue either."""
    cli = run_with(QUICK, LORACTL_REDIS_URL="redis://127.0.0.1:1", LORACTL_NOTIFY="me")  # nobody listens there
    with receiver(status(204)) as phone:
        config = home / "config.toml"
        config.write_text(
            f'[channels.phone]\nkind = "ntfy"\nurl = "http://127.0.0.1:{phone.port}/t"\nusers = ["tester"]'
        )
        config.chmod(0o600)
        submitted = cli("submit", write_job(tmp_path, HUB_MODEL), "--set=max_retries=0")
        assert "Job 1" in submitted.stdout and "the queue" in submitted.stderr
        store = Store(connect(load_settings(cli.environment)))
        worker = cli.start("worker", warm_start=True)
        try:
            _until(lambda: store.jobs.get(1).status is Status.FAILED)
            _until(lambda: len(phone.requests) > 0)
        finally:
            worker.send_signal(signal.SIGINT)
            said, _ = worker.communicate(timeout=60)
    assert said.count("the queue is unreachable at redis://127.0.0.1:1") == 2, "by the worker and by its node"
    assert said.count("or set LORACTL_REDIS_URL") == 2 and "Cannot connect" not in said and "Traceback" not in said
    assert store.jobs.get(1).message == "nothing is trained"
    (message,) = phone.requests
    assert message.json["title"].endswith(": failed (bad_data), nothing is trained")


@pytest.mark.long
def test_a_queue_that_answers_with_errors_stops_no_job_and_is_used_again(
    run_with: Callable[..., Cli], home: Path, tmp_path: Path
) -> None:
    """As after a failover to a replica, or on a full disk: Celery would end by itself."""
    cli = run_with(SLOW)
    store = Store(connect(load_settings(cli.environment)))
    worker = cli.start("worker", warm_start=True)
    try:
        cli("submit", write_job(tmp_path, HUB_MODEL), "--set=max_retries=0")
        _until(lambda: store.jobs.get(1).status is Status.RUNNING)
        queue = Redis(unix_socket_path=str(home / "run" / "valkey.sock"))
        queue.config_set("min-replicas-to-write", 1)
        time.sleep(5)
        assert store.jobs.get(1).status is Status.RUNNING and store.jobs.get(1).attempt == 1
        queue.config_set("min-replicas-to-write", 0)
        cli("cancel", 1)
        cli("submit", write_job(tmp_path, HUB_MODEL), "--set=max_retries=0")
        _until(lambda: store.jobs.get(2).status is Status.RUNNING)
    finally:
        worker.send_signal(signal.SIGINT)
        said, _ = worker.communicate(timeout=90)
    assert "is started again" not in said


def test_a_node_that_is_flooded_with_messages_asks_the_database_only_so_often(
    home: Path, make_cli: Callable[..., Cli]
) -> None:
    settings = load_settings(make_cli().environment)
    engine = connect(settings)
    store = Store(engine)
    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
    place = Workplace(
        settings=settings, store=store, artifacts=StoreClient(settings.artifacts_url), device=device, node="heron:0",
        drain=Drain(),

    )  # fmt: skip
    watch = Watch(device=device, node_pid=1)
    monitor = Monitor(place, DeviceRow(place, watch, NodeOptions(), max_jobs=1, box=BoxIdentity()))
    slots = Slots(place, watch, 1, changed=monitor.look_soon, overheard=monitor.pass_on)
    monitor.report()
    asked: list[str] = []
    event.listen(engine, "begin", lambda _: asked.append(threading.current_thread().name))
    began = time.monotonic()
    slots.start()
    monitor.start(slots)
    try:
        while time.monotonic() < began + 1.0:
            slots.wake()
            monitor.pass_on()
            time.sleep(0.0005)
    finally:
        monitor.stop()
        slots.close()
    lasted = time.monotonic() - began  # more than a second on a busy machine
    assert 1 <= asked.count("slot 0") <= lasted / CALM_S + 1
    assert asked.count("monitor") <= 40 * lasted, "five looks a second, and a round"


def test_a_message_that_finds_no_idle_slot_is_passed_on_to_the_card_that_has_room(
    home: Path, tmp_path: Path, make_cli: Callable[..., Cli]
) -> None:
    settings = load_settings(make_cli().environment)
    store = Store(connect(settings))
    for node in ("full:0", "free:0"):
        store.cards.see(node_state(node, total=8 * GIB, max_jobs=1))
    store.jobs.submit(submission(lora=4))
    held = store.attempts.claim("full:0")
    if not isinstance(held, Claim):  # the rule gave it to the other card
        held = store.attempts.claim("free:0")
    assert isinstance(held, Claim)
    busy, free = ("full:0", "free:0") if store.jobs.get(held.job_id).node == "full:0" else ("free:0", "full:0")
    store.jobs.submit(submission(lora=4))

    device = SimulatedDevice(index=0, uuid="SIM-0", name="sim", total=8 * GIB)
    place = Workplace(
        settings=settings, store=store, artifacts=StoreClient(settings.artifacts_url), device=device, node=busy,
        drain=Drain(),
    )  # fmt: skip
    watch = Watch(device=device, node_pid=1)
    row = DeviceRow(place, watch, NodeOptions(), max_jobs=1, box=BoxIdentity())
    monitor = Monitor(place, row)
    slots = Slots(place, watch, 0, changed=monitor.look_soon, overheard=monitor.pass_on)
    broker_url(settings)  # starts the embedded queue
    queue = Redis(unix_socket_path=str(home / "run" / "valkey.sock"))
    slots.wake()  # no slot is idle
    monitor.start(slots)
    try:
        _until(lambda: queue.llen(card_queue(free)) > 0)
        assert queue.llen(card_queue(busy)) == 0
    finally:
        monitor.stop()


def _until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.2)
