"""A data set's rows before any tokenizer: reading files, telling their format, and the conversation in each row.

Without torch, so that submit refuses bad data before a job waits for it; the trainer runs the very same checks.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.errors import DataError
from loractl.common.job.spec import DATA_SUFFIXES, BadRow, DataFormat, DatasetSpec

from .labels import LONGEST, check_taught, label_name, untaught

ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that ShareGPT's descendants give to roles; those of ROLES are taken as they are."""

INNER_COLUMNS = ("role", "content", "from", "value")
"""Keys of a message, not of a row."""

_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.SHAREGPT: ("conversations",),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
}
"""The columns that a row of each format must have; a file is tried against them in this order. Rows for a classifier
are not among them: a text with a label beside it may as well be meant as text, so the job says it (task_type)."""


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
        """Equal for rows that teach the same, wherever they stand."""
        content: list[Any] = [[(t.role, t.content) for t in self.turns], self.prompt, self.text]
        content += [] if self.label is None else [self.label]
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
        what = f"is not UTF-8 (byte {error.start})"
        raise DataError(path, what, hint="convert it with iconv -t utf-8", kind="not UTF-8") from None
    except OSError as error:
        raise DataError(path, f"can't be read: {error.strerror}") from None
    rows = {".jsonl": _parse_jsonl, ".json": _parse_json, ".csv": _parse_csv}[suffix](path, text)
    if not rows:
        raise DataError(path, "has no rows", kind="too few rows")
    return rows


def map_columns(rows: list[RawRow], columns: Mapping[Any, str], file: str | Path) -> list[RawRow]:
    """The rows under loractl's own column names: `columns` says what each is called in the data.

    Raises DataError when the first row has no such column.
    """
    if not columns:
        return rows
    outer = {ours: theirs for ours, theirs in columns.items() if ours not in INNER_COLUMNS}
    inner = {ours: theirs for ours, theirs in columns.items() if ours in INNER_COLUMNS}
    missing = [theirs for theirs in outer.values() if theirs not in rows[0].value]
    if missing:
        raise DataError(
            file,
            f"has no column {', '.join(missing)} that dataset.columns names; it has {', '.join(rows[0].value)}",
            row=rows[0].number,
            kind="unknown columns",
        )
    return [RawRow(number=row.number, value=_renamed(row.value, outer, inner)) for row in rows]


def _renamed(value: Mapping[str, Any], outer: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, Any]:
    kept = {key: content for key, content in value.items() if key not in outer and key not in outer.values()}
    named = kept | {ours: value.get(theirs) for ours, theirs in outer.items()}
    for key in ("messages", "conversations") if inner else ():
        if isinstance(messages := named.get(key), list):
            named[key] = [
                {**message, **{ours: message.get(theirs) for ours, theirs in inner.items()}}
                if isinstance(message, dict)
                else message
                for message in messages
            ]
    return named


def detect_format(
    rows: Iterable[RawRow], file: str | Path, wanted: DataFormat = DataFormat.AUTO
) -> tuple[DataFormat, str]:
    """The format and the reason for it, from the first row's columns. Raises DataError."""
    first = next(iter(rows))
    columns = [key for key, value in first.value.items() if value is not None]
    if wanted is DataFormat.CLASSIFICATION:
        _check_labelled(first, columns, file)
        return wanted, "what task_type: SEQ_CLS reads"
    if wanted is not DataFormat.AUTO:
        return wanted, "set by dataset.format"
    for format, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return format, f"the rows have {' and '.join(needed)}"
    forms = "; ".join(f"{format.value}: {', '.join(needed)}" for format, needed in _COLUMNS.items())
    raise DataError(
        file,
        f"the columns {', '.join(columns) or '(none)'} are those of no known format",
        row=first.number,
        hint=f"known columns: {forms}; name yours with dataset.columns, like {{prompt: question}}",
        kind="unknown columns",
    )


def _check_labelled(first: RawRow, columns: list[str], file: str | Path) -> None:
    """A classifier's rows have two columns, whatever else stands beside them. Raises DataError."""
    if not {"text", "label"} <= first.value.keys():
        what = (
            f"a classifier learns from rows with text and label, and the columns are {', '.join(columns) or '(none)'}"
        )
        hint = "name yours with dataset.columns, like {text: review, label: mood}; answers are for task_type: CAUSAL_LM"
        raise DataError(file, what, row=first.number, hint=hint, kind="unknown columns")


def parse_examples(
    rows: list[RawRow], format: DataFormat, file: str | Path, on_bad_row: BadRow = BadRow.ERROR
) -> tuple[list[Example], list[str]]:
    """Every row as an Example, and a sentence for each row that was dropped.

    Raises DataError for the first row that can't be learned from, or, where those are dropped, when none is left.
    """
    examples, refused = parse_each(rows, format, file)
    if refused and on_bad_row is BadRow.ERROR:
        refused[0].hint = refused[0].hint or "correct it, or leave such rows out with dataset.on_bad_row: drop"
        raise refused[0]
    dropped = [error.sentence for error in refused]
    if not examples:
        raise DataError(file, f"every row was dropped; the first: {dropped[0]}", kind=refused[0].kind)
    return examples, dropped


