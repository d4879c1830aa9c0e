"""Fixtures: real databases and services, a home of its own for each test, and small models made on the spot."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import create_engine, text

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store

from . import services
from .models import make_tiny_model

_numbers = itertools.count()

# A property is no timed test: on a busy machine any example may take long.
# CI must not fail by chance: what is new is looked for where somebody sees it and can mend it
hypothesis.settings.register_profile("loractl", deadline=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("loractl")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="loractl-pg-"))
    try:
        with services.postgres(folder / "data") as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A fresh, empty database."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    admin = create_engine(_psycopg(postgres_server), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    base, _, query = postgres_server.partition("?")
    yield _psycopg(base.rpartition("/")[0] + f"/{name}" + (f"?{query}" if query else ""))
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A store on an upgraded database of each kind."""
    engine = make_engine(database_url)
    upgrade(engine)
    yield Store(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[services.S3]:
    folder = Path(tempfile.mkdtemp(prefix="loractl-s3-"))
    try:
        with services.s3(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a real byte-level tokenizer and a chat template, in a folder."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@dataclass(frozen=True)
class Cli:
    """The installed `loractl` command with an environment of its own."""

    environment: dict[str, str]

    def __call__(self, *args: object, code: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run it; with `code`, its exit status must be that."""
        command = [str(Path(sys.executable).with_name("loractl")), *map(str, args)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        if code is not None:
            assert done.returncode == code, f"{command[1:]}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *args: object) -> subprocess.Popen[str]:
        """Start it and go on."""
        command = [str(Path(sys.executable).with_name("loractl")), *map(str, args)]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def with_environment(self, **more: str) -> Cli:
        return Cli({**self.environment, **more})


@pytest.fixture
def home() -> Iterator[Path]:
    """A LORACTL_HOME with a short path (unix sockets), its embedded Valkey stopped afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-"))
    yield folder
    stop_embedded(load_settings({"LORACTL_HOME": str(folder)}))
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make_cli(home: Path) -> Callable[..., Cli]:
    """A factory of command lines on `home`; LORACTL_* of the machine are not inherited."""

    def make(**more: str) -> Cli:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
        base = {"LORACTL_HOME": str(home), "LORACTL_USER": "tester", "HF_HUB_OFFLINE": "1", "LORACTL_DEVICES": "cpu"}
        return Cli({**kept, **base, **more})

    return make


@pytest.fixture
def cli(make_cli: Callable[..., Cli]) -> Cli:
    return make_cli()


def _psycopg(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)
