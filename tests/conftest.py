"""Fixtures: real databases and services, a home of its own for each test, and small models made on the spot."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from sqlalchemy import Engine

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.worker.attempt.order import ONE_HEAP
from loractl.worker.base.kernels import refuse_hub_kernels

from . import services, warm
from .databases import OPEN_LAB, KeptDatabase, KeptFile, database, fill, make_template
from .models import make_tiny_model

os.environ["HF_HUB_OFFLINE"] = "1"  # before a library reads it: what a test wants of a hub, it asks of its own
refuse_hub_kernels()  # as in a trainer; a test may import a model's code before it loads the kernels
gc.disable()  # until everything is collected: the imports make objects that stay

ROOT = Path(__file__).parents[1]

LORACTL = str(Path(sys.executable).with_name("loractl"))

LONG = os.environ.get("TESTS") == "long"
"""make test-long: the tests marked `long`, and more examples of every property."""


QUICK = os.environ.get("SERVICES") == "none"
"""make check: it starts no service, does without the training stack, and draws fewer examples."""


def examples(usual: int) -> int:
    """Of a property: ten times as many in make test-long, a fifth in make check."""
    return usual * 10 if LONG else usual // 5 if QUICK else usual


def _memory(room: int = 4 << 30) -> str | None:
    """A folder in memory, if it has so many bytes free: a test of a database waits half of its time for the disk, and
    no test cuts the power. With TMPDIR all lies there."""
    folder = Path("/dev/shm")
    if "TMPDIR" in os.environ or not folder.is_dir():
        return None
    found = os.statvfs(folder)
    runs_files = not found.f_flag & os.ST_NOEXEC  # a container's own often does not
    return str(folder) if runs_files and found.f_bavail * found.f_frsize >= room else None


MEMORY = _memory()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a run in the background of a script: the workers that tests start with Ctrl-C in mind would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A property is no timed test: on a busy machine any example may take long. And make test must not fail by chance:
# make test-long looks for something new.
hypothesis.settings.register_profile("loractl", deadline=None, max_examples=examples(100), derandomize=not LONG)
hypothesis.settings.load_profile("loractl")


FIRST = (
    "test_chaos.py", "test_examples.py", "test_sweep.py", "test_outages.py", "test_bad_boxes.py", "test_secrets.py",
    "test_lifecycle.py", "test_yielding.py", "test_placement.py",
)  # fmt: skip
"""What takes long begins early, so that the processes of a run end together; then the folders, the short tests last."""

FOLDERS = ("chaos", "acceptance", "integration", "fuzz", "unit", "gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests, and leave the long ones out."""
    items.sort(key=_turn)
    if not LONG:
        config.hook.pytest_deselected(items=[item for item in items if _is_long(item)])
        items[:] = [item for item in items if not _is_long(item)]


def _is_long(item: pytest.Item) -> bool:
    """Whether make test-long alone runs it: also on PostgreSQL what is not marked `both` and names no database."""
    if item.get_closest_marker("long") is not None:
        return True
    values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    own = any(mark.args[0] in ("upgraded_url", "database_url") for mark in item.iter_markers("parametrize"))
    on_postgresql = "postgresql" in (values.get("upgraded_url"), values.get("database_url"))
    return on_postgresql and not own and item.get_closest_marker("both") is None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let no collection of garbage walk over the libraries again and again: they stay for the whole run. And let no
    unit test load the training stack, which takes longer than it."""
    if (
        QUICK
        and "torch" in sys.modules
        and all(item.path.is_relative_to(ROOT / "tests/unit") for item in session.items)
    ):
        raise pytest.UsageError("a unit test imports torch: put it into tests/integration, or import less")
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def _turn(item: pytest.Item) -> tuple[int, int]:
    first = FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    return first, FOLDERS.index(item.path.relative_to(ROOT / "tests").parts[0])


@pytest.fixture(scope="session")
def real_services() -> None:
    """For tests that start a server. `make check` starts none, so that it ends in seconds."""
    if QUICK:
        pytest.skip("it starts a service: make test")


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """A folder of all processes of a run."""
    return Path(os.environ[services.RUN])


@contextlib.contextmanager
def once(folder: Path) -> Iterator[Path | None]:
    """The folder, for the process that is to fill it; for later ones None, once it is full."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        full = folder.with_name(f"{folder.name}.full")
        if full.exists():
            yield None
            return
        if folder.exists():  # of a process that was killed: its server may still write there
            folder.rename(folder.with_name(f"{folder.name}.{os.getpid()}"))
        folder.mkdir()
        yield folder
        full.touch()


