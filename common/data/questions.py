"""What the rows of a file ask, where no answer is needed: the input of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, DatasetSpec, PromptTemplate

from .examples import Turn
from .fields import Reading
from .formats import (
    INNER_COLUMNS,
    INPUT,
    check_unicode,
    conversation_turns,
    instruction_turns,
    map_columns,
    text_of,
    tools_of,
)
from .pairs import prompt_row
from .rows import DataFile, RawRow, Told, column_names

CHAT = (
    DataFormat.MESSAGES,
    DataFormat.SHAREGPT,
    DataFormat.ALPACA,
    DataFormat.PROMPT_COMPLETION,
    DataFormat.PREFERENCE,
)
PLAIN = (DataFormat.PROMPT_COMPLETION, DataFormat.TEXT, DataFormat.PREFERENCE_TEXT)
LABELLED = (DataFormat.CLASSIFICATION,)

_TALKS = (DataFormat.MESSAGES, DataFormat.SHAREGPT, DataFormat.PREFERENCE)

_ASKING = {
    DataFormat.MESSAGES: "messages",
    DataFormat.SHAREGPT: "conversations",
    DataFormat.ALPACA: "instruction",
    DataFormat.PROMPT_COMPLETION: "prompt",
    DataFormat.TEXT: "text",
    DataFormat.CLASSIFICATION: "text",
    DataFormat.PREFERENCE: "prompt",
    DataFormat.PREFERENCE_TEXT: "prompt",
}
"""The column that holds the question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What one row asks: a conversation up to where the answer begins, or one turn with a plain text."""

    number: int
    turns: tuple[Turn, ...]
    tools: str = ""  # as JSON

    @property
    def text(self) -> str:
        """The last turn's text."""
        return self.turns[-1].content


class Questions:
    """The questions of a jsonl, json, csv or parquet file, read again each time.

    Only a .json array is in memory as a whole. Reading raises DataError for a row that asks nothing.
    """

    def __init__(self, path: Path, dataset: DatasetSpec, format: DataFormat, told: Told = lambda done, size: None):
        """`dataset` and `format`: those of the adapter's training. They say what the columns are called."""
        self._path, self._dataset, self._format, self._told = path, dataset, format, told
        self._reading = Reading.of(dataset)

    def __iter__(self) -> Iterator[Question]:
        file = DataFile(self._path, self._told)
        first = next(iter(file))
        here = {
            ours: theirs
            for ours, theirs in self._dataset.columns.items()
            if ours in INNER_COLUMNS or theirs in first.value
        }
        rows = map_columns(file, here, self._path)
        read = self._reader(next(iter(rows)))
        for row in rows:
            tools = tools_of(row, self._path) if self._reading.wants("tools") and self._format in _TALKS else ""
            turns = read(row)
            check_unicode((tools,), turns, self._path, row.number)
            yield Question(number=row.number, turns=turns, tools=tools)

    def _reader(self, first: RawRow) -> Callable[[RawRow], tuple[Turn, ...]]:
        """How rows like the first one are read. Raises DataError if none of its columns asks anything."""
        formats: tuple[DataFormat, ...] = next(alike for alike in (PLAIN, LABELLED, CHAT) if self._format in alike)
        tried = sorted(formats, key=lambda format: format is not self._format)  # the training's own first
        found = next((format for format in tried if first.value.get(_ASKING[format]) is not None), None)
        path = self._path
        if found is None:
            known = ", ".join(dict.fromkeys(_ASKING[format] for format in tried))
            hint = f"this adapter reads {known}; call the column so, as its training's dataset.columns may"
            raise DataError(
                path,
                f"asks nothing: it has {column_names(first.value)}",
                row=first.number,
                hint=hint,
                kind="unknown columns",
            )
        if found is DataFormat.MESSAGES:
            return lambda row: _asked(row, self._turns(row, "messages"), path)
        if found is DataFormat.SHAREGPT:
            return lambda row: _asked(
                row, conversation_turns(row, path, "conversations", "from", "value", self._reading), path
            )
        if found is DataFormat.ALPACA:
            heading = "" if self._dataset.template is PromptTemplate.CHAT else INPUT
            history = self._reading.wants("history")
            return lambda row: instruction_turns(row, path, heading, history=history)
        column = _ASKING[found]
        if found is DataFormat.PREFERENCE:
            return lambda row: _asked(row, self._turns(prompt_row(row, path), column), path)
        return lambda row: (Turn(role="user", content=text_of(row, column, path)),)

    def _turns(self, row: RawRow, column: str) -> tuple[Turn, ...]:
        return conversation_turns(row, self._path, column, "role", "content", self._reading)


def _asked(row: RawRow, turns: tuple[Turn, ...], path: Path) -> tuple[Turn, ...]:
    """The conversation without an answer at its end. Raises DataError."""
    asked = turns[:-1] if turns[-1].role == "assistant" else turns
    if not any(turn.role == "user" for turn in asked):
        raise DataError(path, "has no message of the user", row=row.number, kind="role order")
    return asked
