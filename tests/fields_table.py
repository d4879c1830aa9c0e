"""The fields that other trainers document, and what loractl does with each: a page of the site (docs/build.py).

Each line is what comes of a row that has the field, and is checked on the same row without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loractl.common.data.examples import Example
from loractl.common.data.fields import Reading
from loractl.common.data.formats import detect_format, parse_each
from loractl.common.data.rows import RawRow
from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, RowFields

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"function": {"name": "find", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
ALPACA = {"instruction": "q", "output": "a"}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]}

A, L, T = "Axolotl", "LLaMA-Factory", "TRL"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field that some trainers document, in a row that has it."""

    name: str
    by: tuple[str, ...]
    row: dict[str, Any]
    without: dict[str, Any] | None = None  # the row without it; None: its column left out
    format: DataFormat = DataFormat.AUTO

    @property
    def bare(self) -> dict[str, Any]:
        left = {key: value for key, value in self.row.items() if key != self.name}
        return left if self.without is None else self.without


def talk(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [*messages], **more}


def said(answer: dict[str, Any]) -> dict[str, Any]:
    """A conversation whose answer has something more."""
    return talk(USER, {**ANSWER, **answer})


PLAIN = talk(USER, ANSWER)
PAIRS = DataFormat.PREFERENCE
FIELDS = (
    Field(name="messages", by=(A, L, T), row=PLAIN),
    Field(name="messages[].role, .content", by=(A, L, T), row=PLAIN, without=talk({}, {})),
    Field(name="messages[].role: developer", by=(T,), row=talk({**USER, "role": "developer"}, ANSWER), without=PLAIN),
    Field(
        name="messages[].content, as parts", by=(A, L, T), without=PLAIN,
        row=talk({"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER),
    ),
    Field(name="messages[].tool_calls", by=(A, L, T), row=said({"tool_calls": [CALL]}), without=PLAIN),
    Field(
        name="messages[].name, of a tool", by=(A, T),
        row=talk(USER, ANSWER, {"role": "tool", "name": "find", "content": "1"}, ANSWER),
        without=talk(USER, ANSWER, {"role": "tool", "content": "1"}, ANSWER),
    ),
    Field(
        name="messages[].tool_call_id", by=(A, T),
        row=talk(USER, ANSWER, {"role": "tool", "tool_call_id": "1", "content": "1"}, ANSWER),
        without=talk(USER, ANSWER, {"role": "tool", "content": "1"}, ANSWER),
    ),
    Field(name="messages[].reasoning_content", by=(A,), row=said({"reasoning_content": "hm"}), without=PLAIN),
    Field(name="messages[].thinking", by=(T,), row=said({"thinking": "hm"}), without=PLAIN),
    Field(name="messages[].weight", by=("OpenAI",), row=talk(USER, {**ANSWER, "weight": 0}, USER, ANSWER),
          without=talk(USER, ANSWER, USER, ANSWER)),
    Field(name="messages[].train", by=(A,), row=said({"train": False}), without=PLAIN),
    Field(name="messages[].train_detail", by=(A,), row=said({"train_detail": [{"begin_offset": 0}]}), without=PLAIN),
    Field(name="messages[].loss", by=("ms-swift",), row=said({"loss": False}), without=PLAIN),
    Field(name="tools", by=(A, L, T), row={**PLAIN, "tools": [TOOL]}),
    Field(name="system", by=(L,), row={**PLAIN, "system": "s"}),
    Field(name="chat_template_kwargs", by=(T,), row={**PLAIN, "chat_template_kwargs": {"enable_thinking": False}}),
    Field(name="images", by=(A, L, T), row={**PLAIN, "images": ["a.png"]}),
    Field(name="videos", by=(L,), row={**PLAIN, "videos": ["a.mp4"]}),
    Field(name="audios", by=(L,), row={**PLAIN, "audios": ["a.wav"]}),
    Field(name="conversations", by=(A, L), row={"conversations": [HUMAN, GPT]}),
    Field(name="conversations[].from, .value", by=(A, L), row={"conversations": [HUMAN, GPT]},
          without={"conversations": [{}, {}]}),
    Field(name="conversations[].role, .content", by=(A,), row={"conversations": [USER, ANSWER]},
          without={"conversations": [{}, {}]}),
    Field(
        name="conversations[].from: function_call", by=(L,),
        row={"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "find", "arguments": {}}'}]},
        without={"conversations": [HUMAN, {"from": "gpt", "value": '{"name": "find", "arguments": {}}'}]},
    ),
    Field(
        name="conversations[].from: observation", by=(L,),
        row={"conversations": [HUMAN, GPT, {"from": "observation", "value": "1"}, GPT]},
        without={"conversations": [HUMAN, GPT, HUMAN, GPT]},
    ),
    Field(name="system", by=(L,), row={"conversations": [HUMAN, GPT], "system": "s"}),
    Field(name="tools", by=(L,), row={"conversations": [HUMAN, GPT], "tools": "[" + '{"name": "find"}' + "]"}),
    Field(name="instruction", by=(A, L), row=ALPACA),
    Field(name="input", by=(A, L), row={**ALPACA, "input": "i"}),
    Field(name="output", by=(A, L), row=ALPACA),
    Field(name="system", by=(A, L), row={**ALPACA, "system": "s"}),
    Field(name="system_prompt", by=(A,), row={**ALPACA, "system_prompt": "s"}),
    Field(name="history", by=(L,), row={**ALPACA, "history": [["q1", "a1"]]}),
    Field(name="kto_tag", by=(L,), row={**ALPACA, "kto_tag": False}),
    Field(name="reflection", by=(A,), row={**ALPACA, "reflection": "r"}),
    Field(name="response", by=(A,), row={"instruction": "q", "response": "a"}, without=ALPACA),
    Field(name="question, answer", by=(A,), row={"question": "q", "answer": "a"}, without=ALPACA),
    Field(name="prompt", by=(A, L, T), row={"prompt": "q", "completion": "a"}),
    Field(name="completion", by=(T,), row={"prompt": "q", "completion": "a"}),
    Field(name="prompt, completion, of messages", by=(T,), row={"prompt": [USER], "completion": [ANSWER]},
          without=talk({**USER, "content": "other"}, ANSWER)),
    Field(name="label, true or false", by=(T,), row={"prompt": "q", "completion": "a", "label": False},
          without={"prompt": "q", "completion": "a"}),
    Field(name="completions, labels", by=(A, T), row={"prompt": "q", "completions": ["a"], "labels": [True]},
          without=PLAIN),
    Field(name="prompt, alone", by=(T,), row={"prompt": "q"}, without=PLAIN),
    Field(name="text", by=(A, L, T), row={"text": "t"}),
    Field(name="segments", by=(A,), row={"segments": [{"label": True, "text": "t"}]}, without=PLAIN),
    Field(name="input_ids", by=(A, T), row={"input_ids": [1], "attention_mask": [1], "labels": [1]}, without=PLAIN),
    Field(name="chosen, rejected", by=(A, L, T), row=PAIR, without={**PAIR, "chosen": [], "rejected": []},
          format=PAIRS),
    Field(name="prompt", by=(T,), row=PAIR, format=PAIRS),
    Field(name="instruction", by=(L,), row={"instruction": "q", "chosen": "a", "rejected": "b"}, format=PAIRS),
    Field(name="history", by=(L,), format=PAIRS,
          row={"instruction": "q", "chosen": "a", "rejected": "b", "history": [["q1", "a1"]]}),
    Field(name="system", by=(A, L), row={"instruction": "q", "system": "s", "chosen": "a", "rejected": "b"},
          format=PAIRS),
    Field(name="tools", by=(L, T), row={**PAIR, "tools": [TOOL]}, format=PAIRS),
    Field(name="margin", by=(T,), row={**PAIR, "margin": 0.5}, format=PAIRS),
    Field(name="score_chosen", by=(T,), row={**PAIR, "score_chosen": 1.0}, format=PAIRS),
    Field(name="images", by=(L, T), row={**PAIR, "images": ["a.png"]}, format=PAIRS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a row."""

    format: str
    example: Example | None
    unused: tuple[str, ...] = ()
    refusal: str = ""


def read(row: dict[str, Any], format: DataFormat = DataFormat.AUTO) -> Outcome:
    """A row as a job file's row is read."""
    reading, raw = Reading(fields=RowFields.ALL), [RawRow(number=1, value=row)]
    try:
        found, _ = detect_format(raw, "d", format)
    except DataError as error:
        return Outcome(format="none", example=None, refusal=error.what)
    examples, refused = parse_each(raw, found, "d", reading=reading)
    example = examples[0] if examples else None
    unused = tuple(reading.unused)
    return Outcome(format=found.value, example=example, unused=unused, refusal=refused[0].what if refused else "")


def outcome(field: Field) -> str:
    """Used, named, or refused with a sentence. Raises AssertionError for a field that is dropped silently."""
    found, bare = read(field.row, field.format), read(field.bare, field.format)
    if found.refusal:
        return f"refused: “{found.refusal}”" if found.format != "none" else "refused: columns of no known format"
    if found.unused:
        return "named as not used"
    assert found.example != bare.example, f"{field.name} is dropped without a word"
    return "used"


def lines() -> Iterator[str]:
    yield "| format | field | documented by | loractl |"
    yield "| --- | --- | --- | --- |"
    for field in FIELDS:
        format = read(field.row, field.format).format
        yield f"| {format} | `{field.name}` | {', '.join(field.by)} | {outcome(field)} |"
