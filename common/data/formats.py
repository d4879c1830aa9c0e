"""The formats of rows: which one a data set has, what each of its rows teaches, and which labels, if it has some.

It needs no torch, so submit refuses bad data before a job waits. The trainer runs the same checks.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, ColumnName, DataFormat, PromptTemplate
from loractl.common.text import slip_of

from .examples import Example, Examples, Turn
from .fields import MESSAGES, SIDES, Reading, advice_about, tool_calls, tools, written_calls
from .pairs import CONVERSATION, conversation_pair, is_text, said_of, text_pair
from .rows import RawRow, column_names, kind_of

LONGEST = 256
"""Characters of a label; a longer one is a text in the wrong column."""


def label_name(value: Any) -> str:
    """A label, text or a whole number, as text with its spaces folded. Raises ValueError that says what else it is."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        kinds = {bool: "true or false", dict: "an object", list: "a list", type(None): "missing or null"}
        raise ValueError(kinds.get(type(value), repr(value)))
    name = " ".join(str(value).split())
    if not name:
        raise ValueError("empty")
    if len(name) > LONGEST:
        raise ValueError(f"a text of {len(name)} characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError("not Unicode text")
    return name


def labels_of(train: Sequence[Example]) -> tuple[str, ...]:
    """The labels that training rows teach, sorted: by size where all are whole numbers, else as text.

    A label's place is its number in the model's head. The same rows in another order give the same places.
    """
    if not train or train[0].label is None:  # other formats have no labels
        return ()
    names = {example.label for example in train if example.label is not None}
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_taught(train: Sequence[Example], file: str | Path) -> tuple[str, ...]:
    """The labels that are taught; none for rows without labels. Raises DataError if there is only one: a head that
    always says it is right."""
    labels = labels_of(train)
    if len(labels) == 1:
        what = f"every row to train on has the label {labels[0]!r}: there is nothing to learn"
        raise DataError(file, what, hint="a classifier needs rows of two labels or more", kind="one label only")
    return labels


def untaught(held_out: Sequence[Example], labels: Sequence[str], file: str | Path) -> list[DataError]:
    """A sentence for each held-out row whose label the head does not have."""
    known = set(labels)
    shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    return [
        DataError(
            file,
            f"has the label {e.label!r}, which no row to train on has ({shown})",
            row=e.number,
            kind="unknown label",
        )
        for e in held_out
        if e.label not in known
    ]


ROLES = ("system", "user", "assistant", "tool")

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that ShareGPT's descendants give to roles, in any conversation; those in ROLES are taken as they are."""

CALL = "function_call"
"""The role of a message that is nothing but a call, as JSON."""

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
are missing: a text with a label may be meant as plain text too, so the job must say it (task_type)."""


def map_columns(rows: Iterable[RawRow], columns: Mapping[Any, str], file: str | Path) -> Iterable[RawRow]:
    """The rows under loractl's own column names: `columns` says what each is called in the data.

    Raises DataError when the first row has no such column.
    """
    if not columns:
        return rows
    outer = {ours: theirs for ours, theirs in columns.items() if ours not in INNER_COLUMNS}
    inner = {ours: theirs for ours, theirs in columns.items() if ours in INNER_COLUMNS}
    first = next(iter(rows))
    missing = [theirs for theirs in outer.values() if theirs not in first.value]
    if missing:
        has = column_names(first.value)
        what = f"has no column {column_names(dict.fromkeys(missing))} that dataset.columns names; it has {has}"
        hint = _spaces_apart(missing, first.value) or _turned_round(outer, first.value)
        close = slip_of(missing[0], first.value)
        hint = hint or (f"did you mean {close}?" if close else None)
        raise DataError(file, what, row=first.number, hint=hint, kind="unknown columns")
    return _Mapped(rows, outer, inner)


def _spaces_apart(missing: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """What to do about a column whose name has extra spaces at its ends."""
    there = {name.strip(): name for name in row}
    alike = next((there[name.strip()] for name in missing if name.strip() in there), None)
    if alike is None:
        return None
    return f"write {json.dumps(alike, ensure_ascii=False)} in dataset.columns, or take the spaces out of the file"


def _turned_round(outer: Mapping[str, str], row: Mapping[str, Any]) -> str | None:
    """What to do about a mapping that names the data's column first."""
    turned = {theirs: ours for ours, theirs in outer.items() if ours in row and theirs in get_args(ColumnName)}
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in turned.items())
    return f"loractl's name comes first, then the data's: write {{{pairs}}}" if turned else None


