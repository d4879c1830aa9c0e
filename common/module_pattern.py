"""A regular expression for module names, as peft takes one in target_modules: matched whole, and bounded.

A job file may come from anybody. Python's `re` can hold a process for hours over one name; the regex package has a
time limit for a match, but takes gigabytes to compile fifty letters of nested counts. Here a part of an expression
gives all places where it can end, each part and place once, without backtracking. Every match counts its steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

MOST_LETTERS = 1024
MOST_DEPTH = 24
"""Brackets in brackets."""

MOST_STEPS = 10_000_000
"""Parts tried on names before an expression is refused: 15 s at most. Twenty thousand names take 2 to 8."""

Places = frozenset[int]
NOWHERE: Places = frozenset()


@dataclass(frozen=True, kw_only=True)
class ModulePattern:
    """An expression that has been read. Raises ValueError, whose text says what it is not, when it is first used."""

    text: str

    def matches(self, names: Iterable[str], *, most_steps: int = MOST_STEPS) -> list[str]:
        """The names that it matches from end to end. Raises ValueError where it takes too long."""
        steps = _Steps(most_steps)
        return [name for name in names if len(name) in _Match(name=name, steps=steps).ends(self._part, 0)]

    def check(self) -> None:
        """Raises ValueError unless it is an expression that loractl reads."""
        if len(self.text) > MOST_LETTERS:
            raise ValueError(f"is an expression of more than {MOST_LETTERS} letters")
        _ = self._part

    @cached_property
    def _part(self) -> _Part:
        return _Reader(self.text).read()


@dataclass(frozen=True, eq=False)
class _Letter:
    fits: Callable[[str], bool]


@dataclass(frozen=True, eq=False)
class _Edge:
    at_end: bool  # else at the start


@dataclass(frozen=True, eq=False)
class _Row:
    parts: tuple[_Part, ...]  # one after the other


@dataclass(frozen=True, eq=False)
class _Either:
    parts: tuple[_Part, ...]


@dataclass(frozen=True, eq=False)
class _Times:
    part: _Part
    least: int
    most: int | None


@dataclass(frozen=True, eq=False)
class _Ahead:
    part: _Part
    wanted: bool  # False: what follows must not match


_Part = _Letter | _Edge | _Row | _Either | _Times | _Ahead


class _Steps:
    """What a whole list of names has taken."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError("is an expression that takes too long to match; name the modules in a list")


@dataclass(kw_only=True)
class _Match:
    """One name, and where each part of the expression can end from each place in it."""

    name: str
    steps: _Steps
    known: dict[tuple[int, int], Places] = field(default_factory=dict)

    def ends(self, part: _Part, start: int) -> Places:
        self.steps.take()
        if isinstance(part, _Letter):
            return frozenset((start + 1,)) if start < len(self.name) and part.fits(self.name[start]) else NOWHERE
        key = (id(part), start)
        if key not in self.known:
            self.known[key] = self._ends(part, start)
        return self.known[key]

    def _ends(self, part: _Part, start: int) -> Places:
        here = frozenset((start,))
        match part:
            case _Edge(at_end):
                return here if start == (len(self.name) if at_end else 0) else NOWHERE
            case _Row(parts):
                for one in parts:
                    here = self._from_all(one, here)
                return here
            case _Either(parts):
                return frozenset().union(*(self.ends(one, start) for one in parts))
            case _Ahead(inner, wanted):
                return here if bool(self.ends(inner, start)) is wanted else NOWHERE
            case _Times():
                return self._repeated(part, here)
        raise AssertionError(part)

    def _repeated(self, part: _Times, here: Places) -> Places:
        for _ in range(part.least):
            after = self._from_all(part.part, here)
            if after == here:
                break  # as many times as one likes
            here = after
        reached, count = here, part.least
        while here and (part.most is None or count < part.most):
            here = self._from_all(part.part, here) - reached
            reached, count = reached | here, count + 1
        return reached

    def _from_all(self, part: _Part, places: Places) -> Places:
        return frozenset().union(*(self.ends(part, place) for place in places))


_KINDS: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda letter: not letter.isdecimal(),
    "w": lambda letter: letter.isalnum() or letter == "_",
    "W": lambda letter: not (letter.isalnum() or letter == "_"),
    "s": str.isspace,
    "S": lambda letter: not letter.isspace(),
}
_COUNT = re.compile(r"\{(\d{1,4})?(,(\d{1,4})?)?\}", re.ASCII)


