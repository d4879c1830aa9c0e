"""The nodes of this box as child processes: started, watched, started again, stopped."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import ExitCode, LoractlError
from loractl.common.placement.cards import TimeLeft
from loractl.common.placement.lines import served_classes
from loractl.common.queue.valkey import broker_url, embedded_runs, stop_unused
from loractl.worker.device.devices import find_device

from .box_identity import read_identity
from .lock import served_by, unserved

if TYPE_CHECKING:
    from loractl.common.settings import Settings
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Node
    from loractl.worker.device.devices import Device

    from .window import Window

log = logging.getLogger("loractl.worker")

SHOWN_JOBS = 8
"""So many of the jobs that are left are named."""

IDLE_LOOKS = 2
"""--drain-when-idle ends after so many looks in a row without a job left."""

NODE_TRIES = 3
"""A worker ends when a node fails so often in a row before it serves. A node that jobs kill does not count."""

WATCH_S = 10.0
"""How often the watchdog looks."""

STUCK_S = 90.0
"""A node that is silent for so long, or leaves a job of its own waiting for so long, is asked to stop. After as long
again it is killed. Then it is started again."""

FIND_AGAIN_S = 15.0
"""How often cards that can't be read are looked for again."""

KILL_AFTER_S = 15.0
"""After a second Ctrl-C the nodes have so long to give their jobs back."""

GRACE_USED = 0.9
"""Of --grace, for the jobs. The rest is for nodes that did not stop in it, and are stopped at once."""


