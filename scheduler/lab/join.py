"""A machine joins a lab: the line and everything else is checked, and only then its login created and its file
written; on a box, the worker becomes a systemd service."""

from __future__ import annotations

import contextlib
import getpass
import grp
import os
import pwd
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from loractl.common.errors import LoractlError, ServiceRefused, ServiceUnreachable, UsageError, WrongState
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine, reachable
from loractl.common.store.roles import WORK, Invited, entered, look
from loractl.scheduler.lab.health.diagnosis import diagnosed

from .health.box import has_training_stack
from .health.condition import Diagnosis, Level
from .line import JoinLine, LabAddresses, read_addresses, refuse_another_store, right_to_results, urls_with_certificates
from .place import SERVICE, SERVICE_HOME, SERVICE_USER, Membership, Place
from .process import run

_STACK = "pip install 'loractl[worker,postgres,s3]'; the line still works. For a person ask for another line"
BEFORE = ("queue", "store", "disk")
"""What is checked before the line is used up: another try must be possible."""


@dataclass(frozen=True, kw_only=True)
class JoinWish:
    """How a machine joins. `name`: None for its own. `service`: False for no unit, even as root."""

    name: str | None = None
    service: bool = True
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class JoinAnswer:
    """What was done, and what doctor finds now. `service`: started, installed, or None if there is none."""

    kind: str
    name: str
    host: str  # of the database
    file: str
    embedded: str | None  # an earlier database, whose jobs stay in it
    service: str | None
    diagnosis: Diagnosis = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The fields under their own names; `diagnosis`: as doctor --json prints it."""
        return {**vars(self), "diagnosis": self.diagnosis.as_json()}


def join(line: JoinLine, wish: JoinWish) -> JoinAnswer:
    """Join this machine. Until its login is created, the line stays valid and nothing on this machine changes.

    Raises UsageError, WrongState, ServiceUnreachable, and LoractlError for a check that fails.
    """
    url = line.url(line.login, line.password, line.tls)
    engine = make_engine(url.replace("postgresql:", "postgresql+psycopg:", 1), connections=1, kept=1)
    settings = load_settings({"LORACTL_HOME": "/nonexistent", "LORACTL_DATABASE_URL": url})  # no config.toml
    try:
        with _valid(), reachable(settings):
            invited = look(engine)
        lab = _opened(line, invited)
        kind = "box" if invited.role == WORK else "person"
        if kind == "box" and not has_training_stack():
            raise UsageError("this line is for a GPU box, which needs the training stack", _STACK)
        place = _place(kind, wish)
        place.refuse_joined(wish.replace)
        refuse_another_store(lab)
        name, password = invited.name or wish.name or _own_name(kind), secrets.token_hex(24)
        if wish.name not in (None, name):
            raise UsageError(f"this line is for {name}", "leave --name out, or ask for another line")
        with contextlib.ExitStack() as undone:
            if place.service:
                undone.enter_context(service_user())
            _refuse_broken(place, kind, lambda folder: _entry(line, lab, kind, (name, password), folder))
            entry = _entry(line, lab, kind, (name, password), place.folder)
            with _valid(), reachable(settings), place.prepared(entry), entered(engine, name, password):
                pass
    finally:
        engine.dispose()
    service, diagnosis = _serve(place, entry)
    embedded = place.home / "loractl.db"
    return JoinAnswer(
        kind=kind, name=name, host=line.host, file=str(place.file), service=service, diagnosis=diagnosis,
        embedded=str(embedded) if embedded.exists() else None,
    )  # fmt: skip


@contextlib.contextmanager
def _valid() -> Iterator[None]:
    """In the database, a used line is a login that may not connect."""
    try:
        yield
    except ServiceUnreachable as error:
        if not isinstance(error, ServiceRefused):
            error.hint = "does this machine reach that address? A firewall, another network, or the server box is off"
            raise
        what = "the database refuses this join line: it was used, has expired, or was revoked"
        raise WrongState(what, "on the server box: loractl lab invite") from error


def _opened(line: JoinLine, invited: Invited) -> LabAddresses:
    try:
        return read_addresses(line.unseal(invited.sealed))
    except ValueError as error:
        raise WrongState("what the database keeps for this line was changed", "loractl lab invite") from error


def _place(kind: str, wish: JoinWish) -> Place:
    if kind == "box" and wish.service and os.geteuid() == 0:
        return SERVICE
    home = Path(os.environ.get("LORACTL_HOME") or "~/.loractl").expanduser().absolute()
    return Place(folder=home, home=home, service=False)


def _entry(line: JoinLine, lab: LabAddresses, kind: str, login: tuple[str, str], folder: Path) -> Membership:
    """What to write about the lab, with certificates in the folder. `login`: name and password."""
    tls, redis_url, certificates = urls_with_certificates(lab, folder)
    return Membership(
        database_url=line.url(*login, tls),
        redis_url=redis_url,
        artifacts_url=lab.artifacts_url,
        host=login[0] if kind == "box" else None,
        s3=lab.s3,
        files=certificates,
    )


def _own_name(kind: str) -> str:
    """The machine's or the person's name; after sudo, root is still that person."""
    own = socket.gethostname().partition(".")[0] if kind == "box" else os.environ.get("SUDO_USER") or getpass.getuser()
    return re.sub(r"[^a-z0-9_.-]", "-", own.lower())


def _refuse_broken(place: Place, kind: str, membership_in: Callable[[Path], Membership]) -> None:
    """Raises LoractlError for the first thing that would not work; certificates are in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="loractl-join-") as folder:
        Path(folder).chmod(0o755)  # the service's user reads them
        entry = membership_in(Path(folder))
        for path, text in entry.files.items():
            path.write_text(text)
            path.chmod(0o644)
        found = diagnosed(place, entry.variables(), BEFORE)
    for condition in found.conditions:
        if kind == "box" and condition.check == "store" and "takes no results" in condition.sentence:
            hint = f"a box stores results: {right_to_results(entry.artifacts_url)}"
            raise LoractlError(f"store: {condition.sentence}", hint)
        if condition.level is Level.ERROR:
            hint = f"{condition.hint or 'fix it'}; then try again: nothing was changed here, and the line still works"
            raise LoractlError(f"{condition.check}: {condition.sentence}", hint)


