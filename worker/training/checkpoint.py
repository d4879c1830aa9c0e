"""Checkpoints that can be trusted: transformers' own files, closed by a marker; the newest valid one is found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "loractl-complete.json"
"""Written last: file sizes, step and what the checkpoint belongs to. A folder without it is torn."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    finished: bool  # of the training's last step
    proof: float | None = None  # what the saved model's loss on the proof rows was


PROOF_TOLERANCE = 0.01
"""Share by which the resumed model's loss on the proof rows may differ: other cards and precisions round differently,
another base or a damaged adapter is far beyond."""


def close_checkpoint(
    folder: Path, *, step: int, finished: bool, belongs_to: dict[str, str], proof: float | None = None
) -> None:
    """Write the marker, once every file is on the disk.

    `belongs_to`: what a resume must share, by name: base, lora, training (the effective batch included), method, data.
    """
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    for name in files:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    aside = folder / f".{MARKER}"
    with aside.open("w") as stream:
        marker = {"step": step, "finished": finished, "belongs_to": belongs_to, "proof": proof, "files": files}
        json.dump(marker, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(folder / MARKER)


def newest_checkpoint(
    folders: list[Path], belongs_to: dict[str, str], refused: Callable[[int, list[str]], None] = lambda step, why: None
) -> Checkpoint | None:
    """The complete checkpoint with the most steps below `folders` that belongs to this very training.

    `refused` is told of each complete one that does not: its step, and what differs.
    """
    found = [
        c
        for folder in folders
        for path in folder.glob("checkpoint-*")
        if (c := _read(path, belongs_to, refused)) is not None
    ]
    return max(found, key=lambda c: c.step, default=None)


def is_complete(folder: Path) -> bool:
    """True when the checkpoint's marker is there and every file has the size that it names."""
    return _marker(folder) is not None


def withdraw(checkpoint: Checkpoint) -> None:
    """Take the marker off a checkpoint that does not hold what it says: it is torn from now on."""
    (checkpoint.path / MARKER).unlink(missing_ok=True)


def _read(path: Path, belongs_to: dict[str, str], refused: Callable[[int, list[str]], None]) -> Checkpoint | None:
    marker = _marker(path)
    if marker is None:
        return None
    theirs, step = marker["belongs_to"], marker["step"]
    differing = sorted(name for name in theirs.keys() | belongs_to.keys() if theirs.get(name) != belongs_to.get(name))
    if differing:
        refused(step, differing)
        return None
    return Checkpoint(path=path, step=step, finished=bool(marker["finished"]), proof=marker.get("proof"))


def _marker(path: Path) -> dict[str, Any] | None:
    """What a complete checkpoint's marker says; None for a torn one."""
    try:
        marker = json.loads((path / MARKER).read_text())
        complete = all((path / name).stat().st_size == size for name, size in marker["files"].items())
        checked = {**marker, "belongs_to": dict(marker["belongs_to"]), "step": int(marker["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return checked if complete else None
