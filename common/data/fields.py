"""The fields of rows: which are read and which are not. None is dropped silently.

`dataset.fields: text` reads only roles and contents, as loractl 0.2 did, so that a job of that time still gets the same
rows when it resumes or is repeated. A new job file reads `all`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loractl.common.job.sections import DataFormat, DatasetSpec, RowFields

SIDES = ("chosen", "rejected")
"""The columns of a pair's answers."""

MESSAGES = ("messages", "conversations", "prompt", *SIDES)
"""Columns that may hold a message, or a list of them."""

_OF_ROW: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages", "system", "tools"),
    DataFormat.SHAREGPT: ("conversations", "system", "tools"),
    DataFormat.ALPACA: ("instruction", "input", "output", "system", "history"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
    DataFormat.CLASSIFICATION: ("text", "label"),
    DataFormat.PREFERENCE: (*MESSAGES, "instruction", "input", "system", "history", "tools"),
    DataFormat.PREFERENCE_TEXT: ("prompt", *SIDES),
}

_TALKS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.SHAREGPT: ("conversations",),
    DataFormat.PREFERENCE: MESSAGES,
}

_OF_MESSAGE = ("content", "role", "from", "value", "reasoning_content", "weight", "tool_calls", "name", "tool_call_id")

_LATER = ("tools", "reasoning_content", "weight", "tool_calls", "name", "tool_call_id", "history")
"""The fields that `text` does not read."""

_MEANT = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "loractl trains on text alone"),
    **dict.fromkeys(("chosen", "rejected"), "task_type: preference learns from pairs"),
    **dict.fromkeys(("tools", "tool_calls"), "tools are read of messages and conversations alone"),
    **dict.fromkeys(("functions", "function_call"), "write them as tools and tool_calls"),
    **dict.fromkeys(("thinking", "reasoning"), "write it as reasoning_content"),
    **dict.fromkeys(
        ("weight", "train", "train_detail", "loss", "loss_weight"),
        "write weight: 0 at a message that is not to be learned",
    ),
    "chat_template_kwargs": "the chat template is rendered with its own defaults, as it is when the adapter is asked",
    "system_prompt": "name it in dataset.columns: {system: system_prompt}",
    "kto_tag": "answers that people disliked would be learned like the others; keep the liked ones, or make pairs",
    "label": "answers that are labelled false would be learned like the others; keep the true ones, or make pairs",
}
"""Fields that change what a row means, where they are not read, and what to do about them."""

_OF_MESSAGES = ("loss", "loss_weight")
"""Those of them that say something else as a row's own column."""


@dataclass(kw_only=True)
class Reading:
    """How one data set's rows are read, and which unread fields they had."""

    fields: RowFields = RowFields.TEXT
    ignore: frozenset[str] = frozenset()
    unused: Counter[str] = field(default_factory=Counter)
    """Number of rows by unread field; a message's field is like `messages.score`."""

    @classmethod
    def of(cls, dataset: DatasetSpec) -> Reading:
        return cls(fields=dataset.fields, ignore=frozenset(dataset.ignore))

    @property
    def all(self) -> bool:
        return self.fields is RowFields.ALL

    def wants(self, name: str) -> bool:
        """Whether a field is read where rows have it."""
        return self.all and name not in self.ignore

    def see(self, row: Mapping[str, Any], format: DataFormat) -> str | None:
        """Count a row's unread fields. Returns the first one that changes its meaning."""
        found = [name for name in dict.fromkeys(self._unread(row, format)) if name not in self.ignore]
        self.unused.update(found)
        return next((name for name in found if self.all and _means(name, row, format)), None)

    def _unread(self, row: Mapping[str, Any], format: DataFormat) -> Iterator[str]:
        later = () if self.all else (*_LATER, *(["system"] if format is DataFormat.MESSAGES else []))
        for name, value in row.items():
            if _holds(value) and (name not in _OF_ROW[format] or name in later):
                yield name
        for column in _TALKS.get(format, ()):
            held = row.get(column)
            for message in held if isinstance(held, list) else (held,):
                for name, value in message.items() if isinstance(message, dict) else ():
                    if _holds(value) and (name not in _OF_MESSAGE or name in later):
                        yield f"{column}.{name}"


def advice_about(name: str) -> str:
    """What to do about a field that changes the meaning of a row."""
    return f"{_MEANT[name.rpartition('.')[2]]}; to train without it, name it in dataset.ignore: [{name}]"


def _means(name: str, row: Mapping[str, Any], format: DataFormat) -> bool:
    """Whether an unread field changes what the row means."""
    column, _, last = name.rpartition(".")
    if last == "label":  # TRL's mark of a good or bad completion; any other label describes
        return format in (DataFormat.PROMPT_COMPLETION, DataFormat.MESSAGES) and isinstance(row.get(name), bool)
    return last in _MEANT and (bool(column) or last not in _OF_MESSAGES)


def _holds(value: Any) -> bool:
    """Whether a field holds anything: rows of one table have every column."""
    return value is not None and value not in ("", [], {})


def tool_calls(value: Any) -> str:
    """A message's calls in OpenAI's form, as JSON: arguments are objects there. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("tool_calls is not a list")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name.strip():
            raise ValueError("a tool call has no function with a name")
        arguments = _object(function.get("arguments"), f"the arguments of {name}")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", **known, "function": {"name": name, "arguments": arguments}})
    return json.dumps(calls, ensure_ascii=False)


def written_calls(text: Any, column: str) -> str:
    """The calls of ShareGPT's function_call, one or a list, as JSON text or not. Raises ValueError."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        value = None
    if not isinstance(value, (dict, list)) or not value:
        hint = f"dataset.ignore: [{column}.function_call] learns it as plain text"
        raise ValueError(f'a function_call is no JSON like {{"name": "find", "arguments": {{}}}}; {hint}')
    return tool_calls(value if isinstance(value, list) else [value])


def tools(value: Any) -> str:
    """A row's tools in OpenAI's form, as JSON. Raises ValueError."""
    listed = json.loads(value) if isinstance(value, str) and value.strip() else value
    if not isinstance(listed, list):
        raise ValueError("tools is not a list")
    found = []
    for tool in listed:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool has no function with a name")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return json.dumps(found, ensure_ascii=False) if found else ""


def _object(value: Any, what: str) -> dict[str, Any]:
    """An object, or JSON text of one. Raises ValueError."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{what} are not JSON") from None
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} are no object")
    return value
