"""Checkpoints that can be trusted: transformers' own files, closed by a marker; the newest valid one is found."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

MARKER = "loractl-complete.json"
"""Written last: file sizes, step and what the checkpoint belongs to. A folder without it is torn."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    finished: bool  # of the training's last step


def close_checkpoint(folder: Path, *, step: int, finished: bool, belongs_to: str) -> None:
    """Write the marker, once every file is on the disk.

    `belongs_to` is a hash of all that a resume must share: spec (batch sizes included), method and data.
    """
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    for name in files:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    aside = folder / f".{MARKER}"
    with aside.open("w") as stream:
        json.dump({"step": step, "finished": finished, "belongs_to": belongs_to, "files": files}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(folder / MARKER)


def newest_checkpoint(folders: list[Path], belongs_to: str) -> Checkpoint | None:
    """The complete checkpoint with the most steps below `folders` that belongs to this very training."""
    found = [
        c for folder in folders for path in folder.glob("checkpoint-*") if (c := _read(path, belongs_to)) is not None
    ]
    return max(found, key=lambda c: c.step, default=None)


def _read(path: Path, belongs_to: str) -> Checkpoint | None:
    try:
        marker = json.loads((path / MARKER).read_text())
        complete = all((path / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    if not complete or marker["belongs_to"] != belongs_to:
        return None
    return Checkpoint(path=path, step=int(marker["step"]), finished=bool(marker["finished"]))
