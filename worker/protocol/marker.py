"""The marker that closes a checkpoint: a folder without one, or with files other than it names, is incomplete."""

from __future__ import annotations

import json
import os
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
