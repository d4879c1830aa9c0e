"""The worker as a systemd service, with the package's unit: its user, its file, its start."""

from __future__ import annotations

import contextlib
import grp
import pwd
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from .place import SERVICE_HOME, SERVICE_USER
from .process import run

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
