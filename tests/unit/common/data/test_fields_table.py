"""Fields that other trainers document: each is used, refused, or or named as not used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loractl.common.data.examples import Example
from loractl.common.data.fields import Reading
from loractl.common.data.formats import parse_each
from loractl.common.data.rows import RawRow
from loractl.common.job.sections import DataFormat, RowFields
from tests.fields_table import ANSWER, FIELDS, GPT, HUMAN, TOOL, USER, outcome, read, talk


def test_no_field_is_dropped_without_a_word() -> None:
    assert {outcome(field).partition(":")[0] for field in FIELDS} == {"used", "refused", "named as not used"}


CALLS = {"name": "find", "arguments": {"host": "heron"}}


def called(value: Any, **reading: Any) -> Example:
    row = {
        "conversations": [HUMAN, {"from": "function_call", "value": value}, {"from": "observation", "value": "1"}, GPT]
    }
    examples, refused = parse_each(
        [RawRow(number=1, value=row)], DataFormat.SHAREGPT, "d", reading=Reading(fields=RowFields.ALL, **reading)
    )
    if refused:
        raise refused[0]
    return examples[0]


def test_a_function_call_is_a_call_and_no_text() -> None:
    openai = [{"type": "function", "function": CALLS}]
    for value in (
        json.dumps(CALLS),
        json.dumps([CALLS]),
        CALLS,
        json.dumps({**CALLS, "arguments": '{"host": "heron"}'}),
    ):
        turn = called(value).turns[1]
        assert (turn.role, turn.content, json.loads(turn.calls)) == ("assistant", "", openai)
    two = json.loads(called(json.dumps([CALLS, CALLS])).turns[1].calls)
    assert two == openai * 2
    text = called(json.dumps(CALLS), ignore=frozenset({"conversations.function_call"})).turns[1]
    assert (text.content, text.calls) == (json.dumps(CALLS), "")


def test_a_job_of_before_still_learns_it_as_text_when_it_goes_on() -> None:
    row = {"conversations": [HUMAN, {"from": "function_call", "value": json.dumps(CALLS)}], "history": [["a", "b"]]}
    old = Reading(fields=RowFields.TEXT)
    (example,), _ = parse_each([RawRow(number=1, value=row)], DataFormat.SHAREGPT, "d", reading=old)
    assert example.turns[1].content == json.dumps(CALLS)
    messages = {"messages": [USER, ANSWER], "system": "s"}
    (plain,), _ = parse_each([RawRow(number=1, value=messages)], DataFormat.MESSAGES, "d", reading=old)
    assert len(plain.turns) == 2 and old.unused["system"] == 1, "not used, and said"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("find heron", "message 2: a function_call is no JSON like"),
        ("[]", "message 2: a function_call is no JSON like"),
        ('{"arguments": {}}', "message 2: a tool call has no function with a name"),
        ('{"name": "find", "arguments": "heron"}', "message 2: the arguments of find are not JSON"),
    ],
)
def test_a_function_call_that_is_none_is_refused(value: str, says: str) -> None:
    row = {"conversations": [HUMAN, {"from": "function_call", "value": value}]}
    assert says in read(row).refusal


def test_alpaca_s_history_is_earlier_rounds_whose_answers_are_learned() -> None:
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    example = read(row).example
    assert example is not None
    said = ["s", "q1", "a1", "q2", "a2", "q", "a"]
    assert [turn.content for turn in example.turns] == said and example.answers == [2, 4, 6]
    pair = {**row, "chosen": "c", "rejected": "d"}
    del pair["output"]
    chosen = read(pair, DataFormat.PREFERENCE).example
    assert chosen is not None and chosen.answers == [6], "a pair's prompt is given"
    assert read({**row, "history": []}).example == read({**row, "history": None}).example
    assert read({**row, "history": [["q1"]]}).refusal == (
        "history: round 1 is a list, not a list of a question and its answer"
    )
    assert read({**row, "history": [["q1", " "]]}).refusal == "history: round 1 has an empty answer"


def test_a_prompt_and_a_completion_of_messages_are_a_conversation_whose_completion_is_learned() -> None:
    """As TRL learns them."""
    earlier, row = {**ANSWER, "content": "first"}, {"prompt": [USER], "completion": [ANSWER]}
    alike = read(talk(USER, ANSWER)).example
    assert read(row).example == alike == read(row, DataFormat.PROMPT_COMPLETION).example
    longer = read({**row, "prompt": [USER, earlier, USER], "tools": [TOOL]}).example
    assert longer is not None and longer.answers == [3] and longer.tools
    assert read({**row, "prompt": [USER, earlier, USER], "completion": [USER]}).refusal is not None
    assert read({**row, "prompt": [USER, earlier], "completion": [USER]}).refusal == (
        "has no assistant message to learn from"
    )
    assert "label" in str(read({**row, "label": False}).refusal), "one that people disliked"
    assert read({**row, "completion": "a"}).refusal == "prompt is a list, not text"


def test_a_label_is_a_mark_of_good_and_bad_only_where_it_is_true_or_false() -> None:
    row = {"prompt": "q", "completion": "a"}
    assert read({**row, "label": "physics"}).unused == ("label",)
    assert read({"text": "t", "label": True}).unused == ("label",)
    assert read({"messages": [USER, ANSWER], "loss": 0.5}).unused == ("loss",), "of the whole row it only describes"