def _of_the_run(folder: Path, start: Callable[[Path], str]) -> str:
    """The address of a server that all processes of a run share: the first that needs it starts it."""
    address = folder.with_name(f"{folder.name}.address")
    with once(folder) as new:
        if new is not None:
            address.write_text(start(new))
    return address.read_text()


@pytest.fixture(scope="session")
def postgres_server(real_services: None, shared_folder: Path) -> str:
    """The run's PostgreSQL, which has the roles of a lab and an upgraded database that others are copied from."""

    def start(folder: Path) -> str:
        server = services.start_postgres(folder)
        make_template(server)
        return server

    return _of_the_run(shared_folder / "postgres", start)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A fresh, empty database."""
    with database(postgres_server) as url:
        yield url


@pytest.fixture
def upgraded_postgres(postgres_server: str, postgres_url: str) -> str:
    """A PostgreSQL database of its own for the test, at the newest revision."""
    fill(postgres_server, postgres_url)
    return postgres_url


@pytest.fixture
def alone_inviting(shared_folder: Path) -> Iterator[None]:
    """No other process of the run makes join lines meanwhile: to make one drops the spent ones of the whole server."""
    with (shared_folder / "inviting.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


BARE = "bare.db"
"""The upgraded database as a first command leaves it: nobody has set anything."""


@pytest.fixture(scope="session")
def sqlite_template(shared_folder: Path) -> Path:
    """An upgraded database file, for tests to copy, in a folder that also has BARE."""
    with once(shared_folder / "sqlite") as folder:
        if folder is not None:
            engine = make_engine(f"sqlite:///{folder / 'loractl.db'}")
            upgrade(engine)
            engine.dispose()  # its log is part of the file then
            shutil.copy(folder / "loractl.db", folder / BARE)
            with engine.begin() as connection:
                connection.exec_driver_sql(OPEN_LAB)
            engine.dispose()
    return shared_folder / "sqlite" / "loractl.db"


@pytest.fixture
def upgraded_home(home: Path, sqlite_template: Path) -> Path:
    """A home whose database is there and upgraded."""
    shutil.copy(sqlite_template, home / "loractl.db")
    return home


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def upgraded_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An upgraded database of each kind."""
    if request.param == "sqlite":
        yield request.getfixturevalue("upgraded_file")
        return
    kept: KeptDatabase = request.getfixturevalue("kept_postgres")
    yield kept.url()
    kept_engine(kept.url()).dispose()
    kept.empty()


@pytest.fixture
def upgraded_file(kept_sqlite: KeptFile) -> Iterator[str]:
    """An upgraded SQLite database, whose engine stays connected."""
    url = kept_sqlite.url()
    yield url
    if not kept_sqlite.empty():
        kept_engine(url).dispose()


@pytest.fixture(scope="session")
def kept_sqlite(sqlite_template: Path) -> Iterator[KeptFile]:
    kept = KeptFile(sqlite_template)
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def kept_postgres(postgres_server: str) -> Iterator[KeptDatabase]:
    kept = KeptDatabase(postgres_server)
    yield kept
    kept.close()


@pytest.fixture
def store(upgraded_url: str) -> Store:
    """A store on an upgraded database of each kind."""
    return Store(kept_engine(upgraded_url))


