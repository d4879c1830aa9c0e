"""Pairs of answers, as TRL, Axolotl, LLaMA-Factory and UltraFeedback write them.

The prompt has a column of its own (`prompt`, `instruction` with `input`, `messages`, `conversations`), or both answers
start with it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from loractl.common.errors import DataError

from .examples import Example, Turn
from .fields import SIDES
from .rows import RawRow, kind_of

CONVERSATION = ("messages", "conversations")
"""Columns that hold a prompt of several messages."""


def is_text(row: Mapping[str, Any]) -> bool:
    """Whether a row's pair is plain text, which no chat template sees: its answers are text, and so is its prompt."""
    if "system" in row or any(row.get(column) is not None for column in (*CONVERSATION, "instruction")):
        return False
    return all(isinstance(row.get(name), str) for name in SIDES) and not isinstance(row.get("prompt"), list)


def text_pair(row: RawRow, file: str | Path) -> Example:
    """A prompt and two texts that may follow it. Raises DataError."""
    chosen, rejected = (_answer_text(row, side, file) for side in SIDES)
    prompt = row.value.get("prompt")
    behind = ""
    _check_differ(chosen, rejected, row, file)
    if prompt is None:
        prompt = _common_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        behind = " behind what both begin with"
        _check_begun(bool(prompt), row, file)
    if not isinstance(prompt, str):
        raise DataError(file, f"prompt is {kind_of(prompt)}, not text", row=row.number, kind="not text")
    if not prompt.strip():
        raise DataError(file, "prompt is empty", row=row.number, kind="nothing to learn")
    for side, answer in zip(SIDES, (chosen, rejected), strict=True):
        if not answer.strip():
            raise DataError(file, f"the {side} answer is empty{behind}", row=row.number, kind="empty answer")
    return Example(number=row.number, prompt=prompt, text=prompt + chosen, rejected=rejected)


class PairMessages(NamedTuple):
    """A row's messages before they are checked."""

    asked: list[Any] | None  # None: both answers begin with the prompt
    answers: tuple[list[Any], list[Any]]  # chosen, rejected


def said_of(row: RawRow, file: str | Path) -> PairMessages:
    """The prompt's messages and those of both answers. Raises DataError."""
    chosen, rejected = (_messages(row, side, file) for side in SIDES)
    column = next((name for name in ("prompt", *CONVERSATION) if row.value.get(name) not in (None, "", [])), None)
    asked = _system(row) if column is None else _prompt_of(row, column, file)
    if column is not None and _role(chosen[0]) not in _BEGINS:
        return PairMessages(asked=asked, answers=(chosen, rejected))
    _check_begun(not any(_role(side[0]) in _ANSWERS for side in (chosen, rejected)), row, file)
    system = [message for message in asked if _role(message) == "system"][:1]
    if _role(chosen[0]) != "system":
        chosen, rejected = [*system, *chosen], [*system, *rejected]
    if column is not None and not {_content(message) for message in asked} <= {_content(said) for said in chosen}:
        what = f"has a {column} that is not in the conversation of its chosen answer"
        hint = f"a pair answers one prompt; to take the one in the answers, name it in dataset.ignore: [{column}]"
        raise DataError(file, what, row=row.number, hint=hint, kind="prompts that differ")
    return PairMessages(asked=None, answers=(chosen, rejected))


def prompt_row(row: RawRow, file: str | Path) -> RawRow:
    """A row with nothing but its prompt, as messages. Raises DataError."""
    return replace(row, value={"prompt": _prompt_of(row, "prompt", file)})


