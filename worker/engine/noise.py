"""NEFTune (arXiv:2310.05914): noise on the embeddings while training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def noisy_embeddings(model: Any, alpha: float | None) -> Iterator[None]:
    """Add uniform noise of magnitude alpha / sqrt(length x width) to the embeddings of a model in training mode."""
    if alpha is None:
        yield
        return

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        most = alpha / torch.sqrt(torch.tensor(output.size(1) * output.size(2)))
        return output + torch.zeros_like(output).uniform_(-most, most)

    hook = model.get_base_model().get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
