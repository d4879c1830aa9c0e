"""A lab in the test's process: the nodes of some boxes with all their threads, on a clock that the test holds.

Real are the database, the artifact store's files, the pipes to the trainers, and what they say. Trainers are threads
(`quick_trainer`). There is no `loractl worker`, no queue and no process to be killed: tests/acceptance has these.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import queue
import select
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import LoractlError, ServiceUnreachable
from loractl.common.job.file import load_spec
from loractl.common.job.status import Reason
from loractl.common.queue.hints import HintQueues
from loractl.common.settings import Settings, load_settings
from loractl.common.store import store as opened
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import GIB
from loractl.scheduler.cli.main import cli
from loractl.scheduler.submit.data import store_data
from loractl.scheduler.submit.need import own_devices, plan_job
from loractl.worker.attempt.storage.client import CallWatch, StoreClient, carry_out
from loractl.worker.attempt.workplace import Drain, Wish, Workplace
from loractl.worker.device.devices import Device, find_devices
from loractl.worker.device.snapshot import Process, Snapshot
from loractl.worker.node.monitor import NodeOptions
from loractl.worker.node.node import DeviceNode, place_of
from loractl.worker.protocol.messages import Again, Ended, Start, Stop, Told, decode_order, encode
from loractl.worker.recipe.orders import EXIT_ORPHANED, StopOrder

from .held_clock import HeldClock
from .models import CONFIG, write_job
from .quick_trainer import Sleep, Tell, train

LEASE_S = 3  # the shortest there is

NO_QUEUE = "redis://127.0.0.1:1"

NO_PROCESS = itertools.count(1 << 23)
"""Numbers that Linux gives to no process."""

Train = Callable[[Start, StopOrder, Tell, Sleep], Ended | Again]


class _Killed(Exception):
    """The trainer has no supervisor any more."""


class _Pipe:
    """The end of a pipe that a thread without the clock reads. It is quiet while its reader waits for the next byte."""

    def __init__(self, end: int) -> None:
        self._end = end
        self._rest = b""
        self._waits = False
        self._over = False
        self._open = threading.Lock()

    def quiet(self) -> bool:
        with self._open:  # a look at a pipe that its reader closes just then would end the clock
            # in this order: a reader that takes the last bytes in between does not wait until it has handed them on
            return self._over or (not select.select([self._end], [], [], 0)[0] and self._waits)

    def readline(self, limit: int = 1 << 20) -> str:
        while b"\n" not in self._rest[:limit] and len(self._rest) < limit and not self._over:
            self._waits = True
            select.select([self._end], [], [])
            self._waits = False
            found = os.read(self._end, 1 << 16)
            self._rest += found
            if not found:
                with self._open:
                    os.close(self._end)
                    self._over = True
        line, newline, _ = self._rest[:limit].partition(b"\n")
        self._rest = self._rest[len(line + newline) :]
        return (line + newline).decode("utf-8", "replace")


class TrainerThread:
    """What a supervisor sees of a trainer process: its pipes and its end."""

    def __init__(self, clock: HeldClock, does: Train, began: Callable[[Start], None]) -> None:
        self.pid = next(NO_PROCESS)
        self.returncode: int | None = None
        self._clock, self._does, self._began = clock, does, began
        (orders, ordered), (told, self._told), (printed, self._printed) = os.pipe(), os.pipe(), os.pipe()
        self.stdin = os.fdopen(ordered, "w", encoding="utf-8")
        self.stdout, self.stderr, self._orders = _Pipe(told), _Pipe(printed), _Pipe(orders)
        self._start: queue.SimpleQueue[Start] = queue.SimpleQueue()
        self._stop = StopOrder()
        self._orphaned, self._ended = threading.Event(), threading.Event()
        for pipe in (self.stdout, self.stderr, self._orders):
            clock.watch(pipe.quiet)
        threading.Thread(target=self._read, name="orders", daemon=True).start()
        clock.start(self._live, "trainer")

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """In real time, as for any process: it ends at once when its input does."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("trainer", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def _read(self) -> None:
        while line := self._orders.readline():
            order = decode_order(line)
            if isinstance(order, Start):
                self._start.put(order)
            elif isinstance(order, Stop):
                self._stop.give(order)
        self._orphaned.set()

    def _live(self) -> None:
        try:
            while self._start.empty():
                self._sleep(0.001)
            order = self._start.get()
            self._began(order)
            self._tell(self._does(order, self._stop, self._tell, self._sleep))
            status = 0
        except _Killed:
            status = EXIT_ORPHANED
        os.close(self._told)
        os.close(self._printed)
        self.returncode = status
        self._ended.set()

    def _sleep(self, seconds: float) -> None:
        if self._clock.wait(self._orphaned, seconds):
            raise _Killed

    def _tell(self, message: Told) -> None:
        os.write(self._told, encode(message).encode())


