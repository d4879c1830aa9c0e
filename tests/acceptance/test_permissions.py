"""What lies in a home is its owner's alone, also where the home itself is open to others."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.schema import upgrade

from ..conftest import Cli
from ..models import write_helpdesk

FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@pytest.mark.fresh
def test_a_new_home_is_closed_to_others(make_cli: Callable[..., Cli], home: Path, tmp_path: Path) -> None:
    cli = make_cli(LORACTL_HOME=str(home / "above" / "home"))
    _submit(cli, tmp_path)
    stop_embedded(load_settings(cli.environment))
    assert not _open_to_others(home), "and so nothing below it can be reached"


def test_in_a_home_that_others_can_enter_the_worker_s_files_are_not_readable(
    cli: Cli, home: Path, tmp_path: Path
) -> None:
    home.chmod(0o755)  # as useradd makes it on some systems
    _submit(cli, tmp_path, "--set=max_retries=0")  # its base is not here: it fails, once a node has served it
    cli("worker", "--drain-when-idle")
    backup = home / "backup.db"
    cli("db", "backup", backup)
    cli("db", "stop")
    (home / "loractl.db").unlink()
    cli("db", "restore", backup)
    private = {"loractl.db", "backup.db", "run", "work", "cache"}
    assert private <= {path.name for path in home.iterdir()}
    assert [path.name for path in _open_to_others(home)] == ["artifacts"], "the store may be meant for others"


def test_the_database_s_companions_are_as_private_as_itself(home: Path) -> None:
    home.chmod(0o755)
    engine = make_engine(f"sqlite:///{home / 'loractl.db'}")
    with engine.connect():
        upgrade(engine)
        names = {path.name for path in home.iterdir()}
        assert {"loractl.db", "loractl.db-wal", "loractl.db-shm"} <= names
        assert not _open_to_others(home)
    engine.dispose()


def test_a_password_in_a_file_that_others_can_read_is_refused(cli: Cli, home: Path) -> None:
    config = home / "config.toml"
    config.write_text('redis_url = "redis://:hunter2@lab:6379/0"\n')
    config.chmod(0o644)
    told = cli("status", code=2).stderr
    why = "redis_url is a URL with a password, and others can read the file"
    assert told == f"Error: {config}: {why}\nHint: chmod 600 {config}\n"
    config.chmod(0o600)
    cli("status")
    config.write_text('redis_url = "redis://127.0.0.1:6379/0"\n')
    config.chmod(0o644)
    cli("status")


@pytest.mark.parametrize(
    ("command", "said"), [("worker", "/sys can't be written to"), ("status", "/sys/loractl.db can't be made")]
)
def test_a_home_that_can_t_be_written_is_named_in_one_sentence(
    make_cli: Callable[..., Cli], command: str, said: str
) -> None:
    """Nobody can make a file in /sys, not even root."""
    told = make_cli(LORACTL_HOME="/sys")(command, code=1).stderr.splitlines()
    assert told[0].startswith(f"Error: {said}: ") and told[1:] == [
        "Hint: set LORACTL_HOME to a folder that you may write"
    ]


def test_a_password_in_the_store_s_address_is_refused(make_cli: Callable[..., Cli]) -> None:
    """The address stands in every row, and in what gc, status and the worker print."""
    for url in ("s3://key:hunter2@bucket/lab", "sftp://me:hunter2@box/lab", "s3://bucket/lab?password=hunter2"):
        told = make_cli(LORACTL_ARTIFACTS_URL=url)("status", code=2).stderr
        assert told.startswith("Error: LORACTL_ARTIFACTS_URL holds a password") and "hunter2" not in told


def _submit(cli: Cli, folder: Path, *options: str) -> None:
    write_helpdesk(folder / "data.jsonl")
    (folder / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    cli("submit", folder / "job.yaml", *options)


def _open_to_others(top: Path) -> list[Path]:
    """What others can read, write or enter directly below `top`, which they can enter."""
    return [path for path in top.iterdir() if path.stat().st_mode & FOR_OTHERS]