@functools.cache
def kept_engine(url: str) -> Engine:
    """The engine of all tests whose database is at this URL, one after the other. It keeps the statements that it has
    compiled, which take a sixth of a test of the store; to dispose of it closes its connections alone."""
    return make_engine(url)


@pytest.fixture(scope="session")
def s3_server(real_services: None, shared_folder: Path) -> services.S3:
    """This process's part of the run's S3."""
    endpoint = _of_the_run(shared_folder / "s3", services.start_s3)
    return services.s3(shared_folder / "s3", endpoint, os.environ.get("PYTEST_XDIST_WORKER", "lab"))


@pytest.fixture
def redis_url(real_services: None, shared_folder: Path) -> Iterator[str]:
    """An empty database of the run's Valkey, which asks for a password."""
    from redis import Redis

    server = _of_the_run(shared_folder / "valkey", services.start_valkey)
    with Redis.from_url(server) as first:
        number = 1 + int(first.incr("given")) % (services.QUEUE_DATABASES - 1)
    url = f"{server.removesuffix('0')}{number}"
    yield url
    with Redis.from_url(url) as own:
        own.flushdb()


@pytest.fixture(scope="session")
def tiny_model(shared_folder: Path) -> Path:
    """A random two-layer Llama with a real byte-level tokenizer and a chat template, in a folder. One for all processes
    of a run: no test may change it."""
    with once(shared_folder / "tiny") as folder:
        if folder is not None:
            make_tiny_model(folder)
    return shared_folder / "tiny"


