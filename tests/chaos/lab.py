"""A lab to break: PostgreSQL, Valkey, a store on a small disk, and boxes that reach the first two through a proxy."""

from __future__ import annotations

import contextlib
import glob
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
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError

from loractl.common.queue.valkey import server_binary
from loractl.common.store.database import make_engine
from loractl.common.store.roles import SUBMIT, WORK, WantedLogin, apply_roles
from loractl.common.store.schema import upgrade
from loractl.worker.device.occupancy import JOB_VARIABLE
from loractl.worker.protocol.messages import FORK_SERVER

from ..databases import OPEN_LAB
from ..services import free_port, make_cluster, postgres_command, s3_command, wait_for_port
from ..services import s3 as bucket_of
from .deck import CLOCK_FAULT, DISK_FAULT, POSTGRES_FAULTS, S3_FAULTS, SQLITE_FAULTS
from .guard import guarded
from .proxy import Link, Proxy

REPO = Path(__file__).parents[2]
LORACTL = str(Path(sys.executable).with_name("loractl"))
TRAINER = "tests.chaos.trainer"
STORE_CALLS = "loractl.worker.attempt.storage"
USERS = ("ada", "bob", "cyd")
"""Who submits; what fails the jobs of one user alone may be the user's own fault."""

BOX_LOGIN, HOSTILE = "heron", "mallory"

