"""Rows: the formats, what is wrong with which row, and the split by content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.data.examples import Example, Turn
from loractl.common.data.formats import detect_format, map_columns, parse_examples
from loractl.common.data.inspection import Leaks, check_examples
from loractl.common.data.rows import RawRow, read_rows
from loractl.common.data.split import split_data, split_held_out
from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec


def message(role: Any, content: Any = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


USER, ANSWER, SYSTEM = message("user", "How?"), message("assistant", "So."), message("system", "Be brief.")


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in caught.value.sentence
    return caught.value


def learn(value: dict[str, Any], format: DataFormat) -> Example:
    examples, dropped = parse_examples([RawRow(number=7, value=value)], format, "data.jsonl")
    assert dropped == []
    return examples[0]


def wrong_row(value: dict[str, Any], format: DataFormat) -> str:
    with pytest.raises(DataError) as caught:
        learn(value, format)
    assert caught.value.row == 7
    assert caught.value.hint == "correct it, or leave such rows out with dataset.on_bad_row: drop"
    return caught.value.sentence.removeprefix("data.jsonl: row 7: ")


def texts(*names: str) -> list[Example]:
    return [Example(number=n, text=name) for n, name in enumerate(names, start=1)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '{"text": "a"}\n\n{"text": "b"}\n'),
        ("d.JSONL", '\ufeff{"text": "a"}\r\n{"text": "b"}'),
        ("d.json", '[{"text": "a"}, {"text": "b"}]'),
        ("d.csv", "text\na\nb\n"),
        ("d.csv", '\ufefftext\r\n"a"\r\nb\r\n'),
    ],
)
def test_each_text_format_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    assert [row.value for row in read_rows(write(tmp_path, name, text))] == [{"text": "a"}, {"text": "b"}]


def test_a_parquet_file_gives_rows_in_order_and_a_damaged_one_a_sentence(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="comes with the worker extra")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "d.parquet")
    assert read_rows(tmp_path / "d.parquet") == [
        RawRow(number=1, value={"text": "a"}),
        RawRow(number=2, value={"text": "b"}),
    ]
    assert "is not valid parquet" in refused(write(tmp_path, "bad.parquet", "text")).sentence
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    assert "has no rows" in refused(tmp_path / "none.parquet").sentence
    assert "no such file" in refused(tmp_path / "absent.parquet").sentence


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet"])
def test_a_pipe_is_no_data_and_nobody_waits_for_its_writer(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    error = refused(tmp_path / name)
    assert "is not a regular file" in error.sentence
    assert error.hint == "write the rows into a file"


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_a_row_without_end_is_not_read_to_its_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with write(tmp_path, name, '{"text": "a"}\n').open("r+b") as file:
        file.truncate(17 << 20)  # zeros up to there
    error = refused(tmp_path / name)
    assert "line 2 has more than 16.0 MiB" in error.sentence
    assert error.hint == "a row is one example, on a separate line; for longer rows: LORACTL_MAX_ROW=64MiB"
    long = write(tmp_path, "d.jsonl", json.dumps({"text": "x" * (3 << 20)}))
    assert read_rows(long)
    monkeypatch.setenv("LORACTL_MAX_ROW", "2MiB")
    assert "has more than 2.0 MiB" in refused(long).sentence
    monkeypatch.setenv("LORACTL_MAX_ROW", "4MiB")
    assert read_rows(long)


def test_what_a_file_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="comes with the worker extra")
    import pyarrow.parquet as parquet

    packed = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * (1 << 20)] * 20}), packed, compression="zstd")
    assert packed.stat().st_size < 10_000 and len(read_rows(packed)) == 20
    array = write(tmp_path, "d.json", json.dumps([{"text": "x" * (3 << 20)}]))
    assert read_rows(array)
    monkeypatch.setenv("LORACTL_MAX_DATA", "2MiB")
    error = refused(packed)
    assert "unpacks to more than 2.0 MiB" in error.sentence
    assert error.hint == "LORACTL_MAX_DATA=... allows more, here and on the workers"
    assert "has 3.0 MiB, a .json file at most 2.0 MiB" in refused(array).sentence
    monkeypatch.delenv("LORACTL_MAX_DATA")
    parquet.write_table(pyarrow.table({"text": ["a", "x" * (17 << 20)]}), packed, compression="zstd")
    error = refused(packed)
    assert error.row == 2 and "has more than 16.0 MiB" in error.sentence


def test_a_row_of_jsonl_is_numbered_by_its_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "d.jsonl", '\n{"text": "a"}\n\n\n{"text": "b"}\n'))
    assert [row.number for row in rows] == [2, 5]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_separator_of_unicode_within_a_value_does_not_end_the_row(tmp_path: Path, separator: str) -> None:
    value = f"a{separator}b"
    csv = write(tmp_path, "d.csv", f"text,note\n{value},x\n")
    assert read_rows(csv) == [RawRow(number=1, value={"text": value, "note": "x"})]
    if separator in "\u2028\u2029\x85":  # JSON lets these stand unescaped
        line = json.dumps({"text": value}, ensure_ascii=False)
        assert read_rows(write(tmp_path, "d.jsonl", line + "\n")) == [RawRow(number=1, value={"text": value})]


def test_a_quoted_field_of_csv_may_hold_commas_and_lines(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, "d.csv", 'prompt,completion\n"a, b\nc","say ""yes"""\n'))
    assert row.value == {"prompt": "a, b\nc", "completion": 'say "yes"'}


