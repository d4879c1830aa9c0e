"""Checkpoints on the disk, and the marker that closes one: a folder without a marker, or with files other than it
names, is incomplete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "loractl-complete.json"
"""Written last: file sizes, step and the training that the checkpoint belongs to."""


def close_checkpoint(
    folder: Path,
    *,
    step: int,
    finished: bool,
    belongs_to: dict[str, str],
    proof: float | None = None,
    optimizer: str | None = None,
    dtype: str | None = None,
    lean: bool | None = None,
) -> None:
    """Write the marker, once every file is on the disk.

    `belongs_to`: what a resume must share, by name: base, lora, training (including the effective batch), method, data.
    `optimizer`: the name of the optimizer whose state it holds. `dtype`: the number format of its products.
    `lean`: whether the lean pass trained it, or peft's own.
    """
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    for name in files:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    aside = folder / f".{MARKER}"
    with aside.open("w") as stream:
        facts = {"step": step, "finished": finished, "proof": proof, "optimizer": optimizer, "dtype": dtype}
        marker = {**facts, "lean": lean, "belongs_to": belongs_to, "files": files}
        json.dump(marker, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(folder / MARKER)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a complete checkpoint; None for an incomplete one."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        complete = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
        checked = {**marker, "belongs_to": dict(marker["belongs_to"]), "step": int(marker["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return checked if complete else None


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint has a marker, and every file has the size in it."""
    return read_marker(folder) is not None


def remove_marker(folder: Path) -> None:
    """Remove the marker: from now on the checkpoint counts as incomplete."""
    (folder / MARKER).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: adapter and state of the training, closed by a marker."""

    path: Path
    step: int
    finished: bool  # of the training's last step
    proof: float | None = None  # the saved model's loss on the proof rows
    optimizer: str | None = None  # the name of the optimizer whose state it holds
    lean: bool | None = None  # whether the lean pass trained it; None: an earlier version wrote it
    dtype: str | None = None  # bf16, fp16 or fp32, in which it was trained; None: an earlier version wrote it


def newest_checkpoint(
    folders: list[Path], belongs_to: dict[str, str], refused: Callable[[int, list[str]], None] = lambda step, why: None
) -> Checkpoint | None:
    """The complete checkpoint with the most steps below `folders` that belongs to this same training.

    `refused` is called for each complete checkpoint that does not: with its step, and what differs.
    """
    paths = [path for folder in folders for path in folder.glob("checkpoint-*")]
    ours = [checkpoint for path in paths if (checkpoint := _read(path, belongs_to, refused)) is not None]
    return max(ours, key=lambda checkpoint: checkpoint.step, default=None)


def _read(path: Path, belongs_to: dict[str, str], refused: Callable[[int, list[str]], None]) -> Checkpoint | None:
    marker = read_marker(path)
    if marker is None:
        return None
    theirs, step = marker["belongs_to"], marker["step"]
    differing = sorted(name for name in theirs.keys() | belongs_to.keys() if theirs.get(name) != belongs_to.get(name))
    if differing:
        refused(step, differing)
        return None
    known = {name: marker.get(name) for name in ("proof", "optimizer", "dtype", "lean")}
    return Checkpoint(path=path, step=step, finished=bool(marker["finished"]), **known)
