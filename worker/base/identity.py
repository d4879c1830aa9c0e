"""The identity of a base model: the hub's commit, and the hashes of the files that were loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loractl.common.fingerprint import SUFFIXES, Fingerprint, digest, fingerprint, may_be_published

from .hub import pin


def identify(base_model: str, revision: str | None, cache: Path) -> dict[str, Any]:
    """Waits for the identity of a base model."""
    return BaseIdentity(base_model, revision, cache).wait()


Traits = frozenset[tuple[Any, ...]]
"""Folder, name, size, times and inode of each of a base's files. If they are unchanged, so is the content; if not, the
content may still be: a link or a permission changes a file's times."""


def traits_of(base_model: str, revision: str | None) -> Traits:
    """The traits of a base's files, which change when the files do. Raises OSError."""
    return _traits(Path(base_model) if Path(base_model).is_absolute() else pin(base_model, revision).folder)


def _traits(folder: Path) -> Traits:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    facts, where = [(path.name, path.stat()) for path in files], str(folder.resolve())
    return frozenset((where, name, f.st_size, f.st_mtime_ns, f.st_ctime_ns, f.st_ino) for name, f in facts)


LOOK_S = 0.5
"""How often a wait for hashes checks whether to stop."""


class BaseIdentity:
    """Hashes a base model's files during its training: a card must not wait minutes for the hash of 140 GB.

    Start it when the base is loaded: until then its files may still be downloading from the hub.
    """

    def __init__(self, base_model: str, revision: str | None, cache: Path) -> None:
        pinned = None if Path(base_model).is_absolute() else pin(base_model, revision)
        self._commit = None if pinned is None else pinned.commit
        self._folder = Path(base_model) if pinned is None else pinned.folder
        self._cache = cache
        self._files: Fingerprint = {}
        self._traits: Traits | None = None  # of the files, the same before and after hashing; None: they changed
        self._error: Exception | None = None
        # it ends with the process: a failing job must not wait for it
        self._thread = threading.Thread(target=self._hash, name="identity", daemon=True)
        self._thread.start()

    def wait(self) -> dict[str, Any]:
        """What the report says about the base model: `commit` (None for a folder), `files`, one sha256 for all of them,
        and `publish: false` if an adapter that must stay in the lab is merged into it. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return {"commit": self._commit, "sha256": digest(self._files), "files": self._files, **self._terms()}

    def _terms(self) -> dict[str, bool]:
        return {} if may_be_published(str(self._folder)) else {"publish": False}

    def files_at(self, traits: Traits, check_stop: Callable[[], None]) -> Fingerprint | None:
        """Wait for the hashes of files with these traits; None: others were hashed, or none could be read. `check_stop`
        is called during the wait."""
        while self._thread.is_alive():
            check_stop()
            self._thread.join(LOOK_S)
        return self._files if self._error is None and self._traits == traits else None

    def _hash(self) -> None:
        try:
            before = _traits(self._folder)
            self._files = fingerprint(self._folder, self._cache)
            self._traits = before if _traits(self._folder) == before else None
        except Exception as error:  # noqa: BLE001  raised again where it is waited for
            self._error = error