class _Mapped:
    """Rows with renamed columns."""

    def __init__(self, rows: Iterable[RawRow], outer: Mapping[str, str], inner: Mapping[str, str]) -> None:
        self._rows, self._outer, self._inner = rows, outer, inner

    def __iter__(self) -> Iterator[RawRow]:
        for row in self._rows:
            yield RawRow(number=row.number, value=_renamed(row.value, self._outer, self._inner))


def _renamed(value: Mapping[str, Any], outer: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, Any]:
    kept = {key: content for key, content in value.items() if key not in outer and key not in outer.values()}
    named = kept | {ours: value.get(theirs) for ours, theirs in outer.items()}
    for key in MESSAGES if inner else ():
        if isinstance(held := named.get(key), list):
            named[key] = [_named(message, inner) for message in held]
        elif isinstance(held, dict):
            named[key] = _named(held, inner)
    return named


def _named(message: Any, inner: Mapping[str, str]) -> Any:
    if not isinstance(message, dict):
        return message
    kept = {key: value for key, value in message.items() if key not in inner.values()}
    return kept | {ours: message.get(theirs) for ours, theirs in inner.items()}


def detect_format(
    rows: Iterable[RawRow], file: str | Path, wanted: DataFormat = DataFormat.AUTO
) -> tuple[DataFormat, str]:
    """The format and the reason for it, from the first row's columns. Raises DataError."""
    first = next(iter(rows))
    columns = {key: value for key, value in first.value.items() if value is not None}
    if wanted is DataFormat.CLASSIFICATION:
        hint = "name yours with dataset.columns, like {text: review, label: mood}; answers are for task_type: CAUSAL_LM"
        _check_columns(first, ("text", "label"), "a classifier learns from rows", hint, file)
        return wanted, "what task_type: SEQ_CLS reads"
    if wanted is DataFormat.PREFERENCE:
        hint = "name yours with dataset.columns, like {chosen: better, rejected: worse}; answers are for "
        hint += "task_type: CAUSAL_LM"
        _check_columns(first, SIDES, "pairs are rows", hint, file)  # the prompt may be in both answers
        return (DataFormat.PREFERENCE_TEXT if is_text(first.value) else wanted), "what task_type: preference reads"
    if wanted in (DataFormat.AUTO, DataFormat.PROMPT_COMPLETION) and _in_two_lists(first):
        return DataFormat.MESSAGES, "the rows have prompt and completion, which are lists of messages"
    if wanted is not DataFormat.AUTO:
        return wanted, "set by dataset.format"
    for format, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return format, f"the rows have {' and '.join(needed)}"
    if {"chosen", "rejected"} <= columns.keys():
        hint = "set task_type: preference; or for the chosen answers alone dataset.ignore: [rejected], with "
        hint += "dataset.columns: {completion: chosen}, or {messages: chosen} where they are conversations"
        what = "the rows are pairs (chosen, rejected), which task_type: preference learns from"
        raise DataError(file, what, row=first.number, hint=hint, kind="unknown columns")
    forms = "; ".join(f"{format.value}: {', '.join(needed)}" for format, needed in _COLUMNS.items())
    theirs = dict(zip(_COLUMNS[DataFormat.PROMPT_COMPLETION], columns, strict=False)) if len(columns) == 2 else {}
    like = ", ".join(f"{ours}: {name}" for ours, name in theirs.items()) or "prompt: question"
    known = f"known columns: {forms}; name yours with dataset.columns, like {{{like}}}"
    null = dict.fromkeys(name for name in first.value if name not in columns)
    raise DataError(
        file,
        f"the columns {column_names(columns)} are those of no known format"
        + (f"; {column_names(null)} of this row is null" if null else ""),
        row=first.number,
        hint=_meant(columns, [column for needed in _COLUMNS.values() for column in needed]) or known,
        kind="unknown columns",
    )


def _check_columns(first: RawRow, needed: tuple[str, str], rows: str, hint: str, file: str | Path) -> None:
    """Raises DataError unless the first row has both columns; it may have others."""
    if not {*needed} <= first.value.keys():
        given = column_names({name: value for name, value in first.value.items() if value is not None})
        what = f"{rows} with {' and '.join(needed)}, and the columns are {given}"
        raise DataError(file, what, row=first.number, hint=_meant(first.value, needed) or hint, kind="unknown columns")


def _meant(columns: Iterable[str], known: Sequence[str]) -> str | None:
    """What to do about a column whose name has a slip."""
    slips = ((name, slip_of(name.lower(), known)) for name in columns if name not in known)
    name, close = next((pair for pair in slips if pair[1] is not None), ("", None))
    return close and f"did you mean {close}? rename the column, or set dataset.columns: {{{close}: {name}}}"