FAKETIME = sorted(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1"))  # noqa: PTH207  a pattern of folders
"""Debian's libfaketime, where it is installed: it gives processes another time of day."""

STORE_BYTES, DATABASE_BYTES = 192 << 20, 2 << 30


class Disk:
    """A folder on a tmpfs of its own, which can be full; without the right to mount, an ordinary folder."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self._size = folder, size
        folder.mkdir()
        self.mounted = os.geteuid() == 0 and self._mount(f"size={size},mode=755")

    def fill(self) -> None:
        """From now on it has no more room than what lies there takes."""
        found = os.statvfs(self.folder)
        self._mount(f"remount,size={(found.f_blocks - found.f_bfree) * found.f_frsize}")

    def free(self) -> None:
        self._mount(f"remount,size={self._size}")

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0


class Postgres:
    """A cluster whose processes are our own children, so that all of them can be killed at once."""

    def __init__(self, folder: Path) -> None:
        self.disk = Disk(folder / "pg", DATABASE_BYTES)
        self._cluster = self.disk.folder / "data"
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
            [*postgres_command(self._cluster), "--max_wal_size=128MB"], user=self._user, cwd="/", stdout=self._log,
            stderr=self._log, start_new_session=True,
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
        self.disk.remove()


class SqliteFile:
    """A file in place of a server, on a disk that can be full."""

    socket = ""

    def __init__(self, folder: Path) -> None:
        self.disk = Disk(folder / "sqlite", DATABASE_BYTES)
        self.url = f"sqlite:///{self.disk.folder}/loractl.db"

    def start(self) -> None:
        """Nothing has to."""

    def stop(self) -> None:
        self.disk.remove()


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


class S3:
    """The server of a store that is a bucket; its files lie where a folder's would."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._process = subprocess.Popen(s3_command(self._folder, self.port), start_new_session=True, **quiet)
        wait_for_port(self.port, self._process)

    def stop(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()


class StoreDisk:
    """The artifact store's folder, on a tmpfs of its own that can be filled; without the right to mount, a folder that
    can be made unwritable."""

    def __init__(self, folder: Path) -> None:
        self._disk = Disk(folder / "store", STORE_BYTES)
        self.root = self._disk.folder
        self.mounted = self._disk.mounted
        self.artifacts = self._disk.folder / "buckets" / "loractl" / "chaos"  # where S3 looks for it, too
        self.artifacts.mkdir(parents=True)

    @property
    def kind(self) -> str:
        return f"a tmpfs of {STORE_BYTES >> 20} MiB" if self.mounted else "a folder made unwritable"

    def fill(self) -> None:
        if not self.mounted:
            for path in _folders(self.artifacts):
                path.chmod(0o555)
            return
        self._disk.fill()

    def free(self) -> None:
        if self.mounted:
            self._disk.free()
            return
        for path in _folders(self.artifacts):
            path.chmod(0o755)

    def remove(self) -> None:
        self._disk.remove()


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
    store: Link | None  # of one that is a bucket
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True  # False while a fault keeps it down
    starts: int = 0

    def move_clock(self, seconds: int) -> None:
        """By so many from the true time, for all processes that have FAKETIME."""
        aside = self.home / "clock.new"
        aside.write_text(f"{seconds:+d}s\n")
        aside.rename(self.home / "clock")

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

    def fork_servers(self) -> list[psutil.Process]:
        found = []
        for node in self.nodes().values():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                asked = [child for child in node.children() if FORK_SERVER in _arguments(child)]
                found += [child for child in asked if JOB_VARIABLE not in child.environ()]  # a fork shows the same
        return found

    def kill(self) -> None:
        """As if the power went: every process at once."""
        _kill(self.family())
        if self.process is not None:
            self.process.wait()


def trainers_below(process: psutil.Process) -> list[psutil.Process]:
    try:
        found = [child for child in process.children() if TRAINER in _arguments(child)]
        return [child for child in found if JOB_VARIABLE in child.environ()]  # the fork server has no job
    except (psutil.NoSuchProcess, psutil.AccessDenied):
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
    database: Postgres | SqliteFile
    valkey: Valkey
    disk: StoreDisk
    proxy: Proxy
    boxes: list[Box]
    s3: S3 | None
    hostile: str  # URL of a login that means harm: it may submit
    client: Link  # the way of `loractl submit` to the database
    environment: dict[str, str]  # of `loractl submit`
    engine: Engine  # that reads
    writer: Engine
    lease_s: float
    lacks: frozenset[str]  # faults that can't be had here
    store_url: str  # as the boxes name it
    stopped: list[str] = field(default_factory=list)  # how the boxes ended

    def submit(self, files: list[Path], user: str) -> tuple[list[int], str]:
        """`loractl submit`: the numbers that it printed, and what it complained of."""
        command = [LORACTL, "submit", *map(str, files)]
        environment = {**self.environment, "LORACTL_USER": user, **self._login(user)}
        try:
            done = subprocess.run(
                command, env=environment, cwd=REPO, capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
            printed, complaint = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            printed, complaint = (error.stdout or b"").decode(), "no end within 60 s"
        return [int(number) for number in re.findall(r"^Job (\d+) ", printed, re.MULTILINE)], complaint

    @property
    def postgres(self) -> Postgres:
        assert isinstance(self.database, Postgres)
        return self.database

    def _login(self, user: str) -> dict[str, str]:
        return {"LORACTL_DATABASE_URL": _url_of(self.database, user, self.client)}

    def processes(self) -> list[psutil.Process]:
        """Living processes of any box: they have its home in their environment."""
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                home = process.environ().get("LORACTL_HOME", "")
                if home.startswith(f"{self.folder}/") and process.status() != psutil.STATUS_ZOMBIE:
                    mine.append(process)
        return mine


def _url_of(database: Postgres | SqliteFile, user: str, link: Link) -> str:
    if isinstance(database, SqliteFile):
        return database.url
    return f"postgresql://{user}@127.0.0.1:{link.port}/postgres"


def _engines(database: Postgres | SqliteFile) -> tuple[Engine, Engine]:
    """One that reads and one that writes, on an upgraded database with its logins."""
    if isinstance(database, SqliteFile):
        writer = make_engine(database.url)
        upgrade(writer)
        _open(writer)
        # whoever writes here must also heal the fault that holds the lock
        event.listen(writer, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=500"))
        writer.dispose()
        return make_engine(database.url, read_only=True), writer
    patience = {"options": "-c statement_timeout=20000 -c lock_timeout=10000"}
    engine = create_engine(database.url, pool_pre_ping=True, connect_args=patience)
    upgrade(engine)
    _open(engine)
    people = [WantedLogin(name=name, role=SUBMIT) for name in (*USERS, HOSTILE)]
    apply_roles(engine, [WantedLogin(name=BOX_LOGIN, role=WORK), *people])
    return engine, engine


YIELD_SOON = OPEN_LAB.replace("'changes', 'open'", "'give-way', '1'")


def _open(engine: Engine) -> None:
    """Let people change each other's jobs, and a job yield to a much shorter one once it has run for a second."""
    with engine.begin() as connection:
        connection.exec_driver_sql(OPEN_LAB)
        connection.exec_driver_sql(YIELD_SOON)


def _own_clock(home: Path) -> dict[str, str]:
    """Its processes have the time of day from a file, and what they measure is true."""
    return {
        "LD_PRELOAD": FAKETIME[0],
        "FAKETIME_TIMESTAMP_FILE": str(home / "clock"),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }


@contextlib.contextmanager
def lab(boxes: int, cards: int, lease_s: float, *, s3: bool = False, sqlite: bool = False) -> Iterator[Lab]:
    """Start it; on the way out nothing of it remains. `s3`: its store is a bucket."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="lora-chaos-"))
        folder.chmod(0o755)  # PostgreSQL's user goes through it
        stack.enter_context(guarded(folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        database = SqliteFile(folder) if sqlite else Postgres(folder)
        stack.callback(database.stop)
        valkey = Valkey(folder)
        stack.callback(valkey.stop)
        disk = StoreDisk(folder)
        stack.callback(disk.remove)
        proxy = stack.enter_context(Proxy())
        engine, writer = _engines(database)
        stack.callback(engine.dispose)
        stack.callback(writer.dispose)
        bucket = S3(disk.root) if s3 else None
        if bucket is not None:
            stack.callback(bucket.stop)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_", "PG"))}

        def environment(name: str, login: str, link: Link, queue: Link, store: Link | None) -> dict[str, str]:
            found = None if store is None else bucket_of(disk.root, f"http://127.0.0.1:{store.port}", "chaos")
            return {
                **inherited,
                "LORACTL_HOME": str(folder / name),
                "LORACTL_HOST": name,
                "LORACTL_USER": "chaos",
                "LORACTL_DATABASE_URL": _url_of(database, login, link),
                "LORACTL_REDIS_URL": f"redis://127.0.0.1:{queue.port}/0",
                "LORACTL_ARTIFACTS_URL": disk.artifacts.as_uri() if found is None else found.url,
                **({} if found is None else found.environment),
                "LORACTL_DEVICES": "sim:" + ",".join(["8GiB"] * cards),
                "LORACTL_LEASE": f"{lease_s}s",
                "LORACTL_TRAINER": TRAINER,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            }

        lacks = [] if s3 else list(S3_FAULTS)
        lacks += POSTGRES_FAULTS if sqlite else SQLITE_FAULTS
        lacks += [] if database.disk.mounted else [DISK_FAULT]
        lacks += [] if FAKETIME and not sqlite else [CLOCK_FAULT]  # leases in SQLite follow that clock
        made = []
        for number in range(boxes):
            name = f"box-{chr(ord('a') + number)}"
            (folder / name).mkdir()
            link, queue = proxy.to_socket(database.socket), proxy.to_port(valkey.port)
            store = None if bucket is None else proxy.to_port(bucket.port)
            around = environment(name, BOX_LOGIN, link, queue, store)
            made.append(Box(name, cards, folder / name, link, queue, store, around))
            if FAKETIME and not sqlite:
                made[-1].environment |= _own_clock(folder / name)
                made[-1].move_clock(0)
        client = proxy.to_socket(database.socket)
        (folder / "client").mkdir()
        found = Lab(
            folder=folder,
            database=database,
            valkey=valkey,
            disk=disk,
            proxy=proxy,
            boxes=made,
            s3=bucket,
            hostile=database.url.replace("postgres@", f"{HOSTILE}@"),
            client=client,
            environment=environment(
                "client",
                USERS[0],
                client,
                proxy.to_port(valkey.port),
                None if bucket is None else proxy.to_port(bucket.port),
            ),
            engine=engine,
            writer=writer,
            lease_s=lease_s,
            lacks=frozenset(lacks),
            store_url=made[0].environment["LORACTL_ARTIFACTS_URL"],
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
