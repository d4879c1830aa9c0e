"""Files that jobs leave in the box's cache for later ones. The database knows their hashes, and the order names them:
nothing else there is believed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loractl.common.units import MIB
from loractl.worker.protocol.messages import KnownFile

MOST_FILES, MOST_BYTES = 256, 512 * MIB
"""What stays of one kind on a box. The files that were not used for the longest time make room."""

MOST_OF_ONE = 64 * MIB
"""Of a file. The largest are scores of pairs: 32 bytes each."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file that is as its job wrote it."""

    content: bytes
    file: KnownFile
    path: Path


@dataclass(frozen=True, kw_only=True)
class BoxCache:
    """Small files of one kind, each named by its content's hash: two jobs that write the same key at once write two
    files, and the database names one.

    `about`: what decides every file's content besides what its reader asks. `tell(key, sha256)` reports a new file,
    `note` adds a line to the job's history.
    """

    folder: Path
    known: Sequence[KnownFile]
    about: Sequence[object]
    tell: Callable[[str, str], None]
    note: Callable[[str], None]

    def key(self, question: object) -> str:
        """A hash of all that decides a file's content."""
        return hashlib.sha256(repr([question, *self.about]).encode()).hexdigest()

    def read(self, key: str) -> Found | None:
        """The file with this key; None: there is none, or not as it was written."""
        file = next((file for file in self.known if file.key == key), None)
        if file is None or not re.fullmatch("[0-9a-f]{64}", file.sha256):
            return None
        path = self.folder / file.sha256
        try:
            with path.open("rb") as stream:
                content = stream.read(MOST_OF_ONE + 1)
            os.utime(path)  # a file that is not used for long goes first
        except FileNotFoundError:  # it made room for others
            return None
        except OSError as error:
            self.note(f"{path} can't be read: {error.strerror}")
            return None
        if hashlib.sha256(content).hexdigest() != file.sha256:
            self.drop(path, "it is not as it was written")
            return None
        return Found(content=content, file=file, path=path)

    def drop(self, path: Path, why: str) -> None:
        """Throw a file away, and say why in the history."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self.note(f"{path} is thrown away: {why}")

    def write(self, key: str, content: bytes) -> None:
        """Leave a file for later jobs on this box. On a full disk there is none."""
        if len(content) > MOST_OF_ONE:
            return
        sha256 = hashlib.sha256(content).hexdigest()
        aside = self.folder / f"part-{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(content)
            aside.replace(self.folder / sha256)
            self._make_room()
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.note(f"nothing is left for later jobs in {self.folder}: {error.strerror}")
            return
        self.tell(key, sha256)

    def _make_room(self) -> None:
        """Remove the files that nobody has used for the longest time."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another trainer has just removed it
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        held = 0
        for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
            held += size
            if number >= MOST_FILES or held > MOST_BYTES:
                path.unlink(missing_ok=True)
