"""loractl worker: a node for each device of this box, watched."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import ExitCode

if TYPE_CHECKING:
    from loractl.common.settings import Settings
    from loractl.common.store.store import Store
    from loractl.worker.device.devices import Device

IDLE_LOOKS = 2
"""So many looks in a row must find nothing left before --drain-when-idle ends."""

NODE_TRIES = 3
"""A node that ends so often within START_S of its start is broken, and so is this worker."""

START_S = 20.0

WATCH_S = 10.0
"""How often the watchdog looks."""

STUCK_S = 90.0
"""A node that is silent so long, or leaves a job so long that is for it, is asked to stop, and after as long again
killed; then it is started anew."""

KILL_AFTER_S = 15.0
"""After a second Ctrl-C the nodes have so long to give their jobs back."""


@click.command()
@click.option("--gpus", metavar="LIST", help="Serve only these cards, by index or UUID, like 0,2.")
@click.option("--reserve", metavar="SIZE", default="512MiB", show_default=True, help="Keep so much free on each card.")
@click.option(
    "--high-water",
    metavar="TIME",
    default="10min",
    show_default=True,
    help="Leave other people's programs, for so long, the most that they held.",
)
@click.option(
    "--max-jobs-per-gpu",
    type=click.IntRange(1, 64),
    envvar="LORACTL_MAX_JOBS_PER_GPU",
    show_envvar=True,
    help="Jobs that may share a card.  [default: 1 below 40 GiB, else 4]",
)
@click.option(
    "--max-jobs-per-user",
    type=click.IntRange(1),
    envvar="LORACTL_MAX_JOBS_PER_USER",
    show_envvar=True,
    help="Jobs that one person may run at a time; the smallest of all workers' limits holds.",
)
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="What resources.node_labels may ask for.")
@click.option("--drain-when-idle", is_flag=True, help="End when no job that fits this box is left.")
def worker(
    gpus: str | None,
    reserve: str,
    high_water: str,
    max_jobs_per_gpu: int | None,
    max_jobs_per_user: int | None,
    labels: tuple[str, ...],
    drain_when_idle: bool,
) -> None:
    """Serve this box's devices: claim waiting jobs that fit and train them.

    Ctrl-C stops after a checkpoint and gives the jobs back; a second one stops at once.
    """
    from loractl.common.artifacts import open_store
    from loractl.common.queue.valkey import broker_url
    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect
    from loractl.common.store.store import Store
    from loractl.common.units import gib
    from loractl.worker.device.devices import find_devices

    settings = load_settings()
    options = {
        "margin": _size(reserve),
        "high_water_s": _seconds(high_water),
        "max_jobs": max_jobs_per_gpu,
        "user_limit": max_jobs_per_user,
        "labels": _labels(labels),
    }
    store = Store(connect(settings))
    open_store(settings)
    broker_url(settings)
    devices = find_devices(settings, gpus)
    for device in devices:
        click.echo(f"Serving {device.name}, {gib(device.total)} GiB.", err=True)
    click.echo("Ctrl-C stops after a checkpoint and gives running jobs back.", err=True)
    sys.exit(_Box(settings, store, devices, {**options, "devices": len(devices)}).run(drain_when_idle))


def _size(text: str) -> int:
    from loractl.common.errors import UsageError
    from loractl.common.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--reserve: {text!r} {error}") from None


def _seconds(text: str) -> float:
    from loractl.common.errors import UsageError
    from loractl.common.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--high-water: {text!r} {error}") from None


def _labels(pairs: tuple[str, ...]) -> dict[str, str]:
    from loractl.common.errors import UsageError

    for pair in pairs:
        if "=" not in pair or not pair.isprintable():
            raise UsageError(f"--label {pair} is not of the form KEY=VALUE", "like --label nvlink=yes")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


class _Box:
    """The nodes of this box as child processes."""

    def __init__(self, settings: Settings, store: Store, devices: list[Device], options: dict[str, Any]) -> None:
        self._settings = settings
        self._options = json.dumps(options)
        self._store = store
        self._devices = devices
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._stuck_since: dict[int, float] = {}
        self._asked: set[int] = set()  # nodes that were told to stop because they are stuck
        self._started: dict[int, list[float]] = {device.index: [] for device in devices}

    def run(self, drain_when_idle: bool) -> int:
        import signal

        def terminated(*_: Any) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, terminated)  # systemd's stop is a first Ctrl-C
        for device in self._devices:
            self._start(device.index)
        try:
            broken = self._wait(drain_when_idle)
            self._drain()
        except KeyboardInterrupt:
            click.echo("Stopping after a checkpoint; Ctrl-C again stops at once.", err=True)
            try:
                self._drain()
            except KeyboardInterrupt:
                self._stop_now()
                return ExitCode.INTERRUPTED
            broken = False
        for device in self._devices:
            self._forget(device)
        return ExitCode.FAILED if broken else ExitCode.OK

    def _start(self, index: int) -> None:
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which then decides.
        self._started[index].append(time.monotonic())
        self._nodes[index] = subprocess.Popen(
            [sys.executable, "-m", "loractl.worker.node", "--index", str(index), "--options", self._options],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a node logs to stderr; here would be Celery's words at its shutdown
        )

    def _wait(self, drain_when_idle: bool) -> bool:
        """Until nothing is left; a node that ends by itself is started again. True when one can't be."""
        from sqlalchemy.exc import DBAPIError

        largest, idle, watched = max(d.total for d in self._devices), 0, time.monotonic()
        while idle < IDLE_LOOKS:
            time.sleep(1)
            if time.monotonic() - watched >= WATCH_S:
                watched = time.monotonic()
                self._restart_stuck()
            for index, process in list(self._nodes.items()):
                if process.poll() is None:
                    continue
                tries = self._started[index][-NODE_TRIES:]
                if len(tries) == NODE_TRIES and time.monotonic() - tries[0] < NODE_TRIES * START_S:
                    click.echo(
                        f"Error: node {index} ended {NODE_TRIES} times just after its start; see above.", err=True
                    )
                    return True
                click.echo(f"Node {index} ended with status {process.returncode} and is started again.", err=True)
                time.sleep(2)
                self._start(index)
            if drain_when_idle:
                try:
                    idle = idle + 1 if self._store.unfinished(largest) == 0 else 0
                except DBAPIError as error:
                    click.echo(f"The database is away: {error.orig}", err=True)
        return False

    def _restart_stuck(self) -> None:
        """The watchdog: a node that is silent, or leaves what the rule gives it, is killed; _wait starts it again."""
        from sqlalchemy.exc import DBAPIError

        try:
            view = self._store.fleet()
        except DBAPIError:
            return  # without the database nobody can tell, and a node without it is not stuck
        now = time.monotonic()
        given = {d.placed.node for d in view.decisions if d.placed is not None}
        for device in self._devices:
            node, process = self._name(device), self._nodes[device.index]
            row = view.nodes.get(node)
            silent = row is None or (view.now - row.seen_at).total_seconds() > STUCK_S
            if (not silent and node not in given) or process.poll() is not None:
                self._stuck_since.pop(device.index, None)
                continue
            since = self._stuck_since.setdefault(device.index, now)
            if now - since < STUCK_S or now - self._started[device.index][-1] < 2 * STUCK_S:
                continue
            what = "says nothing" if silent else "leaves a job waiting that is for it"
            click.echo(f"Node {device.index} {what} and is started anew.", err=True)
            self._stuck_since.pop(device.index, None)
            if device.index in self._asked:
                process.kill()  # its trainers end with it; the lease gives their jobs back
            else:
                process.terminate()  # what runs is saved and given back
            self._asked ^= {device.index}

    def _drain(self) -> None:
        for process in self._nodes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._nodes.values():
            process.wait()

    def _stop_now(self) -> None:
        from loractl.worker.attempt.supervisor import Drain

        for device in self._devices:
            Drain(self._settings.runtime_dir / f"drain-{device.uuid}").ask("now")
        deadline = time.monotonic() + KILL_AFTER_S
        for process in self._nodes.values():
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # its trainer ends with its stdin; the lease gives the job back

    def _forget(self, device: Device) -> None:
        self._store.forget_node(self._name(device))

    def _name(self, device: Device) -> str:
        return f"{self._settings.host}:{device.index}"