def conversation_pair(
    row: RawRow, file: str | Path, asked: int | None, sides: Sequence[tuple[Turn, ...]], tools: str
) -> Example:
    """The example of two whole conversations that share their first turns. `asked`: how many of these are the prompt;
    None: all of them. Raises DataError."""
    chosen, rejected = sides
    _check_differ(chosen, rejected, row, file)
    if asked is None:
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        asked = min(len(list(shared)), len(chosen) - 1, len(rejected) - 1)
        _check_begun(asked > 0, row, file)
    for side, turns in zip(SIDES, sides, strict=True):
        if (first := turns[asked]).role != "assistant":
            what = f"the {side} answer begins with a message of the {first.role}, not of the assistant"
            raise DataError(file, what, row=row.number, kind="role order")
        if not first.learned:
            what = f"the {side} answer has weight 0: a pair's answers are what is learned"
            raise DataError(file, what, row=row.number, kind="not a message")
    before = tuple(replace(turn, learned=False) for turn in chosen[:asked])
    return Example(
        number=row.number,
        turns=(*before, *chosen[asked:]),
        rejected=json.dumps([asdict(turn) for turn in rejected[asked:]]),
        tools=tools,
    )


def _answer_text(row: RawRow, side: str, file: str | Path) -> str:
    value = row.value.get(side)
    if side not in row.value:
        raise DataError(file, f"has no {side}", row=row.number, kind="missing column")
    if not isinstance(value, str):
        raise DataError(file, f"{side} is {kind_of(value)}, not text", row=row.number, kind="not text")
    return value


def _messages(row: RawRow, side: str, file: str | Path) -> list[Any]:
    value = row.value.get(side)
    if side not in row.value:
        raise DataError(file, f"has no {side}", row=row.number, kind="missing column")
    given = [value] if isinstance(value, dict) else value
    if isinstance(given, str):
        given = [{"role": "assistant", "content": given}]
    if not isinstance(given, list):
        what = f"{side} is {kind_of(value)}, neither text nor messages"
        raise DataError(file, what, row=row.number, kind="not text")
    if not given:
        raise DataError(file, f"the {side} answer is empty", row=row.number, kind="empty answer")
    return [_named(message) for message in given]


def _prompt_of(row: RawRow, column: str, file: str | Path) -> list[Any]:
    """The messages of a separate prompt, after the row's system message."""
    value = row.value.get(column)
    if isinstance(value, str) and not value.strip():
        raise DataError(file, f"{column} is empty", row=row.number, kind="nothing to learn")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        what = f"{column} is {kind_of(value)}, neither text nor messages"
        raise DataError(file, what, row=row.number, kind="not text")
    return [*_system(row), *map(_named, value)]


def _system(row: RawRow) -> list[Any]:
    value = row.value.get("system")
    return [{"role": "system", "content": value}] if isinstance(value, str) and value.strip() else []


def _named(message: Any) -> Any:
    """A message under OpenAI's names; ShareGPT's are from and value."""
    if isinstance(message, dict) and "from" in message and "role" not in message:
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        return {"role": message["from"], "content": message.get("value"), **rest}
    return message


_BEGINS = ("system", "user", "human")
"""Roles with which a conversation may begin, but not an answer."""


_ANSWERS = ("assistant", "gpt", "chatgpt")
"""Roles that answer."""


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _content(message: Any) -> str:
    said = message.get("content") if isinstance(message, dict) else None
    return said.strip() if isinstance(said, str) else ""


_WORD = re.compile(r"[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
"""A word of a script that puts spaces between them."""


def _common_text(chosen: str, rejected: str) -> str:
    """The beginning that both share, without half a word at its end and without the space before the answers.

    TRL's extract_prompt leaves half a word: an answer would begin within a token, which would count as prompt.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(chosen), len(rejected)))
    words = [word for side in (chosen, rejected) for word in _WORD.finditer(side, max(0, end - _LONGEST))]
    end = min([word.start() for word in words if word.start() < end < word.end()], default=end)
    return chosen[: end - 1] if end and chosen[end - 1] == " " else chosen[:end]


_LONGEST = 200
"""Characters of a word that is kept whole."""


def _check_begun(begun: bool, row: RawRow, file: str | Path) -> None:
    if not begun:
        what = "has two answers that do not begin with the same prompt"
        hint = "a pair answers one prompt: in prompt, instruction or messages, or at the beginning of both answers"
        raise DataError(file, what, row=row.number, hint=hint, kind="prompts that differ")


def _check_differ(chosen: Any, rejected: Any, row: RawRow, file: str | Path) -> None:
    if chosen == rejected:
        what = "has the same answer twice: neither can be preferred"
        raise DataError(file, what, row=row.number, kind="equal answers")