def parse_examples(
    rows: Iterable[RawRow],
    format: DataFormat,
    file: str | Path,
    on_bad_row: BadRow = BadRow.ERROR,
    template: PromptTemplate = PromptTemplate.CHAT,
    reading: Reading | None = None,
) -> tuple[Examples, list[str]]:
    """Every row as an Example, and a sentence for each row that was dropped.

    Raises DataError for the first row that can't be learned from. Where such rows are dropped, it raises only when no
    row is left.
    """
    examples, refused = parse_each(rows, format, file, template, reading)
    if refused and on_bad_row is BadRow.ERROR:
        refused[0].hint = refused[0].hint or "correct it, or leave such rows out with dataset.on_bad_row: drop"
        raise refused[0]
    dropped = [error.sentence for error in refused]
    if not examples:
        raise DataError(file, f"every row was dropped; the first: {dropped[0]}", kind=refused[0].kind)
    return examples, dropped


def parse_each(
    rows: Iterable[RawRow],
    format: DataFormat,
    file: str | Path,
    template: PromptTemplate = PromptTemplate.CHAT,
    reading: Reading | None = None,
) -> tuple[Examples, list[DataError]]:
    """Every row that can be learned from as an Example, and why each of the others can't.

    `reading` counts unread fields; None: only roles and contents are read.
    """
    reading = Reading() if reading is None else reading
    parsers: dict[DataFormat, Callable[[RawRow, str | Path], Example]] = {
        DataFormat.MESSAGES: functools.partial(_conversation, reading, "messages", "role", "content"),
        DataFormat.SHAREGPT: functools.partial(_conversation, reading, "conversations", "from", "value"),
        DataFormat.ALPACA: functools.partial(_alpaca, reading, "" if template is PromptTemplate.CHAT else INPUT),
        DataFormat.PROMPT_COMPLETION: _prompt_completion,
        DataFormat.TEXT: _text,
        DataFormat.CLASSIFICATION: _classification,
        DataFormat.PREFERENCE: functools.partial(_pair, reading, template),
        DataFormat.PREFERENCE_TEXT: lambda row, file: text_pair(_heeded(row, reading), file),
    }
    parse, examples, refused = parsers[format], Examples(), list[DataError]()
    for given in rows:
        apart = format is DataFormat.MESSAGES and _in_two_lists(given) and reading.wants("messages.weight")
        row = _one_list(given) if apart else given
        try:
            if name := reading.see(row.value, format):
                what = f"has {name}, which is not read and changes what is learned"
                raise DataError(file, what, row=row.number, hint=advice_about(name), kind="fields that are not read")
            example = parse(row, file)
            for side in example.sides:
                check_unicode((side.text, side.tools), side.turns, file, row.number)
            examples.add(example)
        except DataError as error:
            refused.append(error)
    return examples, refused


def check_unicode(texts: Iterable[str], turns: Iterable[Turn], file: str | Path, row: int) -> None:
    """Raises DataError for what no tokenizer takes: JSON may escape half of an emoji that was cut in two."""
    try:
        for text in (*texts, *(part for turn in turns for part in (turn.content, *turn.apart))):
            text.encode()
    except UnicodeEncodeError:
        what = "has half a character (a lone surrogate, such as \\ud83d), which is not Unicode text"
        raise DataError(file, what, row=row, kind="not text") from None


def _in_two_lists(row: RawRow) -> bool:
    """Whether a row is a conversation in TRL's prompt and completion."""
    two = row.value.get("prompt"), row.value.get("completion")
    return row.value.get("messages") is None and all(isinstance(part, list) and part for part in two)


def _one_list(row: RawRow) -> RawRow:
    """The row with one list of messages. TRL learns only the completion's answers."""
    others = {name: value for name, value in row.value.items() if name not in ("prompt", "completion")}
    asked = [
        {**turn, "weight": 0} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
        for turn in row.value["prompt"]
    ]
    return replace(row, value={**others, "messages": [*asked, *row.value["completion"]]})


def _conversation(reading: Reading, column: str, speaker: str, said: str, row: RawRow, file: str | Path) -> Example:
    turns = conversation_turns(row, file, column, speaker, said, reading)
    if not any(turn.teaches for turn in turns):
        raise DataError(file, "has no assistant message to learn from", row=row.number, kind="nothing to learn")
    return Example(number=row.number, turns=turns, tools=tools_of(row, file) if reading.wants("tools") else "")


