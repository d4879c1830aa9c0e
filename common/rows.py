"""A data set's rows before any tokenizer: reading files, telling their format, and the conversation in each row.

Without torch, so that submit refuses bad data before a job waits for it; the trainer runs the very same checks.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .spec import DATA_SUFFIXES, BadRow, DataFormat

ROLES = ("system", "user", "assistant", "tool")

_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
}
"""The columns that a row of each format must have; a file is tried against them in this order."""


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as it stands in the file; `number` is its line in jsonl, else its place, from 1."""

    number: int
    value: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """What one row teaches: a conversation, a prompt with its completion, or plain text.

    Exactly one of `turns` and `text` is set; `prompt` is the part of `text` that is given, not learned.
    """

    number: int
    turns: tuple[Turn, ...] = ()
    prompt: str = ""
    text: str = ""

    def content_hash(self) -> str:
        """Equal for rows that teach the same, wherever they stand."""
        content = [(t.role, t.content) for t in self.turns], self.prompt, self.text
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_rows(path: Path) -> list[RawRow]:
    """Read a jsonl, json, csv or parquet file. Raises DataError with the row that can't be read."""
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise DataError(path, f"has none of the endings {', '.join(DATA_SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(path, "no such file", hint="dataset.path is relative to the job file") from None
    except UnicodeDecodeError as error:
        raise DataError(path, f"is not UTF-8 (byte {error.start})", hint="convert it with iconv -t utf-8") from None
    except OSError as error:
        raise DataError(path, f"can't be read: {error.strerror}") from None
    rows = {".jsonl": _parse_jsonl, ".json": _parse_json, ".csv": _parse_csv}[suffix](path, text)
    if not rows:
        raise DataError(path, "has no rows")
    return rows


def detect_format(
    rows: Iterable[RawRow], file: str | Path, wanted: DataFormat = DataFormat.AUTO
) -> tuple[DataFormat, str]:
    """The format and the reason for it, from the first row's columns. Raises DataError."""
    first = next(iter(rows))
    columns = [key for key, value in first.value.items() if value is not None]
    if wanted is not DataFormat.AUTO:
        return wanted, "set by dataset.format"
    for format, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return format, f"the rows have {' and '.join(needed)}"
    forms = "; ".join(f"{format.value}: {', '.join(needed)}" for format, needed in _COLUMNS.items())
    if "conversations" in columns:
        raise DataError(
            file, "is in ShareGPT form (conversations)", row=first.number,
            hint="rename conversations to messages, from to role (human: user, gpt: assistant) and value to content",
        )  # fmt: skip
    raise DataError(
        file,
        f"the columns {', '.join(columns) or '(none)'} are those of no known format",
        row=first.number,
        hint=f"known columns: {forms}",
    )


def parse_examples(
    rows: list[RawRow], format: DataFormat, file: str | Path, on_bad_row: BadRow = BadRow.ERROR
) -> tuple[list[Example], list[str]]:
    """Every row as an Example, and a sentence for each row that was dropped.

    Raises DataError for the first row that can't be learned from, or, where those are dropped, when none is left.
    """
    parse = {
        DataFormat.MESSAGES: _messages,
        DataFormat.ALPACA: _alpaca,
        DataFormat.PROMPT_COMPLETION: _prompt_completion,
        DataFormat.TEXT: _text,
    }[format]
    examples, dropped = [], []
    for row in rows:
        try:
            examples.append(parse(row, file))
        except DataError as error:
            if on_bad_row is BadRow.ERROR:
                error.hint = error.hint or "correct it, or leave such rows out with dataset.on_bad_row: drop"
                raise
            dropped.append(error.sentence)
    if not examples:
        raise DataError(file, f"every row was dropped; the first: {dropped[0]}")
    return examples, dropped


def split_held_out(examples: list[Example], test_size: float, file: str | Path) -> tuple[list[Example], list[Example]]:
    """(train, held out), by content: the same rows are held out whatever their order and the seed.

    Equal rows land on the same side, so that nothing held out was trained on.
    """
    hashes = sorted({e.content_hash() for e in examples})
    if len(hashes) < 2:
        raise DataError(
            file, "needs at least two different rows: one to train on and one held out", hint="or set dataset.eval_path"
        )
    count = min(max(1, round(test_size * len(hashes))), len(hashes) - 1)
    held_out = set(hashes[:count])
    train = [e for e in examples if e.content_hash() not in held_out]
    return train, [e for e in examples if e.content_hash() in held_out]


def _parse_jsonl(path: Path, text: str) -> list[RawRow]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would split a row at U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
            where = f" (column {error.colno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
            hint = (
                "a .jsonl file has one object a line; name it .json if it is one array"
                if line.strip() in ("[", "{")
                else None
            )
            raise DataError(path, f"is not valid JSON{where}", row=number, hint=hint) from None
        rows.append(_row(path, number, value))
    return rows


def _parse_json(path: Path, text: str) -> list[RawRow]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
        where = f" (line {error.lineno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(path, f"is not valid JSON{where}", hint="one object a line? name it .jsonl") from None
    if not isinstance(value, list):
        raise DataError(path, "is not an array of objects", hint="one object a line? name it .jsonl")
    return [_row(path, number, item) for number, item in enumerate(value, start=1)]


def _parse_csv(path: Path, text: str) -> list[RawRow]:
    reader = csv.DictReader(io.StringIO(text, newline="\n"), strict=True)
    rows = []
    try:
        for number, value in enumerate(reader, start=1):
            if None in value or None in value.values():
                raise DataError(
                    path, f"does not have the {len(reader.fieldnames or ())} fields of the header", row=number
                )
            rows.append(RawRow(number=number, value=value))
    except csv.Error as error:
        raise DataError(path, f"is not valid CSV: {error}", row=len(rows) + 1) from None
    return rows


def _read_parquet(path: Path) -> list[RawRow]:
    try:
        import pyarrow.parquet as parquet  # comes with datasets
    except ImportError:
        raise DataError(path, "parquet needs the training stack here", hint="pip install 'loractl[worker]'") from None
    if not path.exists():
        raise DataError(path, "no such file", hint="dataset.path is relative to the job file")
    import pyarrow

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not valid parquet: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise DataError(path, "has no rows")
    return [RawRow(number=n, value=value) for n, value in enumerate(table.to_pylist(), start=1)]


def _row(path: Path, number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(path, f"is {_kind(value)}, not an object with columns", row=number)
    return RawRow(number=number, value=value)


def _messages(row: RawRow, file: str | Path) -> Example:
    messages = row.value.get("messages")
    if not isinstance(messages, list):
        raise DataError(file, f"messages is {_kind(messages)}, not a list of messages", row=row.number)
    if not messages:
        raise DataError(file, "messages is empty", row=row.number)
    turns: list[Turn] = []
    for place, message in enumerate(messages, start=1):
        where = f"message {place}"
        if not isinstance(message, dict):
            raise DataError(file, f"{where} is {_kind(message)}, not an object with role and content", row=row.number)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(file, f"{where} has the role {role!r}, not one of {', '.join(ROLES)}", row=row.number)
        if not isinstance(content, str):
            raise DataError(file, f"{where}: content is {_kind(content)}, not text", row=row.number)
        if role == "system" and turns:
            raise DataError(file, f"{where}: the system message must come first", row=row.number)
        if turns and role == turns[-1].role and role != "tool":
            raise DataError(file, f"{where} is the second {role} message in a row", row=row.number)
        if role == "assistant" and not content.strip():
            raise DataError(file, f"{where}: the assistant's answer is empty", row=row.number)
        if role == "assistant" and (not turns or turns[-1].role == "system"):
            raise DataError(file, f"{where}: the assistant answers before the user has spoken", row=row.number)
        turns.append(Turn(role=role, content=content))
    if not any(t.role == "assistant" for t in turns):
        raise DataError(file, "has no assistant message to learn from", row=row.number)
    return Example(number=row.number, turns=tuple(turns))


def _alpaca(row: RawRow, file: str | Path) -> Example:
    instruction = _field(row, "instruction", file)
    given = row.value.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(file, f"input is {_kind(given)}, not text", row=row.number)
    question = f"{instruction}\n\n{given}" if given else instruction
    answer = _field(row, "output", file)
    return Example(
        number=row.number, turns=(Turn(role="user", content=question), Turn(role="assistant", content=answer))
    )


def _prompt_completion(row: RawRow, file: str | Path) -> Example:
    prompt, completion = _field(row, "prompt", file), _field(row, "completion", file)
    return Example(number=row.number, prompt=prompt, text=prompt + completion)


def _text(row: RawRow, file: str | Path) -> Example:
    return Example(number=row.number, text=_field(row, "text", file))


def _field(row: RawRow, name: str, file: str | Path) -> str:
    value = row.value.get(name)
    if name not in row.value:
        raise DataError(file, f"has no {name} (it has {', '.join(row.value) or 'nothing'})", row=row.number)
    if not isinstance(value, str):
        raise DataError(file, f"{name} is {_kind(value)}, not text", row=row.number)
    if not value.strip():
        raise DataError(file, f"{name} is empty", row=row.number)
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)