class _Reader:
    """Reads the part of Python's syntax that names need. What it does not know it refuses, by name."""

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth = text, 0, 0

    def read(self) -> _Part:
        part = self._either()
        if self._place < len(self._text):
            raise self._wrong("an unbalanced bracket")
        return part

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"is an expression with {what} at letter {self._place + 1}")

    def _next(self) -> str:
        return self._text[self._place : self._place + 1]

    def _takes(self, text: str) -> bool:
        found = self._text.startswith(text, self._place)
        self._place += len(text) if found else 0
        return found

    def _either(self) -> _Part:
        parts = [self._row()]
        while self._takes("|"):
            parts.append(self._row())
        return parts[0] if len(parts) == 1 else _Either(tuple(parts))

    def _row(self) -> _Part:
        parts: list[_Part] = []
        while (letter := self._next()) and letter not in "|)":
            parts.append(self._times(self._one()))
        return _Row(tuple(parts))

    def _times(self, part: _Part) -> _Part:
        least, most = self._count()
        if (least, most) == (1, 1):
            return part
        if isinstance(part, (_Edge, _Ahead)):
            raise self._wrong("a repeated edge")
        self._takes("?")  # which of several matches comes first makes no difference here
        if self._next() in ("*", "+", "?") and self._next():
            raise self._wrong("two repeats in a row")
        if most is not None and least > most:
            raise self._wrong("a count that ends before it begins")
        return _Times(part, least, most)

    def _count(self) -> tuple[int, int | None]:
        for sign, count in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._takes(sign):
                return count
        found = _COUNT.match(self._text, self._place)
        if found is None or found[0] == "{}":
            return 1, 1
        self._place = found.end()
        least = int(found[1] or 0)
        return least, (int(found[3]) if found[3] else None) if found[2] else least

    def _one(self) -> _Part:
        if self._takes("("):
            return self._group()
        if self._takes("["):
            return _Letter(self._class())
        if self._next() in ("*", "+", "?"):
            raise self._wrong("a repeat of nothing")
        if self._takes("^"):
            return _Edge(False)
        if self._takes("$"):
            return _Edge(True)
        if self._takes("."):
            return _Letter(lambda letter: letter != "\n")
        return _Letter(self._letter())

    def _group(self) -> _Part:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise self._wrong(f"more than {MOST_DEPTH} brackets in brackets")
        ahead: bool | None = None
        if self._takes("?="):
            ahead = True
        elif self._takes("?!"):
            ahead = False
        elif self._takes("?:") or self._next() != "?":
            pass
        else:
            raise self._wrong("a kind of bracket that loractl does not read")
        part = self._either()
        if not self._takes(")"):
            raise self._wrong("an unbalanced bracket")
        self._depth -= 1
        return part if ahead is None else _Ahead(part, ahead)

    def _letter(self) -> Callable[[str], bool]:
        """A letter that means itself, or a kind of letters."""
        if self._takes("\\"):
            letter = self._next()
            if letter in _KINDS:
                self._place += 1
                return _KINDS[letter]
            if not letter or letter.isalnum():
                raise self._wrong("an escape that loractl does not read")
        else:
            letter = self._next()
        self._place += 1
        return letter.__eq__

    def _class(self) -> Callable[[str], bool]:
        negated, kinds, first = self._takes("^"), [], True
        while first or self._next() != "]":
            first = False
            if not self._next():
                raise self._wrong("an unbalanced bracket")
            low, kind = self._next(), self._letter()
            if (
                self._text[self._place : self._place + 1] == "-"
                and self._text[self._place + 1 : self._place + 2] != "]"
            ):
                self._place += 1
                high = self._next()
                if low == "\\" or not high or high in "\\[" or high < low:
                    raise self._wrong("a range that loractl does not read")
                self._place += 1
                kinds.append(_between(low, high))
            else:
                kinds.append(kind)
        self._place += 1
        return (
            (lambda letter: not any(kind(letter) for kind in kinds))
            if negated
            else (lambda letter: any(kind(letter) for kind in kinds))
        )


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda letter: low <= letter <= high