@pytest.mark.parametrize(
    ("name", "text", "row", "what"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": \n', 2, "is not valid JSON (column 10: expecting value)"),
        ("d.jsonl", '{"text": "a"}\n["b"]\n', 2, "is a list, not an object with columns"),
        ("d.jsonl", '{"n": ' + "1" * 5000 + "}\n", 1, "is not valid JSON"),
        ("d.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n', 2, 'has an object with two keys "text"'),
        ("d.json", '[{"turns": [{"role": "a", "role": "b"}]}]', None, 'has an object with two keys "role"'),
        ("d.json", '[{"text": "a"}, 5]', 2, "is a number, not an object with columns"),
        ("d.json", '{"text": "a"}', None, "is not an array of objects"),
        ("d.json", "[" + "1" * 5000 + "]", None, "is not valid JSON"),
        ("d.json", "[" * 100_000, None, "is not valid JSON"),
        ("d.csv", "a,b\n1,2\n3\n", 2, "does not have the 2 fields of the header"),
        ("d.csv", "a,b\n1,2,3\n", 1, "does not have the 2 fields of the header"),
        ("d.csv", 'a,b\n"1,2\n', 1, "is not valid CSV: unexpected end of data"),
        ("d.csv", "text,note,text\na,b,c\n", None, "has two columns named text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, row: int | None, what: str) -> None:
    error = refused(write(tmp_path, name, text))
    assert error.row == row
    assert what in error.sentence


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("d.json", '{"text": "a"}\n{"text": "b"}\n', "one object a line? name it .jsonl"),
        ("d.json", '{"v": 1, "data": [{"text": "a"}]}', "its rows are in 'data': write that array alone"),
        ("d.json", '{"oos": [1], "train": [], "val": [1, 2]}', "its rows are in 'train': write that array alone"),
        ("d.json", '{"oos": [1], "val": [1, 2]}', "its rows are in 'val': write that array alone"),
        ("d.txt", "a", 'write one JSON object a line, like {"text": "..."}, and name it .jsonl'),
        ("d.jsonl.gz", "a", "it is packed: unpack it first"),
        ("d.csv", "review;mood\ngood;1\n", "write commas between the columns, and quote a value that holds one"),
        ("d.jsonl", '[\n{"text": "a"}\n]\n', "a .jsonl file has one object a line; name it .json if it is one array"),
        ("d.jsonl", '[{"text": "a"}]\n', "a .jsonl file has one object a line; name it .json if it is one array"),
    ],
)
def test_a_file_with_the_other_ending_gets_a_hint(tmp_path: Path, name: str, text: str, hint: str) -> None:
    assert refused(write(tmp_path, name, text)).hint == hint


@pytest.mark.parametrize(("name", "text"), [("d.jsonl", "\n \n"), ("d.json", "[]"), ("d.csv", "a,b\n"), ("e.csv", "")])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert "has no rows" in refused(write(tmp_path, name, text)).sentence


def test_a_file_that_cannot_be_read_at_all_is_refused_in_a_sentence(tmp_path: Path) -> None:
    latin = refused(write(tmp_path, "d.jsonl", '{"text": "Büro"}'.encode("latin-1")))
    assert "is not UTF-8 (byte 11)" in latin.sentence
    assert latin.hint == "convert it: iconv -f latin-1 -t utf-8"
    assert refused(write(tmp_path, "d.jsonl", "{}".encode("utf-16"))).hint == "convert it: iconv -f utf-16 -t utf-8"
    assert refused(write(tmp_path, "d.jsonl", b"\x1f\x8b\x08")).hint == "it is packed with gzip: unpack it first"
    assert "no such file" in refused(tmp_path / "absent.jsonl").sentence
    assert "has none of the endings" in refused(write(tmp_path, "d.txt", "a")).sentence
    (tmp_path / "rows").mkdir()
    assert refused(tmp_path / "rows").hint == "it is a folder: name one file in it"
    (tmp_path / "folder.jsonl").mkdir()
    assert refused(tmp_path / "folder.jsonl").sentence.endswith("folder.jsonl: is a folder")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("prompt,completion", "name it .csv if it is a table"),
        ('[{"a": 1},', "name it .json if it is one array"),
        ("{'a': 'b'}", "JSON has double quotes"),
        ('{"a": "b"},', "a line ends without a comma"),
        ('{"a": “b”}', "write straight quotes"),
    ],
)
def test_a_line_of_something_else_than_json_gets_its_way(tmp_path: Path, line: str, hint: str) -> None:
    assert hint in str(refused(write(tmp_path, "d.jsonl", f"{line}\n")).hint)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rows.json", "did you mean {tmp_path}/rows.jsonl?"),
        ("C:\\Users\\ada\\rows.jsonl", "write / between folders"),
        ("$HOME/rows.jsonl", "variables are not replaced"),
    ],
)
def test_a_path_without_a_file_gets_what_was_meant(tmp_path: Path, name: str, hint: str) -> None:
    write(tmp_path, "rows.jsonl", "{}\n")
    assert hint.format(tmp_path=tmp_path) in str(refused(tmp_path / name).hint)