@dataclass(frozen=True)
class Cli:
    """The installed `loractl` command with an environment of its own."""

    environment: dict[str, str]
    here: bool = False
    """Whether it runs in the test's process."""

    def __call__(self, *args: object, code: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run it; with `code`, its exit status must be that."""
        words = list(map(str, args))
        done = self._run_here(words) if self.here else self._run_warm(words, timeout) or subprocess.run(
            [LORACTL, *words], env=self.environment, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if code is not None:
            assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def _run_here(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        from loractl.scheduler.cli.main import main

        said, complained = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment, clear=True), mock.patch.object(gc, "set_threshold"),
            mock.patch.object(sys, "argv", ["loractl", *words]), mock.patch.object(atexit, "register"),
            contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained),
            pytest.raises(SystemExit) as ended,
        ):  # fmt: skip
            main()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), said.getvalue(), complained.getvalue())

    def _run_warm(self, words: list[str], timeout: float) -> subprocess.CompletedProcess[str] | None:
        try:
            found = warm.run(words, self.environment, timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(words, timeout) from None
        if found is None:
            assert warm.ALWAYS not in self.environment, f"not warm: {words} {warm.servers(self.environment)}"
            return None
        status, out, err = found
        return subprocess.CompletedProcess(words, status, out, err)

    def start(self, *args: object, warm_start: bool = False) -> subprocess.Popen[str]:
        """Start it and go on. With `warm_start` it is forked: no child of the process that is returned, which only
        hands on what happens."""
        command = [sys.executable, "-S", "-E", str(warm.__file__)] if warm_start else [LORACTL]
        return subprocess.Popen(
            [*command, *map(str, args)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def with_environment(self, **more: str) -> Cli:
        return Cli({**self.environment, **more}, self.here)


@pytest.fixture
def home() -> Iterator[Path]:
    """A LORACTL_HOME with a short path (unix sockets), its embedded Valkey stopped afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-", dir=MEMORY))
    yield folder
    stop_embedded(load_settings({"LORACTL_HOME": str(folder)}))
    shutil.rmtree(folder, ignore_errors=True)


class LeftRunning(Exception):
    """A test, or loractl, has left a process behind."""


KINDS = (warm.LIGHT,) if QUICK else (warm.LIGHT, warm.HEAVY)
"""The servers of warm starts."""


@contextlib.contextmanager
def _warm_servers() -> Iterator[Path]:
    """The folder of servers that begin to load; a server's socket is there when it has loaded."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    one_heap = dict(
        [ONE_HEAP]
    )  # glibc reads it at a process's start: forks have it, whether their box has a limit or not
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **one_heap}
    servers = []
    for kind in KINDS:
        with (folder / f"{kind}.log").open("w") as log:
            command = [sys.executable, "-m", warm.SERVER, kind, str(folder)]
            servers.append(
                subprocess.Popen(
                    command, env={**_inherited(), **own}, stdin=subprocess.PIPE, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
    try:
        yield folder
    finally:
        for server in servers:
            assert server.stdin
            server.stdin.close()
        for server in servers:
            server.wait(timeout=60)
        left = "".join(file.read_text() for file in folder.glob(f"*-{warm.LEFT}"))
        shutil.rmtree(folder, ignore_errors=True)
        if left:
            raise LeftRunning(f"left running: {left}")


SHARED_SERVERS = "WARM_SERVERS_OF_THE_RUN"
"""In the environment of xdist's processes: the folder of the run's servers."""

_run = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Make what all processes of a run share, and load the libraries once for all, while they collect."""
    if hasattr(config, "workerinput"):
        return
    os.environ[services.RUN] = str(_run.enter_context(services.run_folder(MEMORY)))
    if getattr(config.option, "numprocesses", None):
        folder = os.environ[SHARED_SERVERS] = str(_run.enter_context(_warm_servers()))
        python = shlex.join([sys.executable, "-SE", str(warm.__file__), "--python", KINDS[-1], folder])
        config.option.tx = [f"popen//python={python}" for _ in config.option.tx]  # forked, not imported once more


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what all processes of the run share; in xdist's processes there is none. An error here would hide the names
    of the tests that failed."""
    try:
        _run.close()
    except LeftRunning as left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\n{left}", file=sys.stderr)


@pytest.fixture(scope="session")
def warm_start() -> Iterator[dict[str, str]]:
    """What commands and workers need in their environment so that they, and trainers, begin with torch loaded."""
    with contextlib.ExitStack() as own:
        shared = os.environ.get(SHARED_SERVERS)
        folder = Path(shared) if shared else own.enter_context(_warm_servers())
        deadline = time.monotonic() + 120
        while left := [kind for kind in KINDS if not (folder / kind).exists()]:
            said = (folder / f"{left[0]}.log").read_text()
            assert time.monotonic() < deadline and "Traceback" not in said, said
            time.sleep(0.1)
        yield {warm.SOCKET: str(folder), "LORACTL_TRAINER": warm.__name__, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def make_cli(home: Path, request: pytest.FixtureRequest) -> Callable[..., Cli]:
    """A factory of command lines on `home`; LORACTL_* of the machine are not inherited.

    The home has its database: to make that is two thirds of what a first command takes. Of a test marked `cold` or
    `fresh` it is empty, as a person's is. Those of one marked `here` run in its process."""
    cold, here = (request.node.get_closest_marker(name) is not None for name in ("cold", "here"))
    start = {} if cold or here else request.getfixturevalue("warm_start")
    if not (cold or request.node.get_closest_marker("fresh") or (home / "loractl.db").exists()):
        shutil.copy(request.getfixturevalue("sqlite_template").with_name(BARE), home / "loractl.db")

    def make(**more: str) -> Cli:
        base = {
            "LORACTL_HOME": str(home),
            "LORACTL_USER": "tester",
            "HF_HUB_OFFLINE": "1",
            "LORACTL_DEVICES": "cpu",
            "LORACTL_FORK_SERVER": "0",
        }
        return Cli({**_inherited(), **base, **start, **more}, here)

    return make


@pytest.fixture
def cli(make_cli: Callable[..., Cli]) -> Cli:
    return make_cli()


def _inherited() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
