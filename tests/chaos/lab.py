"""A lab to break: PostgreSQL, Valkey, a store on a small disk, and boxes that reach the first two through a proxy."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from loractl.common.queue.valkey import server_binary

from ..services import free_port, make_cluster, postgres_command, wait_for_port
from .proxy import Link, Proxy

REPO = Path(__file__).parents[2]
LORACTL = str(Path(sys.executable).with_name("loractl"))
TRAINER = "tests.chaos.trainer"
STORE_CALLS = "loractl.worker.storage.process"
STORE_BYTES = 192 << 20


class Postgres:
    """A cluster whose processes are our own children, so that all of them can be killed at once."""

    def __init__(self, folder: Path) -> None:
        self._cluster = folder / "pg"
        self._user = make_cluster(self._cluster)
        self._log = (folder / "postgres.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql+psycopg://postgres@/postgres?host={self._cluster}&connect_timeout=5"
        self.socket = str(self._cluster / ".s.PGSQL.5432")
        self.start()

    def start(self) -> None:
        """Start, and wait until it has recovered and answers. Like a service manager, start it again where it ends: it
        does not begin while an old process holds the shared memory."""
        engine = create_engine(self.url)
        deadline = time.monotonic() + 60
        while True:
            if self._process is None or self._process.poll() is not None:
                self._launch()
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
                break
            except OperationalError as error:
                if time.monotonic() > deadline:
                    error.add_note(Path(self._log.name).read_text("utf-8", "replace")[-2000:])
                    raise
                time.sleep(0.05)
        engine.dispose()

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            postgres_command(self._cluster), user=self._user, cwd="/", stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    def crash(self) -> None:
        """SIGKILL to all of its processes: what was committed is in its log, and nothing else is safe."""
        assert self._process
        first = psutil.Process(self._process.pid)
        first.suspend()  # it would answer a connection with one more process, between our look and the kill
        _kill([first, *first.children(recursive=True)])
        self._process.wait()

    def forbid_writes(self) -> None:
        """As a primary that a failover has stepped down; whoever was connected is put out."""
        self._set_read_only("on")

    def permit_writes(self) -> None:
        self._set_read_only("off")

    def _set_read_only(self, value: str) -> None:
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"ALTER SYSTEM SET default_transaction_read_only = {value}"))
            connection.execute(text("SELECT pg_reload_conf()"))
            if value == "on":
                others = "pid != pg_backend_pid() AND backend_type = 'client backend'"
                connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        engine.dispose()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # fast shutdown
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.crash()
        self._log.close()


class Valkey:
    """The product's own server binary, on a port, with its append-only file on."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder / "valkey"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        arguments = f"--port {self.port} --bind 127.0.0.1 --appendonly yes --save".split()
        self._process = subprocess.Popen(
            [str(server_binary()), *arguments, "", "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for_port(self.port, self._process)

    def kill(self, *, wipe: bool) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()
        if wipe:
            shutil.rmtree(self._folder)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill(wipe=False)


class StoreDisk:
    """The artifact store's folder, on a tmpfs of its own that can be filled; without the right to mount, a folder that
    can be made unwritable."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "store"
        self.root.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES},mode=755", "tmpfs", str(self.root)]
        self.mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        self.artifacts = self.root / "artifacts"
        self.artifacts.mkdir()
        self._filler = self.root / "filler"

    @property
    def kind(self) -> str:
        return f"tmpfs of {STORE_BYTES >> 20} MiB" if self.mounted else "folder made unwritable"

    def fill(self) -> None:
        if not self.mounted:
            for path in _folders(self.artifacts):
                path.chmod(0o555)
            return
        # without a buffer: what the disk did not take would be written, and refused, once more at the end
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):  # ENOSPC is what this is for
            while True:
                file.write(bytes(1 << 20))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)
        if not self.mounted:
            for path in _folders(self.artifacts):
                path.chmod(0o755)

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.root)], check=True)


def _folders(top: Path) -> Iterator[Path]:
    yield top
    for path in list(top.rglob("*")):
        if path.is_dir():
            yield path


@dataclass
class Box:
    """One `loractl worker` with a home of its own."""

    name: str
    cards: int
    home: Path
    database: Link
    queue: Link
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True  # False while a fault keeps it down
    starts: int = 0

    @property
    def log(self) -> Path:
        return self.home.parent / f"{self.name}.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [LORACTL, "worker"],
                env=self.environment,
                cwd=REPO,  # the trainer is a module of the tests
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.starts += 1

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The worker and all below it."""
        if not self.runs:
            return []
        assert self.process
        worker = psutil.Process(self.process.pid)
        return [worker, *worker.children(recursive=True)]

    def nodes(self) -> dict[int, psutil.Process]:
        """Card index -> the process that serves it."""
        found: dict[int, psutil.Process] = {}
        if self.runs:
            assert self.process
            for child in psutil.Process(self.process.pid).children():
                arguments = _arguments(child)
                if "loractl.worker.node" in arguments:
                    found[int(arguments[arguments.index("--index") + 1])] = child
        return found

    def trainers(self) -> dict[int, psutil.Process]:
        """Card index -> a trainer that its node has started."""
        return {index: found[-1] for index, found in self._trainers().items() if found}

    def followers(self) -> dict[int, psutil.Process]:
        """Card index -> the rank of a job on two cards that trains there for the other card's trainer."""
        found: dict[int, psutil.Process] = {}
        for index, trainers in self._trainers().items():
            for rank in itertools.chain.from_iterable(map(trainers_below, trainers)):
                found[next(card for card in range(self.cards) if card != index)] = rank
        return found

    def _trainers(self) -> dict[int, list[psutil.Process]]:
        return {index: trainers_below(node) for index, node in self.nodes().items()}

    def store_calls(self) -> list[psutil.Process]:
        """The processes that make its nodes' calls of the artifact store."""
        found = []
        for node in self.nodes().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child for child in node.children() if STORE_CALLS in _arguments(child)]
        return found

    def kill(self) -> None:
        """As if the power went: every process at once."""
        _kill(self.family())
        if self.process is not None:
            self.process.wait()


def trainers_below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children() if TRAINER in _arguments(child)]
    except psutil.NoSuchProcess:
        return []


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _kill(family: list[psutil.Process]) -> None:
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()  # first: else one would notice that another is gone
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass(kw_only=True)
class Lab:
    """Everything, in one folder."""

    folder: Path
    postgres: Postgres
    valkey: Valkey
    disk: StoreDisk
    proxy: Proxy
    boxes: list[Box]
    client: Link  # the way of `loractl submit` to the database
    environment: dict[str, str]  # of `loractl submit`
    engine: Engine
    lease_s: float
    stopped: list[str] = field(default_factory=list)  # how the boxes ended

    def submit(self, files: list[Path], user: str) -> tuple[list[int], str]:
        """`loractl submit`: the numbers that it printed, and what it complained of."""
        command = [LORACTL, "submit", *map(str, files)]
        try:
            done = subprocess.run(
                command, env={**self.environment, "LORACTL_USER": user}, cwd=REPO, capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
            printed, complaint = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            printed, complaint = (error.stdout or b"").decode(), "no end within 60 s"
        return [int(number) for number in re.findall(r"^Job (\d+) ", printed, re.MULTILINE)], complaint

    def processes(self) -> list[psutil.Process]:
        """Living processes of any box: they have its home in their environment."""
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                home = process.environ().get("LORACTL_HOME", "")
                if home.startswith(f"{self.folder}/") and process.status() != psutil.STATUS_ZOMBIE:
                    mine.append(process)
        return mine


@contextlib.contextmanager
def lab(boxes: int, cards: int, lease_s: float) -> Iterator[Lab]:
    """Start it; on the way out nothing of it remains."""
    from loractl.common.store.schema import upgrade

    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="lora-chaos-"))
        folder.chmod(0o755)  # PostgreSQL's user goes through it
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = Postgres(folder)
        stack.callback(postgres.stop)
        valkey = Valkey(folder)
        stack.callback(valkey.stop)
        disk = StoreDisk(folder)
        stack.callback(disk.remove)
        proxy = stack.enter_context(Proxy())
        patience = {"options": "-c statement_timeout=20000 -c lock_timeout=10000"}
        engine = create_engine(postgres.url, pool_pre_ping=True, connect_args=patience)
        stack.callback(engine.dispose)
        upgrade(engine)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_", "PG"))}

        def environment(name: str, database: Link, queue: Link) -> dict[str, str]:
            return {
                **inherited,
                "LORACTL_HOME": str(folder / name),
                "LORACTL_HOST": name,
                "LORACTL_USER": "chaos",
                "LORACTL_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database.port}/postgres",
                "LORACTL_REDIS_URL": f"redis://127.0.0.1:{queue.port}/0",
                "LORACTL_ARTIFACTS_URL": disk.artifacts.as_uri(),
                "LORACTL_DEVICES": "sim:" + ",".join(["8GiB"] * cards),
                "LORACTL_LEASE": f"{lease_s}s",
                "LORACTL_KEEP_WARM": "2s",
                "LORACTL_TRAINER": TRAINER,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            }

        made = []
        for number in range(boxes):
            name = f"box-{chr(ord('a') + number)}"
            (folder / name).mkdir()
            database, queue = proxy.to_socket(postgres.socket), proxy.to_port(valkey.port)
            made.append(Box(name, cards, folder / name, database, queue, environment(name, database, queue)))
        client = proxy.to_socket(postgres.socket)
        (folder / "client").mkdir()
        found = Lab(
            folder=folder,
            postgres=postgres,
            valkey=valkey,
            disk=disk,
            proxy=proxy,
            boxes=made,
            client=client,
            environment=environment("client", client, proxy.to_port(valkey.port)),
            engine=engine,
            lease_s=lease_s,
        )
        stack.callback(_end, found)
        for box in made:
            box.start()
        yield found


def _end(lab: Lab) -> None:
    for process in lab.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for box in lab.boxes:
        if box.process is not None:
            box.process.wait()
