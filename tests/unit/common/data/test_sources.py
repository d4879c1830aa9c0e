"""Several data sets as one: what is drawn of each, what is held out of each, and how rows are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.data.examples import Example
from loractl.common.data.rows import RawRow, open_rows
from loractl.common.data.split import Split, origin, own_rows, split_data
from loractl.common.errors import DataError
from loractl.common.job.sections import DatasetSpec


def raw(name: str, count: int) -> list[RawRow]:
    return [RawRow(number=n, value={"text": f"{name} {n}"}) for n in range(1, count + 1)]


def split(rows: dict[str, int], shares: dict[str, float] | None = None, **keys: Any) -> Split:
    """The split of data sets with so many rows each; the first one is dataset.path."""
    first, *others = rows
    more = [{"path": name, "share": (shares or {}).get(name)} for name in others]
    dataset = DatasetSpec.model_validate({"path": first, "more": more, **keys})
    return split_data(dataset, raw(first, rows[first]), None, [raw(name, rows[name]) for name in others])


def taken(of: Split) -> dict[str, int]:
    return {portion.file: portion.taken for portion in of.portions}


def apart(of: Split) -> list[Example]:
    """The rows by their numbers, which are apart and lead back to data set and row."""
    examples = sorted((*of.train, *of.held_out), key=lambda example: example.number)
    assert len({e.number for e in examples}) == len(examples) == sum(taken(of).values())
    for example in examples:
        portion = origin(of.portions, example)
        assert example.text == f"{portion.file} {example.number - portion.before}"
    return examples


def test_a_share_is_that_of_all_rows_and_the_rest_is_taken_whole() -> None:
    assert taken(split({"a": 800, "b": 3000}, {"b": 0.2})) == {"a": 800, "b": 200}
    assert taken(split({"a": 400, "b": 100, "c": 3000}, {"c": 0.5})) == {"a": 400, "b": 100, "c": 500}
    assert taken(split({"a": 40, "b": 60})) == {"a": 40, "b": 60}


def test_what_has_too_few_rows_for_its_share_is_taken_whole_once_and_the_others_keep_theirs() -> None:
    found = split({"a": 800, "b": 100, "c": 3000}, {"b": 0.2, "c": 0.2})
    assert taken(found) == {"a": 800, "b": 100, "c": 225}
    note, warning = found.about_sources(DatasetSpec(path="a"))
    assert note.level == "note"
    assert warning.text == "b has 100 rows, and a share of 0.2 is 267: all are taken"


def test_held_out_rows_are_of_each_data_set_and_the_first_of_them_too() -> None:
    found = split({"a": 1600, "b": 4000}, {"b": 0.2})
    of = [origin(found.portions, example).file for example in found.held_out]
    assert len(of) == 200 and 25 <= of.count("b") <= 55, "a fifth, as chance has it"
    assert 1 <= of[:20].count("b") <= 6, "whoever looks at the first rows sees both"
    assert not {e.text for e in found.train} & {e.text for e in found.held_out}
    (note,) = found.about_sources(DatasetSpec(path="a"))
    held = of.count("b")
    assert note.text == (
        f"1600 rows of a ({200 - held} held out), 400 of the 4000 rows of b ({held} held out); "
        "row 1 of b is row 10001 here"
    )


def test_the_rows_of_one_data_set_keep_their_numbers_and_their_order() -> None:
    found = split({"a": 50})
    assert sorted(e.number for e in (*found.train, *found.held_out)) == list(range(1, 51))
    assert found.about_sources(DatasetSpec(path="a")) == []
    numbers = [e.number for e in found.held_out]
    assert numbers == sorted(numbers)


def test_a_row_in_two_data_sets_is_on_one_side_only() -> None:
    dataset = DatasetSpec.model_validate({"path": "a", "more": [{"path": "b"}], "test_size": 0.4})
    found = split_data(dataset, raw("x", 40), None, [raw("x", 40)])
    assert not {e.text for e in found.train} & {e.text for e in found.held_out}


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=4),
    st.lists(st.floats(0.01, 0.3), min_size=3, max_size=3),
    st.sets(st.integers(1, 3)),
)
def test_numbers_are_apart_and_lead_back_to_the_row(counts: list[int], shares: list[float], drawn: set[int]) -> None:
    names = "abcd"[: len(counts)]
    found = split(dict(zip(names, counts, strict=True)), {names[n]: shares[n - 1] for n in drawn if n < len(names)})
    examples = apart(found)
    with pytest.raises(DataError) as caught, own_rows(found.portions):
        raise DataError("a", "is bad", row=examples[-1].number)
    assert f"{caught.value.file} {caught.value.row}" == examples[-1].text
    with pytest.raises(DataError) as caught, own_rows(()):  # of a file of held-out rows
        raise DataError("held", "is bad", row=3)
    assert (caught.value.file, caught.value.row) == ("held", 3)


@pytest.mark.parametrize("parts", ["train", "train[:1]+train[1:]", "train[1:]+train[:1]"])
def test_numbers_are_apart_whatever_part_of_a_file_is_read_last(tmp_path: Path, parts: str) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("\n".join(json.dumps({"text": f"{path.stem} {n}"}) for n in range(1, 13)), "utf-8")
    dataset = DatasetSpec.model_validate({"path": "a", "split": parts, "more": [{"path": "b", "split": parts}]})
    rows, more = (open_rows(path, parts) for path in paths)
    found = split_data(dataset, rows, None, [more])
    assert [e.text for e in apart(found)] == [f"{name} {n}" for name in "ab" for n in range(1, 13)]
    assert found.portions[1].before == 100, "caches and reports know a row by its number: no order of parts changes it"


def test_the_same_rows_are_drawn_in_any_order_of_the_file() -> None:
    dataset = DatasetSpec.model_validate({"path": "a", "more": [{"path": "b", "share": 0.3}]})
    one, other = (split_data(dataset, raw("a", 70), None, [rows]) for rows in (raw("b", 200), raw("b", 200)[::-1]))
    assert {e.text for e in one.train} == {e.text for e in other.train}


def test_each_data_set_is_read_by_its_own_format_and_columns() -> None:
    dataset = DatasetSpec.model_validate(
        {"path": "a", "more": [{"path": "b", "columns": {"instruction": "q", "output": "a"}}], "test_size": 0.5}
    )
    talk = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}
    found = split_data(
        dataset, [RawRow(number=1, value=talk)], None, [[RawRow(number=1, value={"q": "Where?", "a": "Here."})]]
    )
    said = {tuple(turn.content for turn in e.turns) for e in (*found.train, *found.held_out)}
    assert said == {("Who?", "I."), ("Where?", "Here.")}
    with pytest.raises(DataError, match="b: has rows of the format text, which a job can't learn next to messages"):
        split_data(DatasetSpec.model_validate({"path": "a", "more": [{"path": "b"}]}),
                   [RawRow(number=1, value=talk)], None, [raw("b", 2)])  # fmt: skip


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    file = tmp_path / "ten.jsonl"
    file.write_text("\n".join([json.dumps({"text": f"row {n}"}) for n in range(1, 11)]), "utf-8")
    return file


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(1, 11)),
        ("train[:30%]", range(1, 4)),
        ("train[-2:]", (9, 10)),
        ("train[8:]+train[:1]", (9, 10, 1)),
    ],
)
def test_a_slice_of_a_file_has_the_rows_with_their_numbers_each_time(
    ten: Path, split: str, numbers: range | tuple[int, ...]
) -> None:
    rows = open_rows(ten, split)
    assert [row.number for row in rows] == list(numbers) == [row.number for row in rows]


@pytest.mark.parametrize(
    ("split", "what"),
    [
        ("validation[:5%]", "is a file, whose only split is train, and validation[:5%] names validation"),
        ("train[20:]", "has 10 rows, and train[20:] names none of them"),
        ("train[:6]+train[5:]", "is read twice in part: the parts of train[:6]+train[5:] overlap"),
    ],
)
def test_a_slice_that_a_file_does_not_have_is_refused_with_what_to_do(ten: Path, split: str, what: str) -> None:
    with pytest.raises(DataError) as caught:
        list(open_rows(ten, split))
    assert caught.value.what == what and caught.value.hint
