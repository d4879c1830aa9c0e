"""The model that learns, with its tokenizer and its number formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .arithmetic import Precision


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """Some learned tokens of some rows, of shape (tokens,)."""

    rows: torch.Tensor  # the index of each token's row
    targets: torch.Tensor
    losses: torch.Tensor  # in nats, fp32
    right: torch.Tensor  # whether it was the likeliest token


class Scorer(Protocol):
    """Scores rows without computing logits for tokens that are not learned."""

    def scores(self, rows: Sequence[Any]) -> Sequence[ScoredTokens]:
        """Every learned token of some rows, for a model in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A base model with its adapter, its tokenizer, and its number formats."""

    model: Any
    tokenizer: Any
    precision: Precision
    scorer: Scorer | None = None  # None: the model itself, with padding and all logits
    started: Sequence[torch.Tensor] | None = None
    """The adapter's first weights, in main memory, if it is compared with these; None: it is compared with the bare
    base."""

    @property
    def compared_with(self) -> str:
        """What "base" means in its report."""
        return "the base" if self.started is None else "the starting adapter"
