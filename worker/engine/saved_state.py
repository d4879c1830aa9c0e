"""A snapshot: what a checkpoint holds of a member, its adapter and its state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loractl.common.job.status import Reason
from loractl.worker.base.adapter import WEIGHTS, load_weights, save_weights
from loractl.worker.base.failure import TrainingFailed

from .state import read_state, write_state


def write_snapshot(model: Any, state: dict[str, Any], folder: Path) -> None:
    """Write the model's adapter and the state into `folder`. Nothing counts before the folder is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    write_state(folder, state)


def read_snapshot(model: Any, folder: Path) -> dict[str, Any]:
    """Load the adapter of `folder` into the model. Returns the state. Raises TrainingFailed where the adapter has
    other tensors than the model's, OSError and ValueError where the files can't be read."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    load_weights(model, folder / WEIGHTS)
    saved, now = load_file(folder / WEIGHTS), get_peft_model_state_dict(model)
    wrong = sorted(saved.keys() ^ now.keys())
    wrong += [name for name in saved.keys() & now.keys() if not torch.equal(saved[name], now[name].cpu())]
    if wrong:
        what = f"the checkpoint's adapter is not that of this training: {wrong[0]} differs"
        raise TrainingFailed(Reason.TRAINER_ERROR, what)
    return read_state(folder)


def drop_older(folder: Path, kept: int) -> None:
    """Remove all but the newest checkpoints below `folder`."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found[:-kept]:
        shutil.rmtree(path, ignore_errors=True)
