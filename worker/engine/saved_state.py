"""A training's part of a checkpoint: its adapter, and its state, random streams included, as a JSON file with its shape
and numbers and a safetensors file with its tensors.

No pickle: what others wrote into a checkpoint can't run code. Numbers are restored bit for bit: JSON has all their
digits.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loractl.common.job.status import Reason
from loractl.worker.base.adapter import WEIGHTS, differing, load_weights, save_weights
from loractl.worker.base.failure import TrainingFailed

STATE, TENSORS = "training_state.json", "training_state.safetensors"

FORMAT = "1"
"""Raised when a newer loractl can't resume from what an older one wrote."""

Parts = dict[str, torch.Tensor]


def write_snapshot(model: Any, state: dict[str, Any], folder: Path) -> None:
    """Write the model's adapter and the state into `folder`: dicts, lists, tuples, tensors, numbers and text. It does
    not count until the folder is closed. Raises TypeError for other values."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    tensors: Parts = {}
    text = json.dumps(_packed(state, tensors, {}))
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(text, "utf-8")


def read_snapshot(model: Any, folder: Path) -> dict[str, Any]:
    """Load the adapter of `folder` into the model. Returns the state, its tensors on the CPU. Raises TrainingFailed if
    the adapter's tensors differ from the model's, OSError and ValueError if the files can't be read."""
    load_weights(model, folder / WEIGHTS)
    if wrong := differing(model, load_file(folder / WEIGHTS)):
        what = f"the checkpoint's adapter is not that of this training: {wrong[0]} differs"
        raise TrainingFailed(Reason.TRAINER_ERROR, what)
    state: dict[str, Any] = _unpacked(json.loads((folder / STATE).read_text("utf-8")), load_file(folder / TENSORS))
    return state


def drop_older(folder: Path, kept: int) -> None:
    """Remove all but the newest checkpoints below `folder`."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found[:-kept]:
        shutil.rmtree(path, ignore_errors=True)


def _packed(value: Any, tensors: Parts, known: dict[int, str]) -> Any:
    """`value` as JSON; each tensor goes into `tensors` once: optimizers share tables among all parameters."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        name = known.setdefault(id(value), str(len(known)))
        tensors.setdefault(name, value.detach().cpu().clone().contiguous())
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(inner, tensors, known)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        inner = [_packed(part, tensors, known) for part in value]
        return {"tuple": inner} if isinstance(value, tuple) else inner
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: Parts) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpacked(part, tensors) for part in inner)
    return {key: _unpacked(part, tensors) for key, part in inner}


def read_streams(device: torch.device) -> dict[str, Any]:
    """The positions of Python's, NumPy's and torch's streams."""
    kind, key, place, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(key).astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_streams(state: dict[str, Any], device: torch.device) -> None:
    """Restore the streams to where `read_streams` found them. A stream of a missing device is skipped."""
    kind, key, place, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, key.numpy().astype(np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
