"""What a training asks of its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from loractl.worker.data.tokens import TokenRow
from loractl.worker.engine.loss import Backward, Loss, MicroBatch


class ForwardPass(Protocol):
    """How losses and gradients are computed."""

    model: Any
    device: torch.device

    @property
    def loss(self) -> Loss:
        """The loss that rows are trained with."""

    def recompute_blocks(self, every: int = 1) -> None:
        """Hold the activations of each block (1), or of every second one (2), only in the backward pass."""

    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients. Returns its share of the window's mean loss, in nats, without a graph."""

    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The loss of one batch of held-out rows, not smoothed and summed over what it counts, for a model in eval
        mode."""

    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model."""
