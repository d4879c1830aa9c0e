"""Known secrets are looked for wherever a run leaves something: nowhere may one of them stand.

Not among what is searched: the environment of processes, which only their own user can read. A forked trainer's
arguments and environment are those of the process that asked for it (tests/warm.py), as the node made them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import MetaData, create_engine, select

from loractl.common.queue.valkey import server_binary

from .. import services, warm
from ..conftest import Cli
from ..models import write_job
from ..roles import logins

NAMES = ("HF_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "database", "valkey")
"""Each gets a value that occurs nowhere else."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Command lines with the roles of docs/deploy.md: this run shows that each is enough for its part."""

    person: Cli
    box: Cli


class Lookout(threading.Thread):
    """Reads every process's arguments again and again, and the trainer's environment when there is one."""

    def __init__(self, known: dict[str, str], home: Path) -> None:
        super().__init__(daemon=True)
        self.shown: set[tuple[str, str]] = set()  # (secret's name, arguments)
        self.looks = 0
        self.commands: set[str] = set()  # of this test's home
        self.trainer: dict[str, str] = {}
        self._known = known
        self._home = os.fsencode(f"LORACTL_HOME={home}")
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.1):
            self.looks += 1
            for process in Path("/proc").iterdir():
                if process.name.isdecimal():
                    self._look(process)

    def end(self) -> None:
        self._over.set()
        self.join()

    def _look(self, process: Path) -> None:
        try:
            arguments = (process / "cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
            ours = "loractl" in arguments or warm.__name__ in arguments
            environment = (process / "environ").read_bytes().split(b"\0") if ours else []
        except OSError:
            return  # it has ended, or belongs to somebody else
        self.shown |= {(name, arguments) for name, value in self._known.items() if value in arguments}
        if self._home not in environment:
            return
        self.commands.add(arguments)
        if f"-m {warm.__name__}" in arguments:
            self.trainer = dict(os.fsdecode(pair).split("=", 1) for pair in environment if b"=" in pair)


@pytest.fixture
def known() -> dict[str, str]:
    return {name: f"{name.replace('_', '').lower()[:6]}{secrets.token_hex(16)}" for name in NAMES}


@pytest.fixture
def lab(known: dict[str, str], make_cli: Callable[..., Cli], upgraded_postgres: str, tmp_path: Path) -> Iterator[Lab]:
    """PostgreSQL, Valkey and S3, each behind a secret; the services themselves are given it by file or variable."""
    (tmp_path / "valkey").mkdir()
    (tmp_path / "s3" / "loractl").mkdir(parents=True)
    redis, s3 = services.free_port(), services.free_port()
    (tmp_path / "valkey" / "conf").write_text(
        f"port {redis}\nbind 127.0.0.1\nrequirepass {known['valkey']}\ndir {tmp_path / 'valkey'}\nsave ''\n"
    )
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    serve = [rclone, "serve", "s3", str(tmp_path / "s3"), "--addr", f"127.0.0.1:{s3}", "--config", os.devnull]
    keys = f'"{known["AWS_ACCESS_KEY_ID"]},{known["AWS_SECRET_ACCESS_KEY"]}"'  # rclone reads a line of CSV
    with (
        services.running([str(server_binary()), str(tmp_path / "valkey" / "conf")], redis),
        services.running([*serve, "--vfs-cache-mode", "off"], s3, RCLONE_AUTH_KEY=keys),
        logins(upgraded_postgres, known["database"]) as roles,
    ):
        cli = make_cli(
            LORACTL_DATABASE_URL=roles.person,
            LORACTL_REDIS_URL=f"redis://:{known['valkey']}@127.0.0.1:{redis}/0",
            LORACTL_ARTIFACTS_URL="s3://loractl/lab",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{s3}",
            AWS_REGION="us-east-1",
            **{name: known[name] for name in NAMES if name.isupper()},
        )
        yield Lab(person=cli, box=cli.with_environment(LORACTL_DATABASE_URL=roles.box))


@pytest.mark.long
def test_no_secret_is_left_anywhere(
    lab: Lab, known: dict[str, str], home: Path, postgres_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    lookout = Lookout(known, home)
    lookout.start()
    job = write_job(tmp_path, tiny_model)
    said = [lab.person("submit", job), lab.person("submit", job, "--set=base_model=/nowhere", "--set=max_retries=0")]
    said.append(lab.box("worker", "--drain-when-idle", timeout=240))
    for command in (
        ["status", "-a"], ["status", "-a", "--json"], ["status", 1, "--full"], ["status", 1, "--json"],
        ["status", 2, "--full"],
        ["logs", 1], ["logs", 2], ["report", 1, "--json"], ["adapters", "--json"], ["gpus", "--json"], ["release", 2],
        ["why", 2], ["adapters", "pull", 1, tmp_path / "pulled"],
    ):  # fmt: skip
        said.append(lab.person(*command))
    said.append(lab.box("gc", "--keep-last", 5))
    said += _with_everything_away(lab.person, known, job)
    lookout.end()

    assert [j for j in said[3].stdout.splitlines() if "succeeded" in j], said[3].stdout
    assert any("loractl.worker.node" in command for command in lookout.commands)
    trainer = lookout.trainer
    assert trainer["HF_TOKEN"] == known["HF_TOKEN"], "a gated model needs it"
    assert not {value for value in trainer.values() for name in NAMES if name != "HF_TOKEN" and known[name] in value}

    assert not lookout.shown, "a secret in the arguments of a process"
    places = {"output": [f"{done.stdout}\n{done.stderr}".encode() for done in said]}
    places |= {"database": list(_rows(postgres_url)), "artifacts": list(_files(tmp_path / "s3"))}
    places |= {"home": list(_files(home)), "pulled": list(_files(tmp_path / "pulled"))}
    for place, contents in places.items():
        assert contents, f"nothing was searched in {place}"
        found = {name for name, value in known.items() for content in contents if value.encode() in content}
        assert not found, f"{place} holds {found}"
    sizes = {place: f"{len(contents)} ({sum(map(len, contents)):,} bytes)" for place, contents in places.items()}
    print(f"searched for {len(known)} secrets: {sizes}; {lookout.looks} looks at all processes")


def _with_everything_away(lab: Cli, known: dict[str, str], job: Path) -> list:
    """What commands say when nothing answers, tracebacks included."""
    port = services.free_port()
    away = lab.with_environment(LORACTL_DATABASE_URL=f"postgresql://lab:{known['database']}@127.0.0.1:{port}/x")
    no_queue = lab.with_environment(LORACTL_REDIS_URL=f"redis://:{known['valkey']}@127.0.0.1:{port}/0")
    no_store = lab.with_environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    return [
        away("status", code=4),
        away("--debug", "status", code=4),
        no_queue("submit", job),
        no_store("--debug", "submit", job, code=None),
        lab.with_environment(LORACTL_REDIS_URL=f"redis://:{known['valkey']}@[::1/0")("submit", job, code=2),
    ]


def _rows(url: str) -> Iterator[bytes]:
    """Every row of every table."""
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        for table in tables.sorted_tables:
            yield from (repr(tuple(row)).encode() for row in connection.execute(select(table)))
    engine.dispose()


def _files(folder: Path) -> Iterator[bytes]:
    yield from (path.read_bytes() for path in folder.rglob("*") if path.is_file())
