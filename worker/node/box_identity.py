"""What distinguishes this box from another one with the same name, such as a copy of its home, its machine or its
container."""

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
    """This box's identity. Its permanent number is drawn at the first call and stored in the home.

    Raises LoractlError if the number can't be written there.
    """
    file = settings.runtime_dir / "instance"
    try:
        if not _read(file):  # a full disk leaves an empty one
            _draw(file)
    except OSError as error:
        raise LoractlError(
            f"{file} can't be written: {error.strerror}", "free space there, or repair its disk"
        ) from error
    machine = next((text for path in _MACHINE if (text := _read(path))), "")
    # a copy of the file on the same machine, as in a container, has another inode
    return BoxIdentity(
        instance=file.read_text(), machine=_mark(machine), boot=_mark(f"{_read(_BOOT)} {file.stat().st_ino}")
    )


def _draw(file: Path) -> None:
    """Draw the number. The nodes of a box may do so at the same time: the first one wins, and none reads half of it."""
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
    """The file's text; empty if the system has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mark(text: str) -> str:
    """A machine's own id must not leave it (machine-id(5)); a hash of it identifies the machine just as well."""
    return hashlib.sha256(f"loractl {text}".encode()).hexdigest()[:32]
