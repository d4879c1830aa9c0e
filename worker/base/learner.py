"""The model that learns, beside what it is never without."""

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
