"""Random streams: everything a training draws from, as a checkpoint keeps it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_streams(seed: int) -> None:
    """Reseed every stream of this process."""
    from transformers import set_seed

    set_seed(seed)


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
