"""What an adapter says of one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A label with its probability, an answer with its ending, or why there is neither."""

    row: int  # its line in jsonl, else its place, from 1
    label: str | None = None
    probability: float | None = None
    answer: str | None = None
    ended: str | None = None  # stop or length
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What is known of the row; keys without a value are left out."""
        return {key: value for key, value in vars(self).items() if value is not None}
