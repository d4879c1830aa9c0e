"""A lab: its services on a server box if asked for, of packages or as containers, then its tables, its roles, and the
join lines of its guests."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from loractl.common.errors import LoractlError, UsageError, WrongState
from loractl.common.lab_store import SETTING, adopt, make_folder, open_lab_store
from loractl.common.settings import S3Keys, Settings, checked_url, load_settings, make_private
from loractl.common.store.database import one_look
from loractl.common.store.roles import SUBMIT, WORK, DatabaseServer, Invitation, LabOwner, lab_owner
from loractl.common.store.schema import HEAD
from loractl.common.store.store import Store

from .health.condition import Level
from .health.diagnosis import diagnose
from .line import JoinLine, addresses_of, is_only_here, new_secret
from .packages import OWNER, ServerBox, install_services
from .place import SERVICE_USER, Membership, Place
from .process import run

VALID_S = 3600.0
"""How long a join line is valid."""


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A box or a person to invite. `name`: None to choose it on joining."""

    kind: str  # box or person
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class JoinTicket:
    """A join line, for one machine."""

    kind: str
    name: str | None
    line: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class LabAnswer:
    """What was done, and the lines. `host`: where they lead. `revision_before`: None for new tables."""

    host: str
    only_here: bool
    revision: str
    revision_before: str | None
    new_roles: tuple[str, ...]
    until: dt.datetime
    tickets: tuple[JoinTicket, ...]
    done: tuple[str, ...] = ()  # sentences about services

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names."""
        tickets = [vars(ticket) for ticket in self.tickets]
        lists = {"tickets": tickets, "new_roles": list(self.new_roles), "done": list(self.done)}
        return {**vars(self), **lists, "until": self.until.isoformat()}


def set_up_lab(
    settings: Settings, guests: Sequence[Guest], address: str | None, *, valid_s: float = VALID_S
) -> LabAnswer:
    """Create tables and roles that are missing, and invite the guests. It may be repeated.

    Raises UsageError, SchemaMismatch for tables of another version, ServiceUnreachable, Forbidden, and what invite
    raises.
    """
    with _owner(settings) as owner:
        before, new_roles = owner.prepare()
        return replace(_invited(settings, owner, guests, address, valid_s), revision_before=before, new_roles=new_roles)


def invite_guests(settings: Settings, guests: Sequence[Guest], address: str | None, *, valid_s: float) -> LabAnswer:
    """Lines for guests of an existing lab. Raises what set_up_lab raises."""
    with _owner(settings) as owner:
        return _invited(settings, owner, guests, address, valid_s)


@contextlib.contextmanager
def _owner(settings: Settings) -> Iterator[LabOwner]:
    if settings.embedded_database:
        hint = "--packages or --containers runs one here; or set LORACTL_DATABASE_URL to yours, as its owner"
        raise UsageError("a lab needs PostgreSQL", hint)
    with lab_owner(settings) as owner:
        yield owner


def _invited(
    settings: Settings, owner: LabOwner, guests: Sequence[Guest], address: str | None, valid_s: float
) -> LabAnswer:
    server = owner.server()
    addresses = replace(addresses_of(settings, server.tls, address), store_mark=_store_mark(settings))
    lines = [_line(server, addresses.database_tls, address) for _ in guests]
    pairs = list(zip(guests, lines, strict=True))
    until = owner.invite([_invitation(guest, line, addresses.text()) for guest, line in pairs], valid_s)
    host = lines[0].host
    return LabAnswer(
        host=host,
        only_here=is_only_here(host),
        revision=HEAD,
        revision_before=HEAD,
        new_roles=(),
        until=until,
        tickets=tuple(JoinTicket(kind=guest.kind, name=guest.name, line=line.text()) for guest, line in pairs),
    )


def _store_mark(settings: Settings) -> str:
    """The store's mark; a lab without one gets it here. Raises WrongStore, and what adopt raises."""
    with one_look(settings) as engine:
        store = Store(engine)
        if (known := store.lab.setting(SETTING)) is None:
            return adopt(settings, store)
        open_lab_store(settings, store).check()
        return known


def _line(server: DatabaseServer, tls: dict[str, str], address: str | None) -> JoinLine:
    number, secret = new_secret()
    host = address if address is not None and is_only_here(server.host) else server.host
    encrypted = server.tls or tls.get("sslmode", "prefer") not in ("disable", "allow", "prefer")
    # the authority's file is not on the other machine yet; the password proves a server that terminates TLS itself
    mode = {"sslmode": "require"} if encrypted else {}
    mode |= {"channel_binding": "require"} if server.tls else {}
    return JoinLine(host=host, port=server.port, database=server.database, number=number, secret=secret, tls=mode)


def _invitation(guest: Guest, line: JoinLine, addresses: str) -> Invitation:
    role = {"box": WORK, "person": SUBMIT}[guest.kind]
    sealed = line.seal(addresses)
    return Invitation(login=line.login, password=line.password, role=role, name=guest.name, sealed=sealed)


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
