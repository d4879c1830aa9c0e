"""loractl lab init on a server box: services if asked for, of packages or as containers, then the lab on them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.lab_store import make_folder
from loractl.common.settings import S3Keys, Settings, checked_url, load_settings, make_private

from .health.condition import Level
from .health.diagnosis import diagnose
from .lab import Guest, LabAnswer, set_up_lab
from .packages import OWNER, ServerBox, install_services
from .place import SERVICE_USER, Membership, Place
from .process import run

PATIENCE_S = 120.0
"""A new database writes its first files; a container is restarted."""


@dataclass(frozen=True, kw_only=True)
class LabWish:
    """What kind of lab. `services`: packages, containers, or None for running servers that the settings name."""

    services: str | None = None
    address: str | None = None
    artifacts_url: str | None = None
    networks: tuple[str, ...] = ()
    take_over: bool = False


def make_lab(wish: LabWish, guests: Sequence[Guest], valid_s: float) -> LabAnswer:
    """Start services, create tables and roles, and invite the guests. What exists already stays as it is.

    Raises UsageError, WrongState, LoractlError for a service that does not answer, and what set_up_lab raises.
    """
    settings, done = load_settings(), tuple[str, ...]()
    if wish.services is not None:
        done = _start(wish, settings)
        settings = load_settings()
        _wait_for(("database", "queue", "store"), PATIENCE_S)
    elif wish.artifacts_url or wish.networks or wish.take_over:
        raise UsageError("--artifacts, --network and --take-over go with --packages", "set LORACTL_ARTIFACTS_URL")
    elif not settings.embedded_database and settings.redis_url is not None:
        if settings.artifacts_url.startswith("file://"):
            make_folder(settings)
        _wait_for(("database", "queue", "store"), 0)
    return replace(set_up_lab(settings, guests, wish.address, valid_s=valid_s), done=done)


def _start(wish: LabWish, settings: Settings) -> tuple[str, ...]:
    """Start the services, and write the owner's config.toml."""
    if wish.address is None:
        raise UsageError("--address is missing", "the address by which other boxes reach this one, like 10.0.0.5")
    place = Place(folder=settings.home, home=settings.home, service=False)
    place.refuse_joined(replace=True)
    user = urlsplit(settings.database_url).username
    if not settings.embedded_database and user != OWNER:
        raise WrongState(f"{settings.home} is in a lab already, as {user}", "set LORACTL_HOME to the lab's own folder")
    if wish.services == "containers":
        entry, done = start_containers(wish.address, settings)
    else:
        store = _artifacts(wish, settings)
        box = ServerBox(address=wish.address, artifacts_url=store, networks=wish.networks, take_over=wish.take_over)
        entry, done = install_services(box, settings)
        _share(entry.artifacts_url)
    with place.prepared(entry):
        pass
    return (*done, f"{place.file} has the owner's addresses and passwords.")


def _artifacts(wish: LabWish, settings: Settings) -> str:
    """Where results go. Other boxes can't see the home's own folder."""
    url = wish.artifacts_url or settings.artifacts_url
    if url == (settings.home / "artifacts").as_uri():
        hint = "--artifacts file:///lab/loractl, mounted everywhere; or s3://BUCKET/lab and AWS_ variables"
        raise UsageError("the lab has no store that all boxes reach", hint)
    return checked_url("--artifacts", "artifacts_url", url)


def _share(artifacts_url: str) -> None:
    """A new shared folder: everybody writes data sets, but only workers write results (docs/deploy.md)."""
    folder = Path(unquote(artifacts_url.removeprefix("file://")))
    if not artifacts_url.startswith("file://") or (folder / "jobs").exists():
        return
    run("groupadd", "--system", "--force", SERVICE_USER)
    try:
        for part, group, mode in (("datasets", "root", 0o2777), ("jobs", SERVICE_USER, 0o2775)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            shutil.chown(folder / part, "root", group)
            (folder / part).chmod(mode)
    except OSError as error:
        raise LoractlError(f"{folder} can't be made: {error.strerror}", "--artifacts names it") from error


def _wait_for(checks: tuple[str, ...], seconds: float) -> None:
    """Wait until doctor's checks find that all of them answer. Raises LoractlError for the first that does not."""
    deadline = time.monotonic() + seconds
    while True:
        found = diagnose(names=checks).conditions
        if (wrong := next((c for c in found if c.level is Level.ERROR), None)) is None:
            return
        if time.monotonic() > deadline:
            raise LoractlError(f"{wrong.check}: {wrong.sentence}", wrong.hint)
        time.sleep(1)


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
