"""When an answer is right by a measure of a job file's own: what of it counts, and how it is compared.

The expressions come from job files of anybody and run in a trainer, so RE2 reads them: its time grows with the text
alone, and its memory has a limit. Each search is one call; between two calls the time that all have taken is looked at,
since a text can have as many matches as letters.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

Compare = Literal["exact", "number", "json", "contains"]

MOST_LETTERS = 1024
"""Of an expression."""

MOST_MEMORY = 1 << 20
"""Bytes that RE2 may take for one expression. Three thousand instructions fit, and a class of all letters."""

MOST_SECONDS = 60.0
"""CPU time in which an expression must have read all answers. A match takes about ten microseconds."""


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """A rule for right answers."""

    extract: str | None  # an expression with one group: its last match counts; None: the whole text
    compare: Compare

    def check(self) -> None:
        """Raises ValueError, whose text says what the expression is not."""
        if self.extract is not None:
            _compiled(self.extract)

    def right(
        self,
        answers: Sequence[str],
        expected: Sequence[str],
        clock: Callable[[], float],
        labels: Collection[str] = (),
    ) -> list[bool | None]:
        """Whether each answer is right. None: the expected answer itself has nothing to compare with, such as no
        match. An answer with nothing to compare is wrong. `clock`: seconds of CPU time. `labels`: the goals where they
        are labels; an answer that contains several of them contains none.

        Raises ValueError where the expression takes too long.
        """
        goals, read = self.goals(expected, clock), _READERS[self.compare]
        found = self._read(answers, clock)
        if self.compare == "contains":
            label = _occurrence(labels) if labels else None
            return [
                None if goal is None else text is not None and _holds(str(goal), read(text), label)
                for goal, text in zip(goals, found, strict=True)
            ]
        return [
            None if goal is None else text is not None and read(text) == goal
            for goal, text in zip(goals, found, strict=True)
        ]

    def goals(self, expected: Sequence[str], clock: Callable[[], float]) -> list[Any]:
        """What answers are compared with, of each expected one; None: nothing. Raises ValueError as `right` does."""
        read = _READERS[self.compare]
        found = [None if text is None else read(text) for text in self._read(expected, clock)]
        return [None if self.compare == "contains" and goal == "" else goal for goal in found]

    def _read(self, texts: Iterable[str], clock: Callable[[], float]) -> list[str | None]:
        """What counts of each text."""
        if self.extract is None:
            return list(texts)
        expression, began = _compiled(self.extract), clock()
        found: list[str | None] = []
        for text in texts:
            last = None
            for match in expression.finditer(text.encode("utf-8", "replace").decode()):
                last = match
                if clock() - began > MOST_SECONDS:
                    raise ValueError(f"is an expression that takes more than {MOST_SECONDS:g} s to read the answers")
            found.append(None if last is None else last.group(1))
        return found


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> Any:
    """Raises ValueError for an expression that RE2 does not read, or without exactly one group."""
    import re2

    if len(text) > MOST_LETTERS:
        raise ValueError(f"is an expression of more than {MOST_LETTERS} letters")
    options = re2.Options()
    options.max_mem, options.log_errors = MOST_MEMORY, False
    try:
        expression = re2.compile(text, options)
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0].decode() if isinstance(error, re2.error) else "a letter that is not Unicode"
        raise ValueError(f"is an expression that does not compile: {why}; its syntax is RE2's") from None
    if expression.groups != 1:
        has = "no group" if not expression.groups else f"{expression.groups} groups"
        others = "" if not expression.groups else ", and (?:...) around the others"
        raise ValueError(f"is an expression with {has}: write (...) around the part to compare{others}")
    return expression


def _folded(text: str) -> str:
    return " ".join(text.split())


_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_MOST_DIGITS = 400


def _number(text: str) -> Decimal | None:
    """Without spaces, commas, and a dot at its end; None if that leaves no decimal number."""
    bare = "".join(text.split()).replace(",", "").removesuffix(".")
    return Decimal(bare) if len(bare) <= _MOST_DIGITS and _NUMBER.fullmatch(bare) else None


def _json(text: str) -> str | None:
    """The value in one form: keys sorted, numbers by their value; None for what is not JSON, or names a key twice."""
    try:
        return _canonical(json.loads(text, parse_float=Decimal, parse_constant=_refuse, object_pairs_hook=_object))
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the same key twice")
    return found


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        digits = Decimal(value).normalize()
        return str(digits if digits else Decimal(0))  # no negative zero
    return json.dumps(value)


def _words(text: str) -> str:
    return _folded(text).casefold()


def _holds(goal: str, text: str, label: re.Pattern[str] | None) -> bool:
    """Whether the goal occurs in a text; with the pattern of all labels, whether it alone of them does."""
    if label is not None:
        return {*label.findall(text)} == {goal}
    return _occurrence([goal]).search(text) is not None


def _occurrence(goals: Collection[str]) -> re.Pattern[str]:
    """A pattern of any of these texts where no letter or digit continues it on either side, long ones before shorter
    ones, so that "no answer" is not "no"."""
    longest_first = sorted(goals, key=lambda goal: (-len(goal), goal))
    return re.compile("|".join(map(_whole, longest_first)))


def _whole(goal: str) -> str:
    before = r"(?<!\w)" if goal[0].isalnum() else ""
    after = r"(?!\w)" if goal[-1].isalnum() else ""
    return f"{before}{re.escape(goal)}{after}"


_READERS: dict[Compare, Callable[[str], Any]] = {
    "exact": _folded,
    "number": _number,
    "json": _json,
    "contains": _words,
}
