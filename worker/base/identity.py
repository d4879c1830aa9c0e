"""The identity of a base model: the hub's commit, and the hashes of the files that were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loractl.common.fingerprint import digest, fingerprint

from .hub import pin


def identify(base_model: str, revision: str | None, cache: Path) -> dict[str, Any]:
    """What the report says about the base model once it is loaded: `commit` (None for a folder), `files` and one sha256
    for all of them."""
    pinned = None if Path(base_model).is_absolute() else pin(base_model, revision)
    files = fingerprint(Path(base_model) if pinned is None else pinned.folder, cache)
    return {"commit": None if pinned is None else pinned.commit, "sha256": digest(files), "files": files}
