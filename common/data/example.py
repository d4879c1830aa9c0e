"""What one row teaches, in any format."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

_BETWEEN_DIGITS = re.compile(r" (?<=[0-9] )(?=[0-9])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    thought: str = ""  # before the content: reasoning_content
    calls: str = ""  # tool_calls in OpenAI's form, as JSON
    name: str = ""  # of the tool that answers
    call_id: str = ""  # of the call that it answers
    learned: bool = True  # of an answer; false: its weight is 0

    @property
    def teaches(self) -> bool:
        """Whether it is an answer to learn."""
        return self.role == "assistant" and self.learned

    @property
    def said(self) -> str:
        """All that an answer says."""
        return "\n".join(part for part in (self.thought, self.content, self.calls) if part)

    @property
    def apart(self) -> tuple[str, ...]:
        """What it has besides role and content; empty for most."""
        kept = (self.thought, self.calls, self.name, self.call_id, "" if self.learned else "not learned")
        return kept if any(kept) else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What one row teaches: a conversation, a prompt with its completion, plain text, a text's label, or a pair.

    Exactly one of `turns` and `text` is set; `prompt` is the part of `text` that is given, not learned. With a `label`
    all of the text is given. A pair holds its chosen answer there.
    """

    number: int
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    text: str = ""
    label: str | None = None
    tools: str = ""  # that the answers may call, in OpenAI's form, as JSON
    rejected: str = ""  # of a pair: the answer that was not chosen, as text, or its turns as JSON

    @property
    def asked(self) -> tuple[Turn, ...]:
        """A pair's turns before its answers."""
        return self.turns[: self.answers[0]] if self.turns else ()

    @property
    def other(self) -> Example:
        """A pair's prompt with the answer that was rejected."""
        if not self.turns:
            return replace(self, text=self.prompt + self.rejected, rejected="")
        said = tuple(Turn(**turn) for turn in json.loads(self.rejected))
        return replace(self, turns=(*self.asked, *said), rejected="")

    @property
    def sides(self) -> tuple[Example, ...]:
        """Its separate texts: a pair's two answers, each after its prompt."""
        return (self, self.other) if self.rejected else (self,)

    @property
    def said(self) -> str:
        """A pair's answer that was chosen, whole."""
        return "\n".join(turn.said for turn in self.turns[len(self.asked) :]) or self.text[len(self.prompt) :]

    @property
    def answers(self) -> list[int]:
        """The places of the turns to learn. What comes after the last of them is not rendered."""
        return [place for place, turn in enumerate(self.turns) if turn.teaches]

    def content_hash(self) -> str:
        """Equal for rows that teach the same, wherever they are."""
        return self._hash().hexdigest()

    def digest(self) -> int:
        """The first 64 bits of the hash: they sort as it does, and a million of them take little room."""
        return int.from_bytes(self._hash().digest()[:8], "big")

    def likeness(self) -> int:
        """64 bits that are equal for rows that differ only in case or spaces: a model that learned one knows both.

        A space between two digits counts, and so does a classifier's exact label. Pairs with the same prompt are alike.
        """
        turns, text = (self.asked, self.prompt) if self.rejected else (self.turns, self.text)
        parts = [part for turn in turns for part in (turn.role, _folded(turn.content), *map(_folded, turn.apart))]
        parts += [_folded(self.tools)] if self.tools else []
        parts += [_folded(text), "" if self.label is None else f"label {self.label}"]  # the prompt is in the text
        joined = "\x1f".join(parts).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(joined).digest()[:8], "big")

    def _hash(self) -> hashlib._Hash:
        content: list[Any] = [[(t.role, t.content, *t.apart) for t in self.turns], self.prompt, self.text]
        content += [{"tools": self.tools}] if self.tools else []
        content += [] if self.label is None else [self.label]
        content += [{"rejected": self.rejected}] if self.rejected else []
        return hashlib.sha256(json.dumps(content).encode())


def _folded(text: str) -> str:
    """The text without case and spaces; one space stays between digits."""
    words = " ".join(text.casefold().split())
    return _BETWEEN_DIGITS.sub("\x1e", words).replace(" ", "")
