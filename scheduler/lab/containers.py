"""The lab's services as containers: the package's compose.yaml, and the passwords that it reads."""

from __future__ import annotations

import json
import os
import re
import secrets
from importlib.resources import files
from pathlib import Path

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.settings import S3Keys, Settings, make_private

from .place import Membership
from .process import run

_PROJECT = "loractl"
"""compose.yaml's name."""

_SECRETS = ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_SECRET_KEY")


def start_containers(address: str, settings: Settings) -> tuple[Membership, tuple[str, ...]]:
    """Start them. Returns what the owner's config.toml needs, and sentences on what was done. Existing passwords stay.

    Raises UsageError if Docker's Compose is missing, WrongState if another home made the lab, LoractlError if it fails.
    The caller checks whether they answer: Compose's own --wait takes a container that has finished its work, like the
    bucket's, for a failure.
    """
    folder = settings.home / "compose"
    try:
        run("docker", "compose", "version")
    except LoractlError as error:
        write_compose(folder, address)
        hint = f"install Docker with Compose 2.23.1 or newer, or use --packages; {folder} is ready for it"
        raise UsageError("Docker Compose is not on this machine", hint) from error
    _refuse_another_home(folder)
    values = write_compose(folder, address)
    run("docker", "compose", "--project-directory", str(folder), "up", "--detach")
    host = f"[{address}]" if ":" in address else address
    entry = Membership(
        database_url=f"postgresql://loractl:{values['POSTGRES_PASSWORD']}@{host}:5432/loractl",
        redis_url=f"redis://:{values['VALKEY_PASSWORD']}@{host}:6379/0",
        artifacts_url="s3://loractl/lab",
        s3=S3Keys(
            access_key=values["S3_ACCESS_KEY"],
            secret_key=values["S3_SECRET_KEY"],
            endpoint_url=f"http://{host}:7070",
            region="us-east-1",
        ),
    )
    return entry, (f"PostgreSQL, Valkey and S3 run as containers on {address}: {folder}",)


def _refuse_another_home(folder: Path) -> None:
    """Compose finds the lab's project by its name: with our passwords its services would get new ones."""
    known = json.loads(run("docker", "compose", "ls", "--all", "--format", "json") or "[]")
    files = [Path(project["ConfigFiles"].split(",")[0]) for project in known if project["Name"] == _PROJECT]
    homes = [file.parent.parent for file in files if file.parent != folder]
    label = f"label=com.docker.compose.project={_PROJECT}"
    lost = not (folder / ".env").exists() and run("docker", "volume", "ls", "--quiet", "--filter", label)
    if homes or lost:
        hint = f"LORACTL_HOME={homes[0]} has them" if homes else "set LORACTL_HOME to the folder that has compose/.env"
        raise WrongState(f"this machine has a lab, and {folder.parent} lacks its passwords", hint)


def write_compose(folder: Path, address: str) -> dict[str, str]:
    """Write compose.yaml, and .env with any missing passwords; returns the values of .env. Raises LoractlError."""
    file = folder / ".env"
    try:
        make_private(folder)
        (folder / "compose.yaml").write_text(files(__package__).joinpath("compose.yaml").read_text("utf-8"))
        before = dict(re.findall(r"^(\w+)=(.*)$", file.read_text(), re.MULTILINE)) if file.exists() else {}
        drawn = {name: secrets.token_hex(24) for name in _SECRETS}
        values = {"S3_ACCESS_KEY": "loractl", **drawn, **before, "LORACTL_BIND": address}
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write("".join(f"{name}={value}\n" for name, value in values.items()))
        file.chmod(0o600)
    except OSError as error:
        raise LoractlError(f"{folder} can't be written: {error.strerror}", "set LORACTL_HOME") from error
    return values
