"""What one row teaches, in any format."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

_BETWEEN_DIGITS = re.compile(r" (?<=[0-9] )(?=[0-9])")


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

    def likeness(self) -> int:
        """64 bits that are equal for rows which differ in case or spaces alone: a model that learned one knows both.

        A space between two digits counts, and so does a classifier's label as it is.
        """
        parts = [part for turn in self.turns for part in (turn.role, _folded(turn.content))]
        parts += [_folded(self.text), "" if self.label is None else f"label {self.label}"]  # the prompt is in the text
        joined = "\x1f".join(parts).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(joined).digest()[:8], "big")

    def _hash(self) -> hashlib._Hash:
        content: list[Any] = [[(t.role, t.content) for t in self.turns], self.prompt, self.text]
        content += [] if self.label is None else [self.label]
        return hashlib.sha256(json.dumps(content).encode())


def _folded(text: str) -> str:
    """The text without case and spaces; between digits one space is left."""
    words = " ".join(text.casefold().split())
    return _BETWEEN_DIGITS.sub("\x1e", words).replace(" ", "")