@pytest.mark.parametrize(
    ("value", "format", "why"),
    [
        ({"messages": [], "text": "x"}, DataFormat.MESSAGES, "the rows have messages"),
        ({"instruction": "a", "input": "", "output": "b"}, DataFormat.ALPACA, "the rows have instruction and output"),
        ({"prompt": "a", "completion": "b"}, DataFormat.PROMPT_COMPLETION, "the rows have prompt and completion"),
        ({"text": "a", "messages": None}, DataFormat.TEXT, "the rows have text"),
    ],
)
def test_the_format_is_told_by_the_columns_with_a_reason(value: dict[str, Any], format: DataFormat, why: str) -> None:
    assert detect_format([RawRow(number=1, value=value)], "d") == (format, why)


HALF = "cut \ud83d"


@pytest.mark.parametrize(
    ("value", "format"),
    [
        ({"text": HALF}, DataFormat.TEXT),
        ({"prompt": HALF, "completion": "b"}, DataFormat.PROMPT_COMPLETION),
        ({"instruction": "a", "output": HALF}, DataFormat.ALPACA),
        ({"text": HALF, "label": "a"}, DataFormat.CLASSIFICATION),
        ({"prompt": "a", "chosen": "b", "rejected": HALF}, DataFormat.PREFERENCE_TEXT),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": HALF}],
            },
            DataFormat.PREFERENCE,
        ),
    ],
)
def test_half_a_character_is_refused_before_a_tokenizer_fails_at_it(value: dict[str, Any], format: DataFormat) -> None:
    rows = [RawRow(number=number, value=row) for number, row in enumerate((value, json_whole(value)), start=1)]
    with pytest.raises(DataError, match="d: row 1: has half a character"):
        parse_examples(rows, format, "d")
    examples, dropped = parse_examples(rows, format, "d", BadRow.DROP)
    assert [example.number for example in examples] == [2] and len(dropped) == 1


def json_whole(value: dict[str, Any]) -> dict[str, Any]:
    """The row with the whole character."""
    whole: dict[str, Any] = json.loads(json.dumps(value).replace("\\ud83d", "\\ud83d\\ude00"))
    return whole