class _NearStore(StoreClient):
    """The artifact store without the processes for its calls, whose start takes half a second of a processor."""

    def _ask(self, name: str, *arguments: Any) -> Any:
        plain = json.loads(json.dumps(arguments))  # what crosses the pipe
        return carry_out(ArtifactStore(self.url, mark=self.mark), name, plain)

    def watched(self, watch: CallWatch) -> StoreClient:
        return self


@dataclass(kw_only=True)
class ShownCard:
    """A card that shows a test's values, as NVML does: for HeldLab.start."""

    number: str = "0"
    uuid: str = "GPU-aaaa"
    name: str = "NVIDIA Stand-in"
    kind: Literal["nvml"] = "nvml"
    trains_on: Literal["cpu"] = "cpu"
    total: int = 24 * GIB
    load: int = 0
    temperature: int = 30
    processes: tuple[Process, ...] = ()  # other people's
    fault: str | None = None

    def look(self) -> Snapshot:
        free = self.total - sum(process.bytes or 0 for process in self.processes)
        return Snapshot(
            free=free, load=self.load, temperature=self.temperature, processes=self.processes, fault=self.fault
        )

    def environment(self) -> dict[str, str]:
        return {}


@dataclass
class HeldLab:
    """A database, and the boxes that a test starts; each ends with it. Seconds are those of the clock. Boxes and
    commands share one engine, since each new one would compile every statement again."""

    home: Path
    folder: Path
    engine: Engine
    clock: HeldClock = field(default_factory=HeldClock)
    starts: list[str] = field(default_factory=list)  # JOB.ATTEMPT of each trainer
    _trainers: list[TrainerThread] = field(default_factory=list)
    _nodes: list[tuple[Workplace, DeviceNode]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=self.clock.now())
        (self.folder / "config.json").write_text(json.dumps(CONFIG))
        self.store = Store(self.engine, self.time)

    def time(self) -> dt.datetime:
        return self._began + dt.timedelta(seconds=self.clock.now())

    def settings(self, **environment: str) -> Settings:
        return load_settings({**self._variables(), **environment})

    def places(
        self,
        does: Train = train,
        options: NodeOptions | None = None,
        devices: Sequence[Device] | None = None,
        **environment: str,
    ) -> list[Workplace]:
        """What the attempts on each device of a box share. Nobody serves them yet."""
        settings = self.settings(**environment)
        for folder in (settings.runtime_dir, settings.work_dir, settings.cache_dir):
            folder.mkdir(parents=True, exist_ok=True)
        places = [
            place_of(settings, device, options or NodeOptions(), Drain(None if options is None else options.grace_s))
            for device in devices or find_devices(settings)
        ]
        return [
            replace(
                place,
                clock=self.clock,
                store=Store(self.engine, self.time, settings.lease_s),
                artifacts=_NearStore(settings.artifacts_url, mark=(options or NodeOptions()).store_mark),
                launch=lambda *_: self._launch(does),
            )
            for place in places
        ]

    def start(
        self,
        does: Train = train,
        options: NodeOptions | None = None,
        devices: Sequence[Device] | None = None,
        **environment: str,
    ) -> list[Workplace]:
        """A box: a node for each device, by default those that LORACTL_DEVICES names."""
        places = self.places(does, options, devices, **environment)
        for place in places:
            node = DeviceNode(place, replace(options or NodeOptions(), devices=len(places), fork_server=False))
            node.take_over()
            node.begin()
            self._nodes.append((place, node))
        return places

    def start_box(self, name: str, does: Train = train, **environment: str) -> list[Workplace]:
        """A box with a home of its own."""
        return self.start(does, LORACTL_HOST=name, LORACTL_HOME=str(self.folder / name), **environment)

    def stop(self, places: list[Workplace] | None = None, how: Wish = "checkpoint") -> None:
        """Let the nodes end, all at once: of one box, or of all."""
        ending = [one for one in self._nodes if places is None or one[0] in places]
        self._nodes = [one for one in self._nodes if one not in ending]
        for place, _ in ending:
            place.drain.ask(how)
        for thread in [self.clock.start(node.end, f"end of {place.node}") for place, node in ending]:
            self.clock.join(thread)
        for place, _ in ending:
            place.store.cards.forget(place.node)  # as `loractl worker` does, which has seen it end

    def submit(self, *options: str, name: str = "job", steps: int = 10, user: str = "ada") -> int:
        file = write_job(self.folder, self.folder, name=name)
        overrides = (option.removeprefix("--set=") for option in options)
        saves = f"training.save_steps={max(3, steps // 10)}"
        return self.submit_file(file, f"training.max_steps={steps}", saves, *overrides, user=user)

    def submit_file(self, file: Path, *overrides: str, user: str = "ada") -> int:
        settings, spec = self.settings(), load_spec(file, overrides)
        data = store_data(spec, ArtifactStore(settings.artifacts_url))
        job_id = self.store.jobs.submit(plan_job(spec, user, data, self.store, own_devices(settings)))
        self.wake()
        return job_id

    def wake(self) -> None:
        """What a message does to each node."""
        for _, node in self._nodes:
            node.wake()

    def cli(self, *args: object, code: int = 0) -> str:
        """What a command prints, by the lab's time."""
        with pytest.MonkeyPatch.context() as patched:
            for name, value in self._variables().items():
                patched.setenv(name, value)
            patched.setattr(opened, "Store", lambda _: Store(self.engine, self.time))
            done = CliRunner().invoke(cli, list(map(str, args)))
        error = done.exception
        if isinstance(error, LoractlError):
            assert error.exit_code == code, f"{args}: {error.sentence}"
            return f"{done.output}Error: {error.sentence}\nHint: {error.hint}"
        assert done.exit_code == code, f"{args}: {done.output} {error!r}"
        return done.output

    def until(self, job_id: int, holds: Callable[[Job], object], seconds: float = 60) -> Job:
        """The job once `holds` is true of it, looked at 600 times."""
        deadline = self.clock.now() + seconds
        while not holds(job := self.store.jobs.get(job_id)):
            assert self.clock.now() < deadline, f"after {seconds} s: {job.status} {job.stage} {job.step} {job.message}"
            self.clock.sleep(seconds / 600)
        return job

    def change(self, job_id: int, **values: Any) -> None:
        with Session(self.engine) as session, session.begin():
            session.execute(update(Job).where(Job.job_id == job_id).values(**values))

    def reasons(self, job_id: int) -> list[Reason | None]:
        return [attempt.reason for attempt in self.store.attempts.of_job(job_id)]

    @property
    def alive(self) -> int:
        """Trainers that have not ended."""
        return sum(trainer.poll() is None for trainer in self._trainers)

    def _launch(self, does: Train) -> Any:
        """Stands for a Popen[str] as far as a supervisor uses one."""
        self._trainers.append(TrainerThread(self.clock, does, self._note))
        return self._trainers[-1]

    def _note(self, order: Start) -> None:
        self.starts.append(f"{order.job_id}.{order.attempt}")

    def _variables(self) -> dict[str, str]:
        return {
            "LORACTL_HOME": str(self.home), "LORACTL_HOST": "heron", "LORACTL_DEVICES": "sim:8GiB",
            "LORACTL_DATABASE_URL": self.engine.url.render_as_string(hide_password=False),
            "LORACTL_ARTIFACTS_URL": (self.home / "artifacts").as_uri(), "LORACTL_REDIS_URL": NO_QUEUE,
            "LORACTL_USER": "tester", "LORACTL_LEASE": f"{LEASE_S}s", "COLUMNS": "300",
        }  # fmt: skip


def _no_queue(*_: object) -> int:
    raise ServiceUnreachable("the queue", NO_QUEUE, "LORACTL_REDIS_URL", "a held lab has none")


@contextlib.contextmanager
def held_lab(home: Path, folder: Path, engine: Engine) -> Iterator[HeldLab]:
    lab = HeldLab(home, folder, engine)
    with pytest.MonkeyPatch.context() as patched:
        for each in ("process_iter", "pids"):  # a look at all of the machine's, for nothing
            patched.setattr(psutil, each, lambda *_: iter(()))
        patched.setattr(HintQueues, "trim", _no_queue)  # to find that out takes a tenth of a node's time
        try:
            yield lab
        finally:
            lab.stop(how="now")
    lab.clock.close()
