"""Complete checkpoints on the disk: the newest of this same training, by its marker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loractl.worker.protocol.marker import read_marker


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
