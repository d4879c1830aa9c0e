"""What tells this box from another one with the same name, as of a copied home, a copied machine or a container."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from pathlib import Path

from loractl.common.settings import Settings
from loractl.common.store.records import BoxIdentity

_MACHINE = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def read_identity(settings: Settings) -> BoxIdentity:
    """This box's identity. What names it for life is drawn at the first call, and kept in the home."""
    file = settings.runtime_dir / "instance"
    with contextlib.suppress(FileExistsError), file.open("x") as new:
        new.write(uuid.uuid4().hex)
    machine = next((text for path in _MACHINE if (text := _read(path))), "")
    # a copy of the file on the same machine, as of a container, has another number
    return BoxIdentity(
        instance=file.read_text(), machine=_mark(machine), boot=_mark(f"{_read(_BOOT)} {file.stat().st_ino}")
    )


def _read(path: Path) -> str:
    """Its text; empty where a system has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mark(text: str) -> str:
    """A machine's own number is not for the network (machine-id(5)): a hash of it tells as much."""
    return hashlib.sha256(f"loractl {text}".encode()).hexdigest()[:32]
