"""The model that learns, with its tokenizer and its number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arithmetic import Precision


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A base model with its adapter, its tokenizer, and the number formats that it computes in."""

    model: Any
    tokenizer: Any
    precision: Precision
