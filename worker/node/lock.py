"""Who serves a device: one node of this box at a time, by a lock; and one box of each name, by what distinguishes it
from another one, such as a copy of its home, its machine or its container."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from loractl.common.errors import LoractlError
from loractl.common.settings import Settings
from loractl.common.store.records import BoxIdentity
from loractl.worker.device.devices import Device

log = logging.getLogger("loractl.worker")


class DeviceLock:
    """Takes the lock, and holds it while this process lives. Waits, with a log line, while another process has it.

    Two nodes on one device would both count on the same free memory.
    """

    def __init__(self, settings: Settings, device: Device) -> None:
        path = _path(settings, device)
        self._file = path.open("a")
        self._said = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another worker serves this device, or finishes its last job: waiting for it (%s)", path)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._sign = _put_up_sign(device)

    def say_served(self) -> None:
        """Note in the file that this process serves the device, so that its end does not count as a failed start."""
        if not self._said:
            self._said = True
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._sign is not None:
            self._sign.close()


@contextlib.contextmanager
def unserved(settings: Settings, device: Device) -> Iterator[bool]:
    """Whether no node of this home serves the device. If so, none can begin to until the block ends."""
    with _path(settings, device).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def served_by(settings: Settings, device: Device) -> int | None:
    """The PID of the last process that served the device; None before the first."""
    try:
        return int(_path(settings, device).read_text())
    except (FileNotFoundError, ValueError):
        return None


def is_served(uuid: str) -> bool:
    """Whether a node of any user and any home on this machine serves the card. Other users' locks may be unreadable,
    so each node also binds a socket.

    Containers with a network of their own don't see each other's sockets.
    """
    try:
        return any(line.split()[-1] == f"@{_SIGN}{uuid}" for line in Path("/proc/net/unix").read_text().splitlines())
    except OSError:
        return False


_SIGN = "loractl-card-"


def _put_up_sign(device: Device) -> socket.socket | None:
    """Bind an abstract socket with the device's name, which ends with this process. Nothing is ever sent to it."""
    if device.kind != "cpu" and not device.uuid.startswith(("GPU-", "MIG-")):
        return None  # simulated cards need not belong to one worker
    sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sign.bind(f"\0{_SIGN}{device.uuid}")
    except OSError as error:
        sign.close()
        if error.errno == errno.EADDRINUSE:
            what, cost = "card", ""
            if device.kind == "cpu":  # not refused: a demo next to a lab's worker is slow but does no harm
                what, cost = "processor", "; both start as many threads as it has cores"
            shared = f"a worker of another LORACTL_HOME serves this {what}, too"
            log.warning("%s: neither knows what memory the other promised%s", shared, cost)
        return None
    return sign


def _path(settings: Settings, device: Device) -> Path:
    return settings.runtime_dir / f"node-{device.uuid}.lock"


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