def _pair(reading: Reading, template: PromptTemplate, row: RawRow, file: str | Path) -> Example:
    row = _heeded(row, reading)
    if row.value.get("instruction") is not None and not any(row.value.get(name) for name in ("prompt", *CONVERSATION)):
        heading = "" if template is PromptTemplate.CHAT else INPUT
        turns_asked = instruction_turns(row, file, heading, history=reading.wants("history"))
        asked = [{"role": turn.role, "content": turn.content} for turn in turns_asked]
        row = replace(row, value={**row.value, "prompt": asked, "system": None})
    said = said_of(row, file)

    def turns(side: str, messages: list[Any]) -> tuple[Turn, ...]:
        whole = replace(row, value={side: [*(said.asked or ()), *messages]})
        return conversation_turns(whole, file, side, "role", "content", reading)

    sides = [turns(side, messages) for side, messages in zip(SIDES, said.answers, strict=True)]
    count = None if said.asked is None else len(said.asked)
    return conversation_pair(row, file, count, sides, tools_of(row, file) if reading.wants("tools") else "")


def _heeded(row: RawRow, reading: Reading) -> RawRow:
    """A pair's row without its ignored columns: the prompt's may be one, if the answers contain it."""
    return replace(row, value={name: value for name, value in row.value.items() if name not in reading.ignore})


def tools_of(row: RawRow, file: str | Path) -> str:
    """The functions that the answers of a row may call, as JSON; empty: none. Raises DataError."""
    if not (value := row.value.get("tools")):
        return ""
    try:
        return tools(value)
    except ValueError as error:
        hint = 'like [{"type": "function", "function": {"name": "find", "parameters": {...}}}], as OpenAI writes them'
        raise DataError(file, str(error), row=row.number, hint=hint, kind="not a tool") from None


def conversation_turns(
    row: RawRow, file: str | Path, column: str, speaker: str, said: str, reading: Reading | None = None
) -> tuple[Turn, ...]:
    """The messages of a conversation, checked for a valid order. Raises DataError."""

    def wrong(what: str, kind: str, hint: str | None = None) -> DataError:
        return DataError(file, what, row=row.number, hint=hint, kind=kind)

    messages = row.value.get(column)
    if not isinstance(messages, list):
        raise wrong(f"{column} is {kind_of(messages)}, not a list of messages", "not text")
    if not messages:
        raise wrong(f"{column} is empty", "nothing to learn")
    turns: list[Turn] = []
    has_system = column == "conversations" or (column == "messages" and reading is not None and reading.wants("system"))
    if has_system and isinstance(system := row.value.get("system"), str) and system.strip():
        turns.append(Turn(role="system", content=system))
    for place, message in enumerate(messages, start=1):
        where = f"message {place}"
        if not isinstance(message, dict):
            raise wrong(f"{where} is {kind_of(message)}, not an object with {speaker} and {said}", "not text")
        named, content = (message.get(key, message.get(_OTHER_KEYS.get(key, key))) for key in (speaker, said))
        if named is None:
            hint = f"dataset.columns: {{conversations: {column}}} reads such rows" if "from" in message else None
            raise wrong(f"{where} has no {speaker}; it has {column_names(message)}", "unknown role", hint)
        role = SHAREGPT_ROLES.get(named, named) if isinstance(named, str) else named
        if role not in ROLES:
            known = ", ".join((*ROLES, *SHAREGPT_ROLES))
            raise wrong(f"{where} has the role {named!r}, not one of {known}", "unknown role")
        try:
            wanted = {key: value for key, value in message.items() if reading and reading.wants(f"{column}.{key}")}
            more = _more_of(wanted)
            if named == CALL and reading and reading.wants(f"{column}.{CALL}"):
                more, content = more | {"calls": written_calls(content, column)}, ""
        except ValueError as error:
            raise wrong(f"{where}: {error}", "not a message") from None
        if content is None and (more.get("calls") or more.get("thought")):
            content = ""
        if not isinstance(content, str):
            raise wrong(f"{where}: {said} is {kind_of(content)}, not text", "not text")
        if role == "system" and turns:
            raise wrong(f"{where}: the system message must come first", "role order")
        if turns and role == turns[-1].role and role != "tool":
            raise wrong(f"{where} is the second {role} message in a row", "role order")
        if role == "assistant" and not content.strip() and not more.get("calls"):
            raise wrong(f"{where}: the assistant's answer is empty", "empty answer")
        if role == "assistant" and (not turns or turns[-1].role == "system"):
            raise wrong(f"{where}: the assistant answers before the user has spoken", "role order")
        turns.append(Turn(role=role, content=content, **more))
    return tuple(turns)


