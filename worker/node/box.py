"""The nodes of this box as child processes: starts, watches, restarts and stops them."""

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
from typing import Any

from loractl.common.errors import ExitCode, LoractlError, SchemaMismatch
from loractl.common.job.status import Status
from loractl.common.placement.cards import TimeLeft
from loractl.common.placement.lines import served_classes
from loractl.common.queue.valkey import broker_url, embedded_runs, stop_unused
from loractl.common.settings import Settings
from loractl.common.store.database import REFUSALS, told_by
from loractl.common.store.store import Store
from loractl.common.store.tables import Node
from loractl.worker.device.devices import Device, find_device

from .lock import read_identity, served_by, unserved
from .terminal import LogHandler, Terminal

log = logging.getLogger("loractl.worker")

SHOWN_JOBS = 8
"""The last line names at most this many of the jobs that are left."""

IDLE_LOOKS = 2
"""--drain-when-idle ends the worker after this many looks in a row that find no job left."""

NODE_TRIES = 3
"""A worker gives up a node that fails this often in a row before it serves. A node that jobs kill does not count."""

WATCH_S = 10.0
"""How often the watchdog looks."""

STUCK_S = 90.0
"""A node that is silent for this long, or leaves a job that it should start waiting for this long, is asked to stop.
After as long again it is killed. Then it is restarted."""

FIND_AGAIN_S = 15.0
"""How often the worker looks again for cards that can't be read."""

KILL_AFTER_S = 15.0
"""How long the nodes have to give their jobs back after a second Ctrl-C."""

GRACE_USED = 0.9
"""The share of --grace that the jobs get. Nodes that did not stop within it are stopped at once in the rest."""