class Box:
    """`loractl worker`: a node for each device."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: list[Device],
        options: dict[str, Any],
        *,
        window: Window | None = None,
        grace_s: float | None = None,
    ) -> None:
        """`window`: when it stops by itself; None: it stays. `grace_s`: how long a stop may take; None: as it needs."""
        self._settings = settings
        self._window = window
        self._grace_s = None if grace_s is None else GRACE_USED * grace_s
        self._stop_until: float | None = None  # a stop is on its way, and then it becomes one at once
        timed = {"grace_s": self._grace_s, **({} if window is None else _timed(window, store))}
        self._window_s = timed.get("window_s") or 0.0
        self._options = json.dumps({**options, **timed, "devices": len(devices)})
        self._labels: dict[str, str] = options.get("labels") or {}
        self._store = store
        self._devices = devices
        self._nodes: dict[str, subprocess.Popen[str]] = {}
        self._stuck_since: dict[str, float] = {}
        self._asked: set[str] = set()  # nodes that were told to stop because they are stuck
        self._started: dict[str, float] = {}  # when the node of a device was started
        # a node of a GPU never serves the processor, though the driver may go meanwhile
        kinds = {"auto": "cpu" if devices[0].kind == "cpu" else "nvml"}
        wanted = settings.devices or "auto"
        self._environment = {**os.environ, "LORACTL_DEVICES": kinds.get(wanted, wanted)}
        self._embedded_queue = False  # it was there when this worker began
        self._asked_to_stop = False
        self._given_up: set[str] = set()  # devices whose nodes end at every start
        self._began: dt.datetime | None = None  # the first look for --drain-when-idle, by the database's clock
        self._looked_at = time.monotonic()  # for cards that could not be read
        self._failures = {device.number: 0 for device in devices}  # failed starts in a row

    def run(self, drain_when_idle: bool) -> int:
        """Serve until Ctrl-C or SIGTERM, or until no job is left; returns the exit code."""
        self._embedded_queue = embedded_runs(self._settings)
        try:
            return self._serve(drain_when_idle)
        finally:
            stop_unused(self._settings)

    def _serve(self, drain_when_idle: bool) -> int:
        from loractl.common.store.database import REFUSALS

        def interrupted(*_: Any) -> None:
            self._asked_to_stop = True  # psycopg may raise its connection's error in place of what interrupts it
            raise KeyboardInterrupt

        def noticed(*_: Any) -> None:
            if not self._asked_to_stop:  # however often: what stops at once is a Ctrl-C or SIGTERM after it
                interrupted()

        for number in (signal.SIGINT, signal.SIGTERM):  # systemd's stop is a first Ctrl-C
            signal.signal(number, interrupted)
        signal.signal(signal.SIGUSR1, noticed)
        for device in self._devices:
            self._start(device.number)
        try:
            broken = self._wait(drain_when_idle) or self._serves_nothing()
            self._drain()
            if drain_when_idle and not broken and not self._over:
                self._tell_of_the_rest()
        except KeyboardInterrupt:
            try:  # a second one may come as soon as a person reads of it
                broken = self._serves_nothing()
                click.echo("Stopping after a checkpoint; Ctrl-C again stops at once.", err=True)
                self._drain()
            except KeyboardInterrupt:
                ended = self._stop_now()
                with contextlib.suppress(LoractlError, *REFUSALS):  # what is left there is soon taken for silent
                    self._forget(ended)
                return ExitCode.INTERRUPTED
        self._forget([device.number for device in self._devices])
        return ExitCode.FAILED if broken else ExitCode.OK

    def _forget(self, ended: Collection[str]) -> None:
        """Remove the rows of nodes that have ended: what is not served is not being stopped."""
        identity = read_identity(self._settings)
        for device in (device for device in self._devices if device.number in ended):
            with unserved(self._settings, device) as free:
                if free:  # else it is served for another worker, whose row and bases these are
                    self._store.cards.forget(self._name(device), identity)

    def _start(self, number: str) -> None:
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which then decides.
        self._started[number] = time.monotonic()
        self._nodes[number] = subprocess.Popen(
            [sys.executable, "-m", "loractl.worker.node", "--index", number, "--options", self._options],
            env=self._environment,
            start_new_session=True,
            stdin=subprocess.PIPE,  # our orders; its end tells the node that we are gone
            stdout=subprocess.DEVNULL,  # a node logs to stderr; here would be Celery's words at its shutdown
            encoding="utf-8",
        )

    def _wait(self, drain_when_idle: bool) -> bool:
        """Watch until no job is left; start a node that ends by itself again. True when a node can't be started."""
        from loractl.common.store.database import REFUSALS, told_by

        idle, watched = 0, time.monotonic()
        while idle < IDLE_LOOKS:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            if self._over:
                click.echo("Stopping after a checkpoint: its time is over.", err=True)
                return False
            time.sleep(1)
            if time.monotonic() - watched >= WATCH_S:
                watched = time.monotonic()
                self._keep_queue()
                try:
                    self._restart_stuck()
                except Exception:
                    log.exception("the watchdog failed, it looks again")  # its end would end every node of the box
            if self._restart_ended():
                return True
            self._find_again()
            if drain_when_idle:
                try:
                    idle = idle + 1 if self._nothing_left() else 0
                except REFUSALS as error:
                    click.echo(f"The database does not answer: {told_by(error)}", err=True)
        return False

    @property
    def _over(self) -> bool:
        """Whether its window is. By the calendar: a machine may have slept."""
        return self._window is not None and dt.datetime.now(dt.UTC) >= self._window.stops

    def _keep_queue(self) -> None:
        """Start an embedded queue again that has ended since the worker began: commands start none."""
        try:
            if self._embedded_queue:
                broker_url(self._settings)
        except LoractlError as error:
            log.warning("%s", error.sentence)

    def _nothing_left(self) -> bool:
        """Whether no job runs, and none waits that a device of this box could hold which takes jobs.

        Not before its nodes have told of their devices: until then no row says what several of them could hold.
        """
        self._began = self._began or self._store.now()
        told = {row.node for row in self._store.cards.nodes(self._settings.host) if row.seen_at >= self._began}
        if any(self._name(d) not in told for d in self._devices if d.number not in self._given_up):
            return False
        closed = self._drained()
        taking = [d.total for d in self._devices if d.number not in self._given_up and self._name(d) not in closed]
        largest = max(taking, default=None)
        if self._window is None:
            return not self._store.jobs.has_unfinished(largest, self._labels)
        left_s = (self._window.stops - dt.datetime.now(dt.UTC)).total_seconds()
        time_left = TimeLeft(host=self._settings.host, seconds=left_s, window_s=self._window_s)
        return not self._store.jobs.has_unfinished(largest, self._labels, time_left)

    def _drained(self) -> list[str]:
        drains, names = self._store.cards.drains(), [self._name(device) for device in self._devices]
        return names if self._settings.host in drains else [name for name in names if name in drains]

    def _tell_of_the_rest(self) -> None:
        """The last line: the jobs that are left, though none of them is for this box."""
        from loractl.common.job.status import Status
        from loractl.common.store.database import REFUSALS

        with contextlib.suppress(*REFUSALS):
            left = self._store.jobs.matching(statuses=[Status.QUEUED])
            held = [job.job_id for job in left if job.held]
            others = [job.job_id for job in left if not job.held]
            closed = "".join(f", or for {name}, which is drained" for name in self._drained())
            longer = "" if self._window is None else ", or for a worker that stays longer"
            one = len(others) == 1
            told = [f"{_numbers(others)} wait{'s' if one else ''} for another box{closed}{longer}"] if others else []
            told += [f"{_numbers(held)} {'is' if len(held) == 1 else 'are'} held"] if held else []
            if told:
                click.echo(f"No job that fits this box is left: {', '.join(told)}.", err=True)

    def _serves_nothing(self) -> bool:
        """Whether the node of every device was refused when it started last, as for a name that another box has."""

        def refused(number: str) -> bool:
            return self._failures[number] > 0 or self._nodes[number].poll() not in (None, 0)

        served = {device.number: served_by(self._settings, device) for device in self._devices}
        return all(refused(number) and pid != self._nodes[number].pid for number, pid in served.items())

    def _restart_ended(self) -> bool:
        """Start nodes again that ended by themselves; True when each ends at every start.

        One that does is left alone: it must not end the nodes of other cards.
        """
        for device in self._devices:
            number, process = device.number, self._nodes[device.number]
            if process.poll() is None or number in self._given_up:
                continue
            served = served_by(self._settings, device) == process.pid
            self._failures[number] = 0 if served else self._failures[number] + 1
            if process.returncode == os.EX_NOPERM:  # this login may not serve, and a next start may not either
                click.echo(f"Error: node {number} is refused; see above.", err=True)
                self._failures[number] = NODE_TRIES + 1
            if self._failures[number] == NODE_TRIES:
                click.echo(f"Error: node {number} ended {NODE_TRIES} times just after its start; see above.", err=True)
            if self._failures[number] >= NODE_TRIES:
                self._given_up.add(number)
                if len(self._given_up) == len(self._devices):
                    return True
                continue
            click.echo(f"Node {number} ended with status {process.returncode} and is started again.", err=True)
            time.sleep(2)
            self._start(number)
        return False

    def _find_again(self) -> None:
        """Look again for cards that could not be read when the worker started: their nodes know neither UUID nor size.

        A node that is asked to stop has no jobs, and is started again with what is there then.
        """
        if time.monotonic() - self._looked_at < FIND_AGAIN_S:
            return
        self._looked_at = time.monotonic()
        for place, device in enumerate(self._devices):
            if device.total == 0:
                found = find_device(self._settings, device.number)
                if found.kind == device.kind and found.total:
                    self._devices[place] = found
                    self._nodes[device.number].terminate()

    def _restart_stuck(self) -> None:
        """The watchdog: stop a node that is silent, or leaves what the rule gives it; then it is started again."""
        from loractl.common.store.database import REFUSALS

        try:
            if not self._store.takes_writes():
                self._stuck_since.clear()  # a node that can't write its row is not stuck
                return
            rows, asked_at = {row.node: row for row in self._store.cards.nodes(self._settings.host)}, self._store.now()
            given = self._given(rows.values())
        except REFUSALS:
            self._stuck_since.clear()  # this can't be told then
            return
        now = time.monotonic()
        for device in self._devices:
            node, process = self._name(device), self._nodes[device.number]
            row = rows.get(node)
            silent = row is None or (asked_at - row.seen_at).total_seconds() > STUCK_S
            if (not silent and node not in given) or process.poll() is not None:
                self._stuck_since.pop(device.number, None)
                continue
            since = self._stuck_since.setdefault(device.number, now)
            if now - since < STUCK_S or now - self._started[device.number] < 2 * STUCK_S:
                continue
            what = "says nothing" if silent else "leaves a job waiting that it should start"
            click.echo(f"Node {device.number} {what} and is restarted.", err=True)
            self._stuck_since.pop(device.number, None)
            if device.number in self._asked:
                process.kill()  # its trainers end with it; the next node gives their jobs back
            else:
                self._tell(process, "alone")
                process.terminate()  # what runs is saved and given back
            self._asked ^= {device.number}

    def _given(self, rows: Iterable[Node]) -> set[str]:
        """The nodes to which the rule gives a waiting job; it is asked only where one waits that may fit this box."""
        fitting = {size for row in rows for size in served_classes(row.free)}
        if not self._store.jobs.waiting_classes(fitting):
            return set()
        return {d.placed.node for d in self._store.cards.fleet().decisions if d.placed is not None}

    def _drain(self) -> None:
        for process in self._nodes.values():
            if process.poll() is None:
                process.terminate()
        if self._grace_s is None:
            for process in self._nodes.values():
                process.wait()
            return
        self._stop_until = self._stop_until or time.monotonic() + self._grace_s
        try:
            for process in self._nodes.values():
                process.wait(timeout=max(0.1, self._stop_until - time.monotonic()))
        except subprocess.TimeoutExpired:
            click.echo("Its time to stop is over: what runs ends at once.", err=True)
            self._stop_now()

    def _stop_now(self) -> list[str]:
        """The devices whose nodes gave their jobs back."""
        for process in self._nodes.values():
            self._tell(process, "now")
        deadline, ended = time.monotonic() + KILL_AFTER_S, []
        for number, process in self._nodes.items():
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
                ended.append(number)
            except subprocess.TimeoutExpired:
                process.kill()  # its trainer ends with its stdin; the lease gives the job back
        return ended

    def _tell(self, process: subprocess.Popen[str], order: str) -> None:
        assert process.stdin
        try:
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
        except BrokenPipeError:
            log.debug("the node had ended before it could be told %s", order)

    def _name(self, device: Device) -> str:
        return f"{self._settings.host}:{device.number}"


def _timed(window: Window, store: Store) -> dict[str, float]:
    """The window as nodes get it: in its row stands the database's time, whatever this machine's clock says."""
    left_s = (window.stops - dt.datetime.now(dt.UTC)).total_seconds()
    return {"until": store.now().timestamp() + left_s, "window_s": left_s}


def _numbers(job_ids: Sequence[int]) -> str:
    """The jobs' numbers, the oldest first; of many the first ones and how many more there are."""
    first = sorted(job_ids)[:SHOWN_JOBS]
    more = f" and {len(job_ids) - len(first)} more" if len(job_ids) > len(first) else ""
    return ", ".join(map(str, first)) + more
