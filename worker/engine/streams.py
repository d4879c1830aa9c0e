"""Random streams: everything a training draws from, separate for each training though they take turns in one
process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch


class RandomStreams:
    """The streams of one training. They are in the process's generators while it is at work, and kept here while
    another is, so that the other's draws do not affect them."""

    _at_work: ClassVar[RandomStreams | None] = None  # whose streams are in the process's generators

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, Any] = {}  # while another training is at work; empty: it has not drawn yet
        self.over = False  # they are no longer needed

    def take_over(self) -> None:
        """Call it before the training does anything that may draw. It costs nothing if no other training came in
        between."""
        before = RandomStreams._at_work
        if before is self:
            return
        if before is not None and not before.over:
            before._kept = read_streams(before._device)
        if self._kept:
            restore_streams(self._kept, self._device)
        RandomStreams._at_work = self

    @classmethod
    def at_work(cls) -> RandomStreams | None:
        """Whose streams are in the process's generators."""
        return cls._at_work

    @contextlib.contextmanager
    def drawing(self) -> Iterator[torch.Generator]:
        """A generator that draws this training's next torch numbers, whichever training is at work. Draws before an
        error do not count."""
        if not self._kept:
            self.take_over()
        generator = torch.Generator(self._device)
        name = "cuda" if self._device.type == "cuda" else "torch"
        if RandomStreams._at_work is self:
            generator.set_state(_torch_state(self._device))
            yield generator
            _set_torch_state(generator.get_state(), self._device)
        else:
            generator.set_state(self._kept[name])
            yield generator
            self._kept[name] = generator.get_state()


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


def _torch_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_torch_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
