"""Losses: what a window of micro-batches is averaged over, smoothed labels, and a classifier's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loractl.worker.data.tokens import IGNORED, TokenRow

Backward = Callable[[torch.Tensor], None]
"""The backward pass of a loss, scaled where float16 needs that."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that one forward pass learns from, and the window of micro-batches whose gradients make one step."""

    rows: list[TokenRow]
    learned: int  # tokens, or a classifier's rows, of the whole window: the loss is their mean
    pieces: int  # micro-batches of the window
    number: int = 0  # its place in the window
    divided: bool = False  # its rows are one rank's part of it

    @property
    def is_last(self) -> bool:
        """Whether a step follows it."""
        return self.number == self.pieces - 1


def learned_in(rows: Sequence[TokenRow]) -> int:
    """Tokens that rows are learned from, or the rows themselves where each has a label. No token precedes a row's
    first one, so nothing learns to guess it."""
    return sum(1 if row.label is not None else sum(label != IGNORED for label in row.labels[1:]) for row in rows)


def smoothed(logits: torch.Tensor, labels: torch.Tensor, learned: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy with smoothed labels (arXiv:1512.00567), summed over learned tokens and divided by `learned`."""
    logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    negative = -torch.nn.functional.log_softmax(logits, dim=-1)
    labels = labels.unsqueeze(-1)
    ignored = labels.eq(IGNORED)
    expected = negative.gather(dim=-1, index=torch.clamp(labels, min=0))
    every = negative.sum(dim=-1, keepdim=True, dtype=torch.float32)
    expected.masked_fill_(ignored, 0.0)
    every.masked_fill_(ignored, 0.0)
    spread = every.sum() / (learned * negative.shape[-1])
    return (1 - smoothing) * (expected.sum() / learned) + smoothing * spread


def classified(logits: torch.Tensor, labels: torch.Tensor, learned: torch.Tensor, smoothing: float) -> torch.Tensor:
    """A classifier's cross-entropy, summed over its rows and divided by `learned`.

    transformers' own is the mean of each micro-batch: gradients would be as many times too large as a step accumulates.
    """
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    return total / learned


def accepts_window(model: Any) -> bool:
    """Whether a model's own loss can be averaged over more than its micro-batch."""
    base = model.get_base_model()
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    kinds = {parameter.kind for parameter in inspect.signature(base.forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


class LossLog:
    """The losses since the last line of the log, summed where they were computed: reading one waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.tensor(0.0, device=device)
        self._told = 0.0  # the sum of what was told
        self._last = 0  # the step that was told last

    def add(self, loss: torch.Tensor) -> None:
        self._sum += loss

    def take(self, step: int) -> float:
        """The mean loss of the steps since the last line."""
        total = float(self._sum.item())
        self._sum -= self._sum
        mean = total / (step - self._last)
        self._told += total
        self._last = step
        return mean

    def mean(self, steps: int) -> float:
        """The mean loss of all steps that were counted, of which there are `steps`."""
        return (self._told + float(self._sum.item())) / max(1, steps)

    def state(self) -> dict[str, Any]:
        return {"sum": self._sum.clone(), "told": self._told, "last": self._last}

    def restore(self, state: dict[str, Any]) -> None:
        self._sum = state["sum"].to(self._sum.device).clone()
        self._told, self._last = state["told"], state["last"]