def parse_each(rows: list[RawRow], format: DataFormat, file: str | Path) -> tuple[list[Example], list[DataError]]:
    """Every row that can be learned from as an Example, and why each of the others can't."""
    parse = {
        DataFormat.MESSAGES: _messages,
        DataFormat.SHAREGPT: _sharegpt,
        DataFormat.ALPACA: _alpaca,
        DataFormat.PROMPT_COMPLETION: _prompt_completion,
        DataFormat.TEXT: _text,
        DataFormat.CLASSIFICATION: _classification,
    }[format]
    examples, refused = [], []
    for row in rows:
        try:
            examples.append(parse(row, file))
        except DataError as error:
            refused.append(error)
    return examples, refused


@dataclass(frozen=True, kw_only=True)
class Split:
    """A job's examples: what is trained on, what is held out, and what became of the rest."""

    format: DataFormat
    why: str
    train: list[Example]
    held_out: list[Example]
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    overlap: int  # rows of the held-out file left out because they are trained on


def split_data(dataset: DatasetSpec, rows: list[RawRow], held_rows: list[RawRow] | None) -> Split:
    """The examples of a data set's rows, and of those of its eval_path where there is one. Raises DataError."""
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    rows = map_columns(rows, dataset.columns, file)
    format, why = detect_format(rows, file, dataset.format)
    examples, dropped = parse_examples(rows, format, file, dataset.on_bad_row)
    if held_rows is None:
        assert dataset.test_size is not None, "the job file's check leaves one of test_size and eval_path"
        train, held_out = split_held_out(examples, dataset.test_size, file)
        if format is DataFormat.CLASSIFICATION:
            check_taught(train, file)
        return Split(format=format, why=why, train=train, held_out=held_out, dropped=dropped, overlap=0)
    held_rows = map_columns(held_rows, dataset.columns, held_file)
    held_out, also_dropped = parse_examples(held_rows, format, held_file, dataset.on_bad_row)
    if format is DataFormat.CLASSIFICATION:
        held_out, untold = _of_known_labels(held_out, check_taught(examples, file), held_file, dataset.on_bad_row)
        also_dropped += untold
    trained = {e.content_hash() for e in examples}
    new = [e for e in held_out if e.content_hash() not in trained]
    if not new:
        raise DataError(held_file, "has no row that is not trained on as well", kind="overlap")
    overlap = len(held_out) - len(new)
    return Split(format=format, why=why, train=examples, held_out=new, dropped=dropped + also_dropped, overlap=overlap)


def split_held_out(examples: list[Example], test_size: float, file: str | Path) -> tuple[list[Example], list[Example]]:
    """(train, held out), by content: the same rows are held out whatever their order and the seed.

    Equal rows land on the same side, so that nothing held out was trained on. Of labelled rows no label is held out
    whole: a classifier could not know it.
    """
    label_of = {e.content_hash(): e.label for e in examples}
    hashes = sorted(label_of)
    if len(hashes) < 2:
        raise DataError(
            file,
            "needs at least two different rows: one to train on and one held out",
            hint="or set dataset.eval_path",
            kind="too few rows",
        )
    count = min(max(1, round(test_size * len(hashes))), len(hashes) - 1)
    held_out: set[str] = set()
    left = Counter(label_of.values())
    for content in hashes:
        if len(held_out) < count and left[label_of[content]] > 1:  # a label's last row is for training
            held_out.add(content)
            left[label_of[content]] -= 1
    if not held_out:
        what = "has no label with two different rows: one to train on and one held out"
        raise DataError(file, what, hint="or set dataset.eval_path", kind="too few rows")
    train = [e for e in examples if e.content_hash() not in held_out]
    return train, [e for e in examples if e.content_hash() in held_out]


def _of_known_labels(
    held_out: list[Example], labels: tuple[str, ...], file: str | Path, on_bad_row: BadRow
) -> tuple[list[Example], list[str]]:
    """The held-out rows whose label is taught, and a sentence for each of the others, where those are left out."""
    refused = untaught(held_out, labels, file)
    if refused and (on_bad_row is BadRow.ERROR or len(refused) == len(held_out)):
        refused[0].hint = "teach it, correct it, or leave such rows out with dataset.on_bad_row: drop"
        raise refused[0]
    return [e for e in held_out if e.label in set(labels)], [error.sentence for error in refused]


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
            raise DataError(path, f"is not valid JSON{where}", row=number, hint=hint, kind="broken JSON") from None
        rows.append(_row(path, number, value))
    return rows


