"""The identity of a base model: the hub's commit, and the hashes of the files that were loaded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from loractl.common.fingerprint import SUFFIXES, Fingerprint, digest, fingerprint

from .hub import pin


def identify(base_model: str, revision: str | None, cache: Path) -> dict[str, Any]:
    """The identity of a base model, waited for."""
    return BaseIdentity(base_model, revision, cache).wait()


def traits_of(base_model: str, revision: str | None) -> tuple[Any, ...]:
    """What changes when a base's files do: the folder, and name, size and times of each. Raises OSError."""
    folder = Path(base_model) if Path(base_model).is_absolute() else pin(base_model, revision).folder
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    facts = [(path.name, path.stat()) for path in files]
    seen = tuple((name, f.st_size, f.st_mtime_ns, f.st_ctime_ns, f.st_ino) for name, f in facts)
    return str(folder.resolve()), *seen


class BaseIdentity:
    """Hashes a base model's files beside its training: a card must not wait minutes for a sum of 140 GB.

    Begin it when the base is loaded: until then its files may still be on their way from the hub.
    """

    def __init__(self, base_model: str, revision: str | None, cache: Path) -> None:
        pinned = None if Path(base_model).is_absolute() else pin(base_model, revision)
        self._commit = None if pinned is None else pinned.commit
        self._folder = Path(base_model) if pinned is None else pinned.folder
        self._cache = cache
        self._files: Fingerprint = {}
        self._error: Exception | None = None
        # it dies with the process: a job that fails must not wait for it
        self._thread = threading.Thread(target=self._hash, name="identity", daemon=True)
        self._thread.start()

    def wait(self) -> dict[str, Any]:
        """What the report says about the base model: `commit` (None for a folder), `files` and one sha256 for all of
        them. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return {"commit": self._commit, "sha256": digest(self._files), "files": self._files}

    def _hash(self) -> None:
        try:
            self._files = fingerprint(self._folder, self._cache)
        except Exception as error:  # noqa: BLE001  raised again where it is waited for
            self._error = error