_OTHER_KEYS = {"from": "role", "value": "content"}
"""Keys of a message of `conversations`, as Axolotl writes them."""


def _more_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has besides role and content. Raises ValueError."""
    found: dict[str, Any] = {}
    if (calls := message.get("tool_calls")) not in (None, []):
        found["calls"] = tool_calls(calls)
    for key, name in (("thought", "reasoning_content"), ("name", "name"), ("call_id", "tool_call_id")):
        value = message.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {kind_of(value)}, not text")
        if value:
            found[key] = value
    if (weight := message.get("weight")) is not None:
        if weight not in (0, 1):
            raise ValueError(f"weight is {json.dumps(weight, default=str)}, not 0 (not learned) or 1")
        found["learned"] = bool(weight)
    return found


INPUT = "### Input:\n"
"""The heading of an instruction's input in the alpaca template."""


def _alpaca(reading: Reading, heading: str, row: RawRow, file: str | Path) -> Example:
    asked = instruction_turns(row, file, heading, history=reading.wants("history"))
    answer = text_of(row, "output", file, kind="empty answer")
    return Example(number=row.number, turns=(*asked, Turn(role="assistant", content=answer)))


def instruction_turns(row: RawRow, file: str | Path, heading: str = "", *, history: bool = False) -> tuple[Turn, ...]:
    """An alpaca row up to its answer; `heading` precedes its input. `history`: whether earlier rounds are read.

    Raises DataError.
    """
    instruction = text_of(row, "instruction", file)
    given, system = row.value.get("input"), row.value.get("system")
    for name, value in (("input", given), ("system", system)):
        if value is not None and not isinstance(value, str):
            raise DataError(file, f"{name} is {kind_of(value)}, not text", row=row.number, kind="not text")
    question = f"{instruction}\n\n{heading}{given}" if given else instruction
    first = (Turn(role="system", content=system),) if system and system.strip() else ()
    earlier = _rounds(row, file) if history else ()
    return (*first, *earlier, Turn(role="user", content=question))


def _rounds(row: RawRow, file: str | Path) -> tuple[Turn, ...]:
    """An alpaca row's `history`, a list of questions with their answers. Raises DataError."""
    given = row.value.get("history") or []
    turns: list[Turn] = []
    for place, pair in enumerate(given if isinstance(given, list) else [given], start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            what = f"history: round {place} is {kind_of(pair)}, not a list of a question and its answer"
            raise DataError(file, what, row=row.number, kind="not text")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not text.strip():
                what = f"history: round {place} has an empty {'question' if role == 'user' else 'answer'}"
                raise DataError(file, what, row=row.number, kind="empty answer")
            turns.append(Turn(role=role, content=text))
    return tuple(turns)


def _prompt_completion(row: RawRow, file: str | Path) -> Example:
    prompt, completion = text_of(row, "prompt", file), text_of(row, "completion", file, kind="empty answer")
    return Example(number=row.number, prompt=prompt, text=prompt + completion)


def _text(row: RawRow, file: str | Path) -> Example:
    return Example(number=row.number, text=text_of(row, "text", file))


def _classification(row: RawRow, file: str | Path) -> Example:
    text = text_of(row, "text", file)
    if "label" not in row.value:
        raise DataError(file, f"has no label (it has {column_names(row.value)})", row=row.number, kind="missing column")
    try:
        label = label_name(row.value["label"])
    except ValueError as error:
        what = f"label is {error}; it must be a whole number or text of at most {LONGEST} characters"
        hint = (
            'write it as text, like "true" and "false", or as 1 and 0' if isinstance(row.value["label"], bool) else None
        )
        raise DataError(file, what, row=row.number, hint=hint, kind="not a label") from None
    return Example(number=row.number, text=text, label=label)


def text_of(row: RawRow, name: str, file: str | Path, *, kind: str = "nothing to learn") -> str:
    """A column that must hold text. Raises DataError."""
    value = row.value.get(name)
    if name not in row.value:
        raise DataError(
            file, f"has no {name} (it has {column_names(row.value)})", row=row.number, kind="missing column"
        )
    if not isinstance(value, str):
        raise DataError(file, f"{name} is {kind_of(value)}, not text", row=row.number, kind="not text")
    if not value.strip():
        raise DataError(file, f"{name} is empty", row=row.number, kind=kind)
    return value
