"""Examples: what one row teaches, in any format, and many of them in little memory.

Beyond a limit they go to a file, and only their digests stay here.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import IO, Any, overload

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


IN_A_BLOCK = 128

IN_MEMORY = 8_000_000
"""Characters kept in memory; beyond that, all blocks go to a file."""


class Examples(Sequence[Example]):
    """Examples in their order. They are added one by one, then read; a part shares the file of the whole."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self.digests = array("Q")
        self.likenesses = array("Q")
        self.highest_number = 0  # of all examples; a part keeps that of the whole
        self._newest: list[Example] = []  # not yet in a block
        self._blocks = _Blocks()
        self._places: array[int] | None = None  # of a part's examples in the blocks; None: all of them
        self._characters = 0  # of the newest
        self._spilled = False
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        self.digests.append(example.digest())
        self.likenesses.append(example.likeness())
        self.highest_number = max(self.highest_number, example.number)
        self._newest.append(example)
        self._characters += sum(map(len, (example.text, example.tools, example.rejected)))
        self._characters += sum(len(turn.said) for turn in example.turns)
        self._spilled = self._spilled or self._characters > IN_MEMORY
        while self._spilled and len(self._newest) >= IN_A_BLOCK:
            self._blocks.write(self._newest[:IN_A_BLOCK])
            self._newest = self._newest[IN_A_BLOCK:]

    def part(self, places: Iterable[int]) -> Examples:
        """The examples at these places, fastest in ascending order. Nothing may be added to either afterwards."""
        part, wanted = Examples(), array("Q", places)
        part.digests = array("Q", (self.digests[place] for place in wanted))
        part.likenesses = array("Q", (self.likenesses[place] for place in wanted))
        part.highest_number = self.highest_number
        part._newest, part._blocks, part._spilled = self._newest, self._blocks, self._spilled
        part._places = wanted if self._places is None else array("Q", (self._places[place] for place in wanted))
        return part

    def __len__(self) -> int:
        return len(self.digests)

    def __iter__(self) -> Iterator[Example]:
        if self._places is None:
            for number in range(self._blocks.count):
                yield from self._blocks.read(number)
            yield from self._newest
            return
        yield from map(self._at, self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return self._at(place if self._places is None else self._places[place])

    def _at(self, place: int) -> Example:
        block, within = divmod(place, IN_A_BLOCK)
        if block < self._blocks.count:
            return self._blocks.read(block)[within]
        return self._newest[place - self._blocks.count * IN_A_BLOCK]


class _Blocks:
    """Blocks of IN_A_BLOCK examples in a file that goes with its last reader; the last block read stays in memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._ends = array("Q", [0])
        self._last: tuple[int, list[Example]] = (-1, [])

    @property
    def count(self) -> int:
        return len(self._ends) - 1

    def write(self, examples: Sequence[Example]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="loractl-rows-")  # noqa: SIM115  it is read as long as we live
        plain = [[*_values(e)[:1], [_values(turn) for turn in e.turns], *_values(e)[2:]] for e in examples]
        self._file.seek(self._ends[-1])
        self._file.write(marshal.dumps(plain))
        self._ends.append(self._file.tell())

    def read(self, number: int) -> list[Example]:
        if self._last[0] != number:
            assert self._file is not None
            self._file.seek(self._ends[number])
            plain = marshal.loads(self._file.read(self._ends[number + 1] - self._ends[number]))  # noqa: S302  our own
            self._last = number, [_example(*fields) for fields in plain]
        return self._last[1]


_TURN, _EXAMPLE = ([field.name for field in fields(kind)] for kind in (Turn, Example))


def _values(of: Turn | Example) -> list[Any]:
    """In the order of the fields."""
    return [getattr(of, name) for name in (_TURN if isinstance(of, Turn) else _EXAMPLE)]


def _example(number: int, turns: list[list[Any]], *rest: Any) -> Example:
    said = tuple(Turn(**dict(zip(_TURN, turn, strict=True))) for turn in turns)
    return Example(number=number, turns=said, **dict(zip(_EXAMPLE[2:], rest, strict=True)))