class Box:
    """`loractl worker`: a node for each device."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: list[Device],
        options: dict[str, Any],
        *,
        stops: dt.datetime | None = None,
        grace_s: float | None = None,
    ) -> None:
        """`stops`: when it begins to stop by itself; None: it stays. `grace_s`: how long that may take; None: any."""
        self._settings = settings
        self._stops = stops
        self._grace_s = None if grace_s is None else GRACE_USED * grace_s
        self._stop_until: float | None = None  # set while stopping: the deadline, after which it stops at once
        timed = {"grace_s": self._grace_s}
        if stops is not None:  # by the database's time, since this machine's clock may differ
            left_s = (stops - dt.datetime.now(dt.UTC)).total_seconds()
            timed |= {"until": store.now().timestamp() + left_s, "window_s": left_s}
        self._window_s = timed.get("window_s") or 0.0
        self._options = json.dumps({**options, **timed, "devices": len(devices)})
        self._terminal = Terminal()
        self._labels: dict[str, str] = options.get("labels") or {}
        self._store = store
        self._devices = devices
        self._nodes: dict[str, subprocess.Popen[str]] = {}
        self._stuck_since: dict[str, float] = {}
        self._asked: set[str] = set()  # nodes that were asked to stop because they are stuck
        self._started: dict[str, float] = {}  # when the node of a device was started
        # a node of a GPU never serves the processor, even if the driver disappears meanwhile
        kinds = {"auto": "cpu" if devices[0].kind == "cpu" else "nvml"}
        wanted = settings.devices or "auto"
        self._environment = {**os.environ, "LORACTL_DEVICES": kinds.get(wanted, wanted)}
        self._embedded_queue = False  # whether it was running when this worker began
        self._asked_to_stop = False
        self._given_up: set[str] = set()  # devices whose nodes end after every start
        self._began: dt.datetime | None = None  # the first look for --drain-when-idle, by the database's clock
        self._looked_at = time.monotonic()  # for cards that could not be read
        self._failures = {device.number: 0 for device in devices}  # failed starts in a row

    def run(self, drain_when_idle: bool) -> int:
        """Serve until Ctrl-C or SIGTERM, or until no job is left; returns the exit code."""
        self._embedded_queue = embedded_runs(self._settings)
        handler = LogHandler(self._terminal)
        logging.getLogger().addHandler(handler)
        try:
            return self._serve(drain_when_idle)
        finally:
            stop_unused(self._settings)
            logging.getLogger().removeHandler(handler)
            self._terminal.flush()

    def _serve(self, drain_when_idle: bool) -> int:
        def interrupted(*_: Any) -> None:
            self._asked_to_stop = True  # psycopg may raise its connection error instead of the KeyboardInterrupt
            raise KeyboardInterrupt

        def noticed(*_: Any) -> None:
            if not self._asked_to_stop:  # a repeated notice changes nothing: only Ctrl-C or SIGTERM stops at once
                interrupted()

        for number in (signal.SIGINT, signal.SIGTERM):  # systemd's stop counts as a first Ctrl-C
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
            try:  # a second one may come as soon as a person reads the line
                broken = self._serves_nothing()
                self._terminal.say("Stopping after a checkpoint; Ctrl-C again stops at once.")
                self._drain()
            except KeyboardInterrupt:
                ended = self._stop_now()
                with contextlib.suppress(LoractlError, *REFUSALS):  # rows that stay soon count as silent
                    self._forget(ended)
                return ExitCode.INTERRUPTED
        self._forget([device.number for device in self._devices])
        return ExitCode.FAILED if broken else ExitCode.OK

    def _forget(self, ended: Collection[str]) -> None:
        """Remove the rows of nodes that have ended, so that no command shows them as stopping."""
        identity = read_identity(self._settings)
        for device in (device for device in self._devices if device.number in ended):
            with unserved(self._settings, device) as free:
                if free:  # else another worker serves it, and the row is that worker's
                    self._store.cards.forget(self._name(device), identity)

    def _start(self, number: str) -> None:
        # A session of its own: the terminal's Ctrl-C reaches only this process, which then decides.
        self._started[number] = time.monotonic()
        self._asked.discard(number)  # only the node before it was asked
        self._nodes[number] = subprocess.Popen(
            [sys.executable, "-m", "loractl.worker.node", "--index", number, "--options", self._options],
            env=self._environment,
            start_new_session=True,
            stdin=subprocess.PIPE,  # carries our orders; when it closes, the node knows that we are gone
            stdout=subprocess.DEVNULL,  # a node logs to stderr; stdout has only what Celery prints at its shutdown
            encoding="utf-8",
        )

    def _wait(self, drain_when_idle: bool) -> bool:
        """Watch until no job is left, and restart nodes that end by themselves. True when no node can be started."""
        idle, watched = 0, time.monotonic()
        while idle < IDLE_LOOKS:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            if self._over:
                self._terminal.say("Stopping after a checkpoint: the worker's time is over.")
                return False
            time.sleep(1)
            if time.monotonic() - watched >= WATCH_S:
                watched = time.monotonic()
                self._keep_queue()
                try:
                    self._restart_stuck()
                except Exception:
                    log.exception("the watchdog failed, it looks again")  # raising would end every node of the box
            if self._restart_ended():
                return True
            self._find_again()
            if drain_when_idle:
                try:
                    idle = idle + 1 if self._nothing_left() else 0
                except SchemaMismatch:
                    pass  # the nodes say so, and end
                except REFUSALS as error:
                    self._terminal.say(f"The database does not answer: {told_by(error)}")
        return False

    @property
    def _over(self) -> bool:
        """Whether its time is over. By the wall clock: a machine may have slept."""
        return self._stops is not None and dt.datetime.now(dt.UTC) >= self._stops

    def _keep_queue(self) -> None:
        """Restart an embedded queue that has ended since the worker began: no command would start it."""
        try:
            if self._embedded_queue:
                broker_url(self._settings)
        except LoractlError as error:
            log.warning("%s", error.sentence)

    def _nothing_left(self) -> bool:
        """Whether no job runs, and no job waits that fits a device of this box that takes jobs.

        False until all nodes have reported their devices: before that, no row says what several cards could hold.
        """
        self._began = self._began or self._store.now()
        told = {row.node for row in self._store.cards.nodes(self._settings.host) if row.seen_at >= self._began}
        if any(self._name(d) not in told for d in self._devices if d.number not in self._given_up):
            return False
        closed = self._drained()
        taking = [d.total for d in self._devices if d.number not in self._given_up and self._name(d) not in closed]
        largest = max(taking, default=None)
        if self._stops is None:
            return not self._store.jobs.has_unfinished(largest, self._labels)
        left_s = (self._stops - dt.datetime.now(dt.UTC)).total_seconds()
        time_left = TimeLeft(host=self._settings.host, seconds=left_s, window_s=self._window_s)
        return not self._store.jobs.has_unfinished(largest, self._labels, time_left)

    def _drained(self) -> list[str]:
        drains, names = self._store.cards.drains(), [self._name(device) for device in self._devices]
        return names if self._settings.host in drains else [name for name in names if name in drains]

    def _tell_of_the_rest(self) -> None:
        """Print the last line, with the jobs that are left because they don't fit this box."""
        with contextlib.suppress(*REFUSALS):
            left = self._store.jobs.matching(statuses=[Status.QUEUED])
            held = [job.job_id for job in left if job.held or job.awaits is not None]
            others = [job.job_id for job in left if job.job_id not in held]
            closed = "".join(f", or for {name}, which is drained" for name in self._drained())
            longer = "" if self._stops is None else ", or for a worker that stays longer"
            one = len(others) == 1
            who = f"{_numbers(others)} {'waits' if one else 'wait'} for another box{closed}{longer}"
            told = [who] if others else []
            told += [f"{_numbers(held)} {'is' if len(held) == 1 else 'are'} held"] if held else []
            self._terminal.say(f"No job that fits this box is left: {', '.join(told)}." if told else "No job is left.")

    def _serves_nothing(self) -> bool:
        """Whether every device's node was refused at its last start, for example because another box has its name."""

        def refused(number: str) -> bool:
            return self._failures[number] > 0 or self._nodes[number].poll() not in (None, 0)

        served = {device.number: served_by(self._settings, device) for device in self._devices}
        return all(refused(number) and pid != self._nodes[number].pid for number, pid in served.items())

    def _restart_ended(self) -> bool:
        """Restart nodes that ended by themselves; True when every device's node ends after every start.

        A single node that does is given up, so that the nodes of other cards go on.
        """
        for device in self._devices:
            number, process = device.number, self._nodes[device.number]
            if process.poll() is None or number in self._given_up:
                continue
            served = served_by(self._settings, device) == process.pid
            self._failures[number] = 0 if served else self._failures[number] + 1
            if process.returncode == os.EX_NOPERM:  # this login, or this version, may not serve
                self._terminal.say(f"Error: node {number} is refused; see above.")
                self._failures[number] = NODE_TRIES + 1
            if self._failures[number] == NODE_TRIES:
                self._terminal.say(f"Error: node {number} ended {NODE_TRIES} times just after its start; see above.")
            if self._failures[number] >= NODE_TRIES:
                self._given_up.add(number)
                if len(self._given_up) == len(self._devices):
                    return True
                continue
            self._terminal.say(f"Node {number} ended with status {process.returncode} and is started again.")
            time.sleep(2)
            self._start(number)
        return False

    def _find_again(self) -> None:
        """Look again for cards that could not be read when the worker started: their nodes know neither UUID nor size.

        When such a card can be read, its node is asked to stop: it has no jobs, and restarts with what is known then.
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
        """The watchdog: stop nodes that are silent, or do not start the job that the rule gives them, for a restart."""
        try:
            if not self._store.takes_writes():
                self._stuck_since.clear()  # a node that can't write its row is not stuck
                return
            rows, asked_at = {row.node: row for row in self._store.cards.nodes(self._settings.host)}, self._store.now()
            given = self._given(rows.values())
        except REFUSALS:
            self._stuck_since.clear()  # without the database, no node counts as stuck
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
            self._terminal.say(f"Node {device.number} {what} and is restarted.")
            self._stuck_since.pop(device.number, None)
            if device.number in self._asked:
                process.kill()  # its trainers end with it; the restarted node gives their jobs back
            else:
                self._tell(process, "alone")
                process.terminate()  # it saves its running jobs and gives them back
                self._asked.add(device.number)

    def _given(self, rows: Iterable[Node]) -> set[str]:
        """The nodes to which the rule gives a waiting job. Asks the rule only if a job waits that may fit this box."""
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
            self._terminal.say("The time for the stop is over: running jobs end at once.")
            self._stop_now()

    def _stop_now(self) -> list[str]:
        """Stop the nodes at once; returns the devices whose nodes gave their jobs back."""
        for process in self._nodes.values():
            self._tell(process, "now")
        deadline, ended = time.monotonic() + KILL_AFTER_S, []
        for number, process in self._nodes.items():
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
                ended.append(number)
            except subprocess.TimeoutExpired:
                process.kill()  # its trainer ends when its stdin closes; the job returns when the lease expires
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


def _numbers(job_ids: Sequence[int]) -> str:
    """The jobs by number, oldest first; of many jobs, the first ones and the count of the others."""
    first = sorted(job_ids)[:SHOWN_JOBS]
    more = f" and {len(job_ids) - len(first)} more" if len(job_ids) > len(first) else ""
    return f"job{'' if len(job_ids) == 1 else 's'} {', '.join(map(str, first))}{more}"