def _parse_json(path: Path, text: str) -> list[RawRow]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
        where = f" (line {error.lineno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
        hint = "one object a line? name it .jsonl"
        raise DataError(path, f"is not valid JSON{where}", hint=hint, kind="broken JSON") from None
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
                    path,
                    f"does not have the {len(reader.fieldnames or ())} fields of the header",
                    row=number,
                    kind="broken CSV",
                )
            rows.append(RawRow(number=number, value=value))
    except csv.Error as error:
        raise DataError(path, f"is not valid CSV: {error}", row=len(rows) + 1, kind="broken CSV") from None
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
        raise DataError(path, "has no rows", kind="too few rows")
    return [RawRow(number=n, value=value) for n, value in enumerate(table.to_pylist(), start=1)]


def _row(path: Path, number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(path, f"is {_kind(value)}, not an object with columns", row=number)
    return RawRow(number=number, value=value)


def _messages(row: RawRow, file: str | Path) -> Example:
    return _conversation(row, file, "messages", "role", "content")


def _sharegpt(row: RawRow, file: str | Path) -> Example:
    return _conversation(row, file, "conversations", "from", "value")


def _conversation(row: RawRow, file: str | Path, column: str, speaker: str, said: str) -> Example:
    def wrong(what: str, kind: str) -> DataError:
        return DataError(file, what, row=row.number, kind=kind)

    messages = row.value.get(column)
    if not isinstance(messages, list):
        raise wrong(f"{column} is {_kind(messages)}, not a list of messages", "not text")
    if not messages:
        raise wrong(f"{column} is empty", "nothing to learn")
    turns: list[Turn] = []
    if column == "conversations" and isinstance(system := row.value.get("system"), str) and system.strip():
        turns.append(Turn(role="system", content=system))
    for place, message in enumerate(messages, start=1):
        where = f"message {place}"
        if not isinstance(message, dict):
            raise wrong(f"{where} is {_kind(message)}, not an object with {speaker} and {said}", "not text")
        named, content = message.get(speaker), message.get(said)
        role = SHAREGPT_ROLES.get(named, named) if column == "conversations" and isinstance(named, str) else named
        if role not in ROLES:
            known = ROLES if column == "messages" else (*ROLES, *SHAREGPT_ROLES)
            raise wrong(f"{where} has the role {named!r}, not one of {', '.join(known)}", "unknown role")
        if not isinstance(content, str):
            raise wrong(f"{where}: {said} is {_kind(content)}, not text", "not text")
        if role == "system" and turns:
            raise wrong(f"{where}: the system message must come first", "role order")
        if turns and role == turns[-1].role and role != "tool":
            raise wrong(f"{where} is the second {role} message in a row", "role order")
        if role == "assistant" and not content.strip():
            raise wrong(f"{where}: the assistant's answer is empty", "empty answer")
        if role == "assistant" and (not turns or turns[-1].role == "system"):
            raise wrong(f"{where}: the assistant answers before the user has spoken", "role order")
        turns.append(Turn(role=role, content=content))
    if not any(t.role == "assistant" for t in turns):
        raise wrong("has no assistant message to learn from", "nothing to learn")
    return Example(number=row.number, turns=tuple(turns))


def _alpaca(row: RawRow, file: str | Path) -> Example:
    instruction = _field(row, "instruction", file)
    given, system = row.value.get("input"), row.value.get("system")
    for name, value in (("input", given), ("system", system)):
        if value is not None and not isinstance(value, str):
            raise DataError(file, f"{name} is {_kind(value)}, not text", row=row.number, kind="not text")
    question = f"{instruction}\n\n{given}" if given else instruction
    answer = _field(row, "output", file, kind="empty answer")
    first = (Turn(role="system", content=system),) if system and system.strip() else ()
    return Example(
        number=row.number, turns=(*first, Turn(role="user", content=question), Turn(role="assistant", content=answer))
    )


def _prompt_completion(row: RawRow, file: str | Path) -> Example:
    prompt, completion = _field(row, "prompt", file), _field(row, "completion", file, kind="empty answer")
    return Example(number=row.number, prompt=prompt, text=prompt + completion)


def _text(row: RawRow, file: str | Path) -> Example:
    return Example(number=row.number, text=_field(row, "text", file))


def _classification(row: RawRow, file: str | Path) -> Example:
    text = _field(row, "text", file)
    if "label" not in row.value:
        raise DataError(file, f"has no label (it has {', '.join(row.value)})", row=row.number, kind="missing column")
    try:
        label = label_name(row.value["label"])
    except ValueError as error:
        what = f"label is {error}; it must be a whole number or text of at most {LONGEST} characters"
        raise DataError(file, what, row=row.number, kind="not a label") from None
    return Example(number=row.number, text=text, label=label)


def _field(row: RawRow, name: str, file: str | Path, *, kind: str = "nothing to learn") -> str:
    value = row.value.get(name)
    if name not in row.value:
        has = ", ".join(row.value) or "nothing"
        raise DataError(file, f"has no {name} (it has {has})", row=row.number, kind="missing column")
    if not isinstance(value, str):
        raise DataError(file, f"{name} is {_kind(value)}, not text", row=row.number, kind="not text")
    if not value.strip():
        raise DataError(file, f"{name} is empty", row=row.number, kind=kind)
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)
