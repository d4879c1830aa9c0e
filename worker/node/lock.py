"""A device's lock: only one node of this box serves it at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from loractl.common.settings import Settings
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