def test_a_format_that_was_set_is_not_guessed_and_unknown_columns_are_listed() -> None:
    rows = [RawRow(number=3, value={"question": "a"})]
    assert detect_format(rows, "d", DataFormat.TEXT) == (DataFormat.TEXT, "set by dataset.format")
    with pytest.raises(DataError, match="d: row 3: the columns question are those of no known format") as caught:
        detect_format(rows, "d")
    assert caught.value.hint is not None
    assert "alpaca: instruction, output" in caught.value.hint
    shared = [RawRow(number=1, value={"messages": [{"from": "human", "value": "a"}]})]
    with pytest.raises(DataError, match="message 1 has no role; it has from, value") as caught:
        parse_examples(shared, DataFormat.MESSAGES, "d")
    assert caught.value.hint == "dataset.columns: {conversations: messages} reads such rows"
    with pytest.raises(DataError, match="known format; completion of this row is null"):
        detect_format([RawRow(number=1, value={"prompt": "a", "completion": None})], "d")


@pytest.mark.parametrize(
    ("columns", "wanted", "hint"),
    [
        (
            "promt completion",
            DataFormat.AUTO,
            "did you mean prompt? rename the column, or set dataset.columns: {prompt: promt}",
        ),
        ("Prompt Completion", DataFormat.AUTO, "did you mean prompt?"),
        ("question answer", DataFormat.AUTO, "like {prompt: question, completion: answer}"),
        ("text lable", DataFormat.CLASSIFICATION, "did you mean label?"),
        ("chosen reject", DataFormat.PREFERENCE, "did you mean rejected?"),
    ],
)
def test_a_slip_in_a_column_s_name_gets_the_name(columns: str, wanted: DataFormat, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format([RawRow(number=1, value=dict.fromkeys(columns.split(), "a"))], "d", wanted)
    assert hint in str(caught.value.hint)
    with pytest.raises(DataError) as caught:
        map_columns([RawRow(number=1, value={"answr": "a"})], {"completion": "answer"}, "d")
    assert caught.value.hint == "did you mean answr?"


def test_spaces_at_the_ends_of_a_columns_name_are_seen_and_a_mapping_the_wrong_way_round() -> None:
    rows = [RawRow(number=1, value={"ID": "1", "Frage ": "a", "": "b"})]
    with pytest.raises(
        DataError, match=r'no column Frage that dataset.columns names; it has ID, "Frage ", ""'
    ) as caught:
        map_columns(rows, {"prompt": "Frage"}, "d")
    assert caught.value.hint == 'write "Frage " in dataset.columns, or take the spaces out of the file'
    with pytest.raises(DataError, match=r'the columns ID, "Frage ", "" are those of no known format'):
        detect_format(rows, "d")
    with pytest.raises(DataError, match=r'has no text .it has ID, "Frage ", ""'):
        parse_examples(rows, DataFormat.TEXT, "d")
    with pytest.raises(DataError, match=r"no column prompt that") as caught:
        map_columns([RawRow(number=1, value={"instruction": "a", "output": "b"})], {"instruction": "prompt"}, "d")
    assert caught.value.hint == "loractl's name comes first, then the data's: write {prompt: instruction}"
    with pytest.raises(DataError, match=r"no column Answer that dataset\.columns") as caught:
        map_columns(rows, {"prompt": "Answer"}, "d")
    assert caught.value.hint is None


def test_a_row_of_each_format_becomes_what_is_learned() -> None:
    turns = (Turn(role="user", content="How?"), Turn(role="assistant", content="So."))
    assert learn({"messages": [USER, ANSWER]}, DataFormat.MESSAGES).turns == turns
    assert learn({"instruction": "How?", "input": None, "output": "So."}, DataFormat.ALPACA).turns == turns
    joined = learn({"instruction": "How?", "input": "a", "output": "So."}, DataFormat.ALPACA).turns[0]
    assert joined.content == "How?\n\na"
    completed = learn({"prompt": "2+2=", "completion": "4"}, DataFormat.PROMPT_COMPLETION)
    assert (completed.prompt, completed.text) == ("2+2=", "2+2=4")
    assert learn({"text": "all"}, DataFormat.TEXT).text == "all"


def test_a_conversation_may_open_with_a_system_message_and_use_tools() -> None:
    messages = [SYSTEM, USER, ANSWER, USER, message("tool"), message("tool"), ANSWER]
    assert [t.role for t in learn({"messages": messages}, DataFormat.MESSAGES).turns] == [m["role"] for m in messages]


def test_messages_take_the_names_of_roles_that_other_tools_take() -> None:
    """Axolotl's chat_template reads human and gpt in any conversation."""
    messages = [SYSTEM, message("human"), message("gpt"), message("human"), message("gpt")]
    learned = learn({"messages": messages}, DataFormat.MESSAGES)
    assert [turn.role for turn in learned.turns] == ["system", "user", "assistant", "user", "assistant"]


ROLES = "system, user, assistant, tool, human, gpt, chatgpt, function_call, observation, function_response"


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (None, "messages is missing or null, not a list of messages"),
        ([], "messages is empty"),
        (["hi"], "message 1 is text, not an object with role and content"),
        ([{"speaker": "a", "content": "b"}], "message 1 has no role; it has speaker, content"),
        ([message("bot")], f"message 1 has the role 'bot', not one of {ROLES}"),
        ([message(["user"])], f"message 1 has the role ['user'], not one of {ROLES}"),
        ([USER, message("assistant", None)], "message 2: content is missing or null, not text"),
        ([USER, message("assistant", [1])], "message 2: content is a list, not text"),
        ([USER, message("assistant", " \n")], "message 2: the assistant's answer is empty"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "message 2: the system message must come first"),
        ([USER, SYSTEM, ANSWER], "message 2: the system message must come first"),
        ([ANSWER, USER], "message 1: the assistant answers before the user has spoken"),
        ([SYSTEM, ANSWER], "message 2: the assistant answers before the user has spoken"),
        ([USER, USER, ANSWER], "message 2 is the second user message in a row"),
        ([USER, ANSWER, ANSWER], "message 3 is the second assistant message in a row"),
        ([SYSTEM, USER], "has no assistant message to learn from"),
    ],
)
def test_a_conversation_that_cannot_be_learned_from_is_refused(messages: Any, what: str) -> None:
    assert wrong_row({"messages": messages}, DataFormat.MESSAGES) == what


