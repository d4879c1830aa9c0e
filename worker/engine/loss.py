"""Losses: functions of the log-probabilities of learned tokens, and what a window's loss is divided by. Forward passes
compute them."""

from __future__ import annotations

import bisect
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loractl.worker.data.tokens import IGNORED, TokenRow

Backward = Callable[[torch.Tensor], None]
"""The backward pass of a loss, scaled if float16 needs that."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that one forward pass learns from, and the window of micro-batches whose gradients make one step."""

    rows: list[TokenRow]
    learned: int  # of the whole window, as the loss counts them: their mean is learned
    answered: int = 0  # likewise of its second term, if it has one that is the mean of something else
    pieces: int  # micro-batches of the window
    number: int = 0  # its index in the window
    divided: bool = False  # its rows are one rank's part of it

    @property
    def is_last(self) -> bool:
        """Whether a step follows it."""
        return self.number == self.pieces - 1


def window_of(loss: Loss, pieces: Sequence[list[TokenRow]]) -> list[MicroBatch]:
    """The micro-batches of one window."""
    learned, answered = sum(map(loss.count, pieces)), sum(map(loss.count_answered, pieces))
    return [
        MicroBatch(rows=rows, learned=learned, answered=answered, pieces=len(pieces), number=number)
        for number, rows in enumerate(pieces)
    ]


def learned_in(rows: Sequence[TokenRow]) -> int:
    """The rows' learned tokens. No token precedes a row's first one, so it is never learned."""
    return sum(label != IGNORED for row in rows for label in row.labels[1:])


class RowLoss(ABC):
    """What rows are learned by. It keeps no state between calls: if a pass fails, the same rows are tried again."""

    def meet(self, rows: Sequence[TokenRow]) -> None:  # noqa: B027  most need to know nothing
        """Before a pass over rows: find out what must be known about them, which may run the model without a graph."""

    def forget(self) -> None:  # noqa: B027  the same
        """Micro-batches are other ones from now on, and what it has found out in the last ones may round otherwise."""

    def known(self, rows: Sequence[TokenRow]) -> list[Any]:
        """What it has found out about the rows that it has met, as JSON, for another process that learns from them."""
        return []

    def take(self, rows: Sequence[TokenRow], known: list[Any]) -> None:  # noqa: B027  the same
        """Instead of meeting rows: take what another process's loss knows about them."""

    @abstractmethod
    def count(self, rows: Sequence[TokenRow]) -> int:
        """The divisor of the loss of some rows, such as the number of pairs; 0 if nothing in them is learned."""

    def count_answered(self, rows: Sequence[TokenRow]) -> int:
        """The divisor of a second term, such as the number of tokens; 0 if the loss has none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(RowLoss):
    """The mean over learned tokens, whose slope is known in advance: the head runs once."""

    smoothing: float = 0.0  # of labels

    def count(self, rows: Sequence[TokenRow]) -> int:
        return learned_in(rows)

    @property
    def held_out(self) -> CrossEntropy:
        """The loss that measures held-out rows."""
        return CrossEntropy()

    def of_logits(self, logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The loss from the logits of padded rows, divided by `count`."""
        return smoothed(logits, labels, count, self.smoothing)


@dataclass(frozen=True, kw_only=True)
class LabelLoss(RowLoss):
    """A classifier's: the mean over its rows, from the logits of their labels."""

    smoothing: float = 0.0

    def count(self, rows: Sequence[TokenRow]) -> int:
        return sum(row.label is not None for row in rows)

    @property
    def held_out(self) -> LabelLoss:
        return LabelLoss()

    def of_logits(self, logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return classified(logits, labels, count, self.smoothing)


@dataclass(frozen=True, kw_only=True)
class LearnedTokens:
    """The positions of the learned tokens of some rows, row by row. Tensors of shape (tokens,)."""

    rows: Sequence[TokenRow]
    row_of: torch.Tensor  # the index of each token's row in `rows`
    example_of: torch.Tensor  # each token's example: 0, or 1 and up after the row's `starts`
    place: torch.Tensor  # its position in that row

    @classmethod
    def of(cls, rows: Sequence[TokenRow], device: torch.device) -> LearnedTokens:
        found = [
            (number, bisect.bisect(row.starts, at), at)
            for number, row in enumerate(rows)
            for at, label in enumerate(row.labels)
            if at and label != IGNORED
        ]
        row_of, example_of, place = torch.tensor(found, dtype=torch.int64, device=device).view(-1, 3).unbind(1)
        return cls(rows=rows, row_of=row_of, example_of=example_of, place=place)


class BentLoss(RowLoss):
    """Any function of the log-probabilities of a micro-batch's learned tokens, like DPO's. Each token's slope depends
    on all of them, so the head runs twice."""

    @abstractmethod
    def summed(self, logp: torch.Tensor, tokens: LearnedTokens) -> torch.Tensor:
        """The loss of some rows, summed over what `count` counts, so that no other row changes it. With a graph to the
        log-probabilities: in fp32, of shape (tokens,)."""

    def share(self, logp: torch.Tensor, tokens: LearnedTokens, batch: MicroBatch) -> torch.Tensor:
        """A micro-batch's share of its window's loss, where each term is a mean over the whole window: the shares add
        up to the same however the window is cut."""
        return self.summed(logp, tokens) / batch.learned


UNSMOOTHED = CrossEntropy()

TokenLoss = CrossEntropy | BentLoss
Loss = TokenLoss | LabelLoss


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

    transformers' own is the mean of each micro-batch: gradients would be too large by the number of accumulated
    micro-batches.
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
    """The losses since the last log line, summed on the device: reading one waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.tensor(0.0, device=device)
        self._told = 0.0  # the sum of the reported losses
        self._last = 0  # the last reported step

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
        """The mean loss of all `steps` counted steps."""
        return (self._told + float(self._sum.item())) / max(1, steps)

    def state(self) -> dict[str, Any]:
        return {"sum": self._sum.clone(), "told": self._told, "last": self._last}

    def restore(self, state: dict[str, Any]) -> None:
        self._sum = state["sum"].to(self._sum.device).clone()
        self._told, self._last = state["told"], state["last"]


class ForwardPass(ABC):
    """How losses and gradients are computed."""

    model: Any
    device: torch.device
    loss: Loss

    def recompute_blocks(self, every: int = 1) -> None:
        """Hold the activations of each block (1), or of every second one (2), only in the backward pass."""
        self.model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)

    @abstractmethod
    def learn(self, batch: MicroBatch, backward: Backward) -> torch.Tensor:
        """Leave a micro-batch's gradients. Returns its share of the window's mean loss, in nats, without a graph."""

    @abstractmethod
    def held_out_loss(self, rows: Sequence[TokenRow]) -> float:
        """The loss of one batch of held-out rows, not smoothed and summed over what it counts, for a model in eval
        mode."""

    @abstractmethod
    def tokens(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that pass the model."""
