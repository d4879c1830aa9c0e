"""What one row teaches, in any format."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What one row teaches: a conversation, a prompt with its completion, plain text, or a text's label.

    Exactly one of `turns` and `text` is set; `prompt` is the part of `text` that is given, not learned. With a `label`
    all of the text is given.
    """

    number: int
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    text: str = ""
    label: str | None = None

    def content_hash(self) -> str:
        """Equal for rows that teach the same, in any place."""
        return self._hash().hexdigest()

    def digest(self) -> int:
        """The first 64 bits of the hash: they sort as it does, and a million of them take little room."""
        return int.from_bytes(self._hash().digest()[:8], "big")

    def _hash(self) -> hashlib._Hash:
        content: list[Any] = [[(t.role, t.content) for t in self.turns], self.prompt, self.text]
        content += [] if self.label is None else [self.label]
        return hashlib.sha256(json.dumps(content).encode())