@pytest.mark.parametrize(
    ("value", "format", "what"),
    [
        ({"instruction": "a"}, DataFormat.ALPACA, "has no output (it has instruction)"),
        ({"instruction": "a", "output": " "}, DataFormat.ALPACA, "output is empty"),
        ({"instruction": "a", "input": 5, "output": "b"}, DataFormat.ALPACA, "input is a number, not text"),
        ({"prompt": True, "completion": "b"}, DataFormat.PROMPT_COMPLETION, "prompt is true or false, not text"),
        ({"prompt": "a", "completion": None}, DataFormat.PROMPT_COMPLETION, "completion is missing or null, not text"),
        ({}, DataFormat.TEXT, "has no text (it has nothing)"),
    ],
)
def test_a_missing_empty_or_wrong_column_is_refused(value: dict[str, Any], format: DataFormat, what: str) -> None:
    assert wrong_row(value, format) == what


def test_bad_rows_are_left_out_and_each_is_reported_where_that_was_asked_for() -> None:
    rows = [RawRow(number=n, value={"text": text}) for n, text in enumerate(["a", "", "c"], start=1)]
    examples, dropped = parse_examples(rows, DataFormat.TEXT, "d", BadRow.DROP)
    assert [e.number for e in examples] == [1, 3]
    assert dropped == ["d: row 2: text is empty"]


def test_a_file_of_bad_rows_only_is_refused_also_where_they_are_dropped() -> None:
    rows = [RawRow(number=n, value={"text": ""}) for n in (1, 2)]
    with pytest.raises(DataError, match="every row was dropped; the first: d: row 1: text is empty"):
        parse_examples(rows, DataFormat.TEXT, "d", BadRow.DROP)


@pytest.mark.parametrize(("rows", "test_size", "held"), [(10, 0.1, 1), (10, 0.25, 2), (2, 0.9, 1), (3, 0.01, 1)])
def test_the_share_held_out_is_rounded_and_leaves_both_sides_something(rows: int, test_size: float, held: int) -> None:
    train, held_out = split_held_out(texts(*(f"row {n}" for n in range(rows))), test_size, "d")
    assert (len(train), len(held_out)) == (rows - held, held)


def test_equal_rows_alone_cannot_be_split() -> None:
    with pytest.raises(DataError, match="needs at least two different rows"):
        split_held_out(texts("a", "a", "a"), 0.5, "d")


