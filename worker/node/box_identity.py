"""What tells this box from another one with the same name, as of a copied home, a copied machine or a container."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from pathlib import Path

from loractl.common.errors import LoractlError
from loractl.common.settings import Settings
from loractl.common.store.records import BoxIdentity

_MACHINE = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def read_identity(settings: Settings) -> BoxIdentity:
    """This box's identity. What names it for life is drawn at the first call, and kept in the home.

    Raises LoractlError where the home's disk does not take it.
    """
    file = settings.runtime_dir / "instance"
    try:
        if not _read(file):  # an empty one is what a full disk left
            _draw(file)
    except OSError as error:
        raise LoractlError(
            f"{file} can't be written: {error.strerror}", "free space there, or repair its disk"
        ) from error
    machine = next((text for path in _MACHINE if (text := _read(path))), "")
    # a copy of the file on the same machine, as of a container, has another number
    return BoxIdentity(
        instance=file.read_text(), machine=_mark(machine), boot=_mark(f"{_read(_BOOT)} {file.stat().st_ino}")
    )


def _draw(file: Path) -> None:
    """Draw the number. The nodes of a box do so at once: the first one's stays, and no half of it is ever read."""
    number = uuid.uuid4().hex
    new = file.with_name(f"{file.name}.{number}")
    try:
        new.write_text(number)
        if file.exists() and not _read(file):
            new.replace(file)
        else:
            with contextlib.suppress(FileExistsError):
                file.hardlink_to(new)
    finally:
        new.unlink(missing_ok=True)


def _read(path: Path) -> str:
    """Its text; empty where a system has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mark(text: str) -> str:
    """A machine's own number is not for the network (machine-id(5)): a hash of it tells as much."""
    return hashlib.sha256(f"loractl {text}".encode()).hexdigest()[:32]
