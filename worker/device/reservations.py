"""Card memory reserved by processes of this box that are no jobs (`generate`, `chat`, `serve`).

Each has a file under LORACTL_HOME, which it keeps locked. The lock ends with its process, however that ends. A node
reads the files whenever it looks at its card, so a claim can't give away what is reserved but not yet allocated.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loractl.common.settings import make_private

from .snapshot import Process


@dataclass(frozen=True, kw_only=True)
class CardShare:
    """A process's share of a card. It lasts while the file is open."""

    pid: int
    bytes: int
    file: IO[str]
    path: Path

    def close(self) -> None:
        """Release it before the process ends."""
        self.path.unlink(missing_ok=True)
        self.file.close()


def reserve(home: Path, uuid: str, size: int) -> CardShare:
    """Reserve `size` bytes of a card for this process. Raises OSError."""
    folder = _folder(home, uuid)
    make_private(folder)
    path = folder / f"{os.getpid()}.json"
    aside = path.with_suffix(".part")
    file = aside.open("w", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump({"pid": os.getpid(), "bytes": size}, file)
    file.flush()
    aside.replace(path)  # it appears locked and complete; the lock belongs to the file, whatever its name
    return CardShare(pid=os.getpid(), bytes=size, file=file, path=path)


def unused_reservations(home: Path, uuid: str, processes: Iterable[Process] | None, outside: int) -> int:
    """Bytes that are reserved but not yet held by their processes.

    `processes`: what the driver reports on the card; None if it does not say whose memory is whose. Then `outside`,
    which is not held by our jobs, counts as theirs.
    """
    reserved = reserved_by_process(home, uuid)
    if processes is None:
        return max(0, sum(reserved.values()) - outside)
    held = {process.pid: process.bytes or 0 for process in processes}
    return sum(max(0, size - held.get(pid, 0)) for pid, size in reserved.items())


def reserved_by_process(home: Path, uuid: str) -> dict[int, int]:
    """pid -> bytes of the live processes."""
    return dict(_living(home, uuid))


def _living(home: Path, uuid: str) -> Iterator[tuple[int, int]]:
    for path in _folder(home, uuid).glob("*.json"):
        try:
            with path.open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    kept = json.load(file)
                    yield int(kept["pid"]), int(kept["bytes"])
                else:
                    path.unlink(missing_ok=True)  # its process has ended
        except FileNotFoundError:
            continue  # it ended in between


def _folder(home: Path, uuid: str) -> Path:
    return home / "cards" / uuid
