"""What the rows of a file ask, whatever else they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.data.questions import Questions
from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, DatasetSpec


def asked(
    tmp_path: Path, rows: list[dict[str, Any]], format: DataFormat, **dataset: Any
) -> list[list[tuple[str, str]]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = Questions(path, DatasetSpec(path="a/b", **dataset), format)
    assert [question.number for question in read] == list(range(1, len(rows) + 1)), "it is read anew each time"
    return [[(turn.role, turn.content) for turn in question.turns] for question in read]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("format", "row", "turns"),
    [
        (DataFormat.MESSAGES, {"messages": [said("user", "a")]}, [("user", "a")]),
        (DataFormat.MESSAGES, {"messages": [said("user", "a"), said("assistant", "b")]}, [("user", "a")]),
        (
            DataFormat.MESSAGES,
            {"messages": [said("user", "a"), said("assistant", "b"), said("user", "c")]},
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
        (DataFormat.MESSAGES, {"prompt": "a"}, [("user", "a")]),
        (DataFormat.SHAREGPT, {"conversations": [{"from": "human", "value": "a"}]}, [("user", "a")]),
        (DataFormat.ALPACA, {"instruction": "a", "input": "b"}, [("user", "a\n\nb")]),
        (DataFormat.ALPACA, {"instruction": "a", "input": "", "output": "c"}, [("user", "a")]),
        (DataFormat.PROMPT_COMPLETION, {"prompt": "a", "completion": "b"}, [("user", "a")]),
        (DataFormat.TEXT, {"text": "a"}, [("user", "a")]),
        (DataFormat.CLASSIFICATION, {"text": "a"}, [("user", "a")]),
        (DataFormat.PREFERENCE, {"prompt": [said("user", "a")], "chosen": "b", "rejected": "c"}, [("user", "a")]),
        (DataFormat.PREFERENCE, {"system": "s", "prompt": "a"}, [("system", "s"), ("user", "a")]),
        (DataFormat.PREFERENCE, {"instruction": "a", "input": "b"}, [("user", "a\n\nb")]),
        (DataFormat.PREFERENCE, {"messages": [said("user", "a")]}, [("user", "a")]),
        (DataFormat.PREFERENCE, {"conversations": [{"from": "human", "value": "a"}]}, [("user", "a")]),
        (DataFormat.PREFERENCE_TEXT, {"prompt": "a", "chosen": " b", "rejected": " c"}, [("user", "a")]),
        (DataFormat.CLASSIFICATION, {"text": "a", "label": "b"}, [("user", "a")]),
    ],
)
def test_a_row_asks_what_stands_before_its_answer(
    tmp_path: Path, format: DataFormat, row: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    assert asked(tmp_path, [row], format) == [turns]


def test_tools_and_calls_of_a_row_are_part_of_what_it_asks(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "disk", "arguments": "{}"}}]}
    messages = [said("user", "a"), call, {"role": "tool", "content": "96 %"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": [{"name": "disk"}]}))
    (question,) = Questions(path, DatasetSpec(path="a/b", fields="all"), DataFormat.MESSAGES)
    assert [turn.role for turn in question.turns] == ["user", "assistant", "tool"]
    assert json.loads(question.turns[1].calls)[0]["function"] == {"name": "disk", "arguments": {}}
    assert json.loads(question.tools) == [{"type": "function", "function": {"name": "disk"}}]


def test_columns_are_called_as_in_the_training_or_by_our_own_names(tmp_path: Path) -> None:
    columns = {"text": "review", "label": "mood"}
    for name in ("review", "text"):
        found = asked(tmp_path, [{name: "good"}], DataFormat.CLASSIFICATION, columns=columns)
        assert found == [[("user", "good")]]
    inner = {"role": "speaker", "content": "words"}
    rows = [{"messages": [{"speaker": "user", "words": "a"}]}]
    assert asked(tmp_path, rows, DataFormat.MESSAGES, columns=inner) == [[("user", "a")]]


def test_the_alpaca_template_has_its_heading(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "b"}]
    assert asked(tmp_path, rows, DataFormat.ALPACA, template="alpaca") == [[("user", "a\n\n### Input:\nb")]]


@pytest.mark.parametrize(
    ("format", "rows", "what"),
    [
        (DataFormat.MESSAGES, [{"body": "a"}], "asks nothing: it has body"),
        (DataFormat.CLASSIFICATION, [{"label": "a"}], "asks nothing: it has label"),
        (DataFormat.CLASSIFICATION, [{"text": "a"}, {"text": ""}], "text is empty"),
        (DataFormat.CLASSIFICATION, [{"text": "a"}, {"text": 3}], "text is a number, not text"),
        (DataFormat.MESSAGES, [{"messages": [said("system", "a")]}], "has no message of the user"),
        (DataFormat.MESSAGES, [{"messages": []}], "messages is empty"),
    ],
)
def test_a_row_that_asks_nothing_is_named(
    tmp_path: Path, format: DataFormat, rows: list[dict[str, Any]], what: str
) -> None:
    with pytest.raises(DataError) as refused:
        asked(tmp_path, rows, format)
    assert (refused.value.what, refused.value.row) == (what, len(rows))


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "cut \ud83d"}, DataFormat.TEXT),
        ({"messages": [said("user", "cut \ud83d")]}, DataFormat.MESSAGES),
        ({"messages": [said("user", "a")], "tools": [{"name": "cut \ud83d"}]}, DataFormat.MESSAGES),
    ],
)
def test_half_a_character_is_refused_with_its_row(tmp_path: Path, row: dict[str, Any], format: DataFormat) -> None:
    """A tokenizer failed at it: a fault of loractl, to the person who asked."""
    with pytest.raises(DataError, match="row 1: has half a character"):
        asked(tmp_path, [row], format, fields="all")