def _serve(place: Place, entry: Membership) -> tuple[str | None, Diagnosis]:
    """Start the service if all is well; returns what doctor finds before the worker takes the cards."""
    if place.service:
        install_unit()
    diagnosis = diagnosed(place, entry.variables())
    if not place.service:
        return None, diagnosis
    if not (diagnosis.ok and systemd_runs()):
        return "installed", diagnosis
    start_service()
    return "started", diagnosis


UNIT = "loractl-worker.service"
_IN_THE_FILE = "/opt/loractl/bin/loractl"


def command_here() -> Path:
    """This installation's loractl."""
    return Path(sys.executable).with_name("loractl")


def unit_text(command: Path) -> str:
    """The unit, for this installation's command."""
    return files(__package__).joinpath(UNIT).read_text("utf-8").replace(_IN_THE_FILE, str(command))


@contextlib.contextmanager
def service_user() -> Iterator[None]:
    """The worker's user and its home: created if missing, and removed again if the body fails."""
    made = not _has_user()
    if made:
        run("groupadd", "--system", "--force", SERVICE_USER)  # a store that is a folder may have it
        run(
            "useradd", "--system", "--gid", SERVICE_USER, "--create-home", "--home-dir", str(SERVICE_HOME), SERVICE_USER
        )
        SERVICE_HOME.chmod(0o700)
    try:
        yield
    except BaseException:
        if made:
            number = grp.getgrnam(SERVICE_USER).gr_gid
            run("userdel", "--remove", SERVICE_USER)
            run("groupadd", "--system", "--force", "--gid", str(number), SERVICE_USER)  # userdel takes it, too
        raise


def install_unit(folder: Path = Path("/etc/systemd/system")) -> Path:
    """Put the unit where systemd reads it; an owner's own lines belong in a drop-in next to it."""
    file = folder / UNIT
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(unit_text(command_here()))
    return file


def systemd_runs() -> bool:
    """Whether this machine was started by systemd; a container mostly was not (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def start_service() -> None:
    """Start it now and at boot. Raises LoractlError."""
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", UNIT)
    run("systemctl", "restart", UNIT)


def _has_user() -> bool:
    try:
        pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return False
    return True