def test_the_content_decides_the_hash_and_the_place_does_not() -> None:
    assert Example(number=1, text="a").content_hash() == Example(number=9, text="a").content_hash()
    parts = [
        Example(number=1, text="ab"),
        Example(number=1, text="ab", prompt="a"),
        Example(number=1, turns=(Turn(role="user", content="ab"),)),
        Example(number=1, turns=(Turn(role="assistant", content="ab"),)),
    ]
    assert len({e.content_hash() for e in parts}) == len(parts)


def likenesses(names: Iterable[str]) -> set[int]:
    return {Example(number=1, text=name).likeness() for name in names}


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("How do I print?", "how do i PRINT?", True),
        ("How do I print?", " How  do I print ?\n", True),
        ("print it", "printit", True),
        ("1 23", "12 3", False),
        ("1 2", "1  2", True),
        ("print it", "print its", False),
        ("ab", "a b c", False),
    ],
)
def test_rows_that_differ_in_case_or_spaces_are_alike(one: str, other: str, alike: bool) -> None:
    def asked(text: str) -> Example:
        return Example(number=1, turns=(Turn(role="user", content=text), Turn(role="assistant", content="so")))

    for make in (asked, lambda text: Example(number=1, text=text)):
        assert (make(one).likeness() == make(other).likeness()) == alike
    labels = {Example(number=1, text="a", label=label).likeness() for label in ("yes", "Yes", None)}
    assert len(labels) == 3, "a label is what it is"


def test_held_out_rows_count_once_and_near_copies_of_what_is_trained_on_are_left_out() -> None:
    def raw(*names: str) -> list[RawRow]:
        return [RawRow(number=n, value={"text": name}) for n, name in enumerate(names, start=1)]

    dataset = DatasetSpec(path="d.jsonl", eval_path="h.jsonl")
    trained = [f"row {n} of all" for n in range(30)]
    copies = [*(name.upper() for name in trained[:5]), *(f" {name}" for name in trained[5:8]), trained[8]]
    split = split_data(dataset, raw(*trained), raw(*copies, *["new a", "new b", "New A"] * 6))
    assert [e.text for e in split.held_out] == ["new a", "new b"]
    assert (split.overlap, split.near, split.repeated) == (9, 8, 16)
    told = {f.kind: f.text for f in check_examples(split.train, split.held_out, split)}
    assert told["overlap"].startswith("9 rows of the held-out file") and "8 of them in another case" in told["overlap"]
    assert told["repeated held-out rows"].startswith("16 rows held out are duplicates, apart")
    with pytest.raises(DataError, match=r"h\.jsonl: all of its rows are trained on, too"):
        split_data(dataset, raw(*trained), raw(*copies))
    own = split_data(DatasetSpec(path="d.jsonl", test_size=0.5), raw(*["a b", "A b", "c", "c", "d", "e"]), None)
    assert len(own.held_out) == 2 and len(own.train) + len(own.held_out) + own.repeated == 6


@given(
    st.lists(st.text("abAB 12.", max_size=4), min_size=2, max_size=30).filter(lambda names: len(likenesses(names)) > 1),
    st.floats(0.01, 0.99),
    st.randoms(use_true_random=False),
)
def test_the_split_depends_on_content_alone_and_parts_no_rows_that_are_alike(
    names: list[str], test_size: float, random: Any
) -> None:
    examples = texts(*names)
    train, held_out = split_held_out(examples, test_size, "d")
    assert train
    assert held_out
    trained, held = likenesses(e.text for e in train), likenesses(e.text for e in held_out)
    assert not trained & held and trained | held == likenesses(names)
    assert len(held_out) == len(held), "each row counts once"
    assert {e.number for e in train} == {e.number for e in examples if likenesses([e.text]) <= trained}
    shuffled = random.sample(examples, len(examples))
    assert {e.text for e in split_held_out(shuffled, test_size, "d")[1]} == {e.text for e in held_out}


def numbered(*names: str) -> list[RawRow]:
    return [RawRow(number=n, value={"text": name}) for n, name in enumerate(names, start=1)]


@given(
    st.lists(st.text("abAB 12.", max_size=4), min_size=2, max_size=30).filter(lambda names: len(likenesses(names)) > 2),
    st.floats(0.01, 0.6),
    st.floats(0.01, 0.39),
)
def test_final_rows_are_none_that_is_trained_on_or_held_out_and_move_no_held_out_row(
    names: list[str], test_size: float, final_size: float
) -> None:
    asked = {"path": "d.jsonl", "format": "text", "test_size": test_size}
    rows = [RawRow(number=n, value={"text": f"row {name}"}) for n, name in enumerate(names)]
    plain = split_data(DatasetSpec(**asked), rows, None)
    if len(set(plain.train.likenesses)) < 2:
        with pytest.raises(DataError, match="one to train on and one final"):
            split_data(DatasetSpec(**asked, final_size=final_size), rows, None)
        return
    found = split_data(DatasetSpec(**asked, final_size=final_size), rows, None)
    assert plain.final is None and found.final
    sides = [likenesses(e.text for e in side) for side in (found.train, found.held_out, found.final)]
    assert sum(map(len, sides)) == len(set().union(*sides)) == len(likenesses(e.value["text"] for e in rows))
    assert [e.number for e in found.held_out] == [e.number for e in plain.held_out], "jobs without them are comparable"
    assert len(sides[2]) == len(found.final), "each row counts once"
    wanted = max(1, round(final_size * len(set().union(*sides))))
    assert len(found.final) == min(wanted, len(set(plain.train.likenesses)) - 1)


def test_another_share_held_out_makes_no_final_row_one_that_is_chosen_by() -> None:
    rows = numbered(*(f"row {n}" for n in range(40)))
    splits = [split_data(DatasetSpec(path="d", test_size=size, final_size=0.25), rows, None) for size in (0.1, 0.5)]
    finals = [{e.text for e in split.final or ()} for split in splits]
    assert len(finals[0]) == 10 and finals[0] == finals[1]


def test_a_final_file_gives_the_rows_that_are_new() -> None:
    dataset = DatasetSpec(path="d.jsonl", eval_path="h.jsonl", final_path="f.jsonl", on_bad_row=BadRow.DROP)
    train, held = numbered(*(f"row {n}" for n in range(30))), numbered(*(f"held {n}" for n in range(10)))
    last = [*numbered("ROW 1", "held 2", "new", "New ", "other"), RawRow(number=6, value={"text": ""})]
    split = split_data(dataset, train, held, final_rows=last)
    assert split.final is not None and [e.text for e in split.final] == ["new", "other"]
    assert (split.final_overlap, split.final_repeated, len(split.dropped)) == (2, 1, 1)
    assert len(split.train) == 30 and len(split.held_out) == 10
    told = [f.text for f in check_examples(split.train, split.held_out, split, final=Leaks.of_final(split.final))]
    assert "2 rows of the final file left out, because they are trained on or held out" in told
    assert "1 row of the final ones is a duplicate, apart from case and spaces" in told
    assert any(text.startswith("only 2 final: too few for an interval") for text in told)
    with pytest.raises(DataError, match=r"f\.jsonl: all of its rows are trained on or held out, too"):
        split_data(dataset, train, held, final_rows=last[:2])


def test_a_row_that_stands_in_the_held_out_file_too_is_not_made_a_final_one() -> None:
    """It is left out there because it is trained on."""
    train = numbered(*(f"row {n}" for n in range(20)))
    held = numbered(*(f"row {n}" for n in range(15)), "new")
    dataset = DatasetSpec(path="d.jsonl", eval_path="h.jsonl", final_size=0.2)
    split = split_data(dataset, train, held)
    assert split.overlap == 15 and {e.text for e in split.final or ()} <= {f"row {n}" for n in range(15, 20)}


def test_final_rows_that_the_training_gives_away_are_told_as_such() -> None:
    asked = [{"messages": [{"role": "user", "content": f"who wrote book number {n} of the shelf"},
                           {"role": "assistant", "content": f"author {n}"}]} for n in range(30)]  # fmt: skip
    again = [{"messages": [{"role": "user", "content": f"Please: who wrote book number {n} of the shelf?"},
                           {"role": "assistant", "content": f"the author {n}"}]} for n in range(3)]  # fmt: skip
    rows, last = ([RawRow(number=n, value=row) for n, row in enumerate(side, 1)] for side in (asked, again))
    split = split_data(DatasetSpec(path="d", final_path="f", test_size=0.1), rows, None, final_rows=last)
    trained = {e.number for e in split.train}
    leaks = Leaks.of_final(split.final)
    assert leaks is not None
    told = check_examples(split.train, split.held_out, split, final=leaks)
    assert leaks.rows == [n for n in (1, 2, 3) if n in trained]
    assert any(f.kind == "resembling rows" and " of the final ones " in f.text for f in told)
