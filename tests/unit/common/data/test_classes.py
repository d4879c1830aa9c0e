"""Rows for a classifier: what is a label, which ones are taught, and what can't be learned or measured."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.data.examples import Example
from loractl.common.data.formats import LONGEST, detect_format, labels_of, parse_examples
from loractl.common.data.inspection import FEW_OF_A_LABEL, check_examples
from loractl.common.data.rows import RawRow
from loractl.common.data.split import Split, split_data, split_held_out
from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec

PAIRS = [("a fine film", "good"), ("a dull film", "bad"), ("a fine book", "good"), ("a dull book", "bad")]


def raw(*pairs: tuple[Any, Any]) -> list[RawRow]:
    return [RawRow(number=n, value={"text": text, "label": label}) for n, (text, label) in enumerate(pairs, start=1)]


def learn(*pairs: tuple[Any, Any]) -> list[Example]:
    return parse_examples(raw(*pairs), DataFormat.CLASSIFICATION, "d.jsonl")[0]


def refused(*pairs: tuple[Any, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        learn(*pairs)
    return caught.value


def split(rows: list[RawRow], held: list[RawRow] | None = None, **keys: Any) -> Split:
    dataset = {"path": "d.jsonl", "format": "classification", **keys}
    return split_data(DatasetSpec.model_validate(dataset | ({"eval_path": "h.jsonl"} if held else {})), rows, held)


def kinds(train: list[Example], held_out: list[Example], level: str) -> dict[str, str]:
    return {f.kind: f.sentence for f in check_examples(train, held_out) if f.level == level}


def test_a_label_is_text_or_a_whole_number_by_the_same_name() -> None:
    assert [e.label for e in learn(("x", "good"), ("x", " very\n good "), ("x", 3), ("x", "3"), ("x", -1))] == [
        "good", "very good", "3", "3", "-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "what"),
    [
        (True, "label is true or false"),
        (1.5, "label is 1.5"),
        (None, "label is missing or null"),
        (["good"], "label is a list"),
        ("  ", "label is empty"),
        ("x" * (LONGEST + 1), "label is a text of 257 characters"),
        ("\ud800", "label is not Unicode text"),
    ],
)
def test_what_is_no_label_is_refused_with_its_row(label: Any, what: str) -> None:
    error = refused(("x", "good"), ("y", label))
    assert (error.row, error.kind) == (2, "not a label") and error.what.startswith(what + "; it must be")


def test_an_empty_text_and_a_missing_label_are_refused() -> None:
    assert refused(("x", "good"), (" ", "bad")).sentence == "d.jsonl: row 2: text is empty"
    with pytest.raises(DataError, match="row 1: has no label") as caught:
        parse_examples([RawRow(number=1, value={"text": "x"})], DataFormat.CLASSIFICATION, "d.jsonl")
    assert caught.value.kind == "missing column"


def test_labels_are_sorted_by_size_where_all_are_numbers_and_else_as_text() -> None:
    assert labels_of(learn(("a", 10), ("b", 9), ("c", "-2"), ("d", 9))) == ("-2", "9", "10")
    assert labels_of(learn(("a", "10"), ("b", "9"), ("c", "x"))) == ("10", "9", "x")
    assert labels_of([Example(number=1, text="x")]) == ()


@given(st.permutations(PAIRS))
def test_the_order_of_rows_changes_no_label_s_place(pairs: list[tuple[str, str]]) -> None:
    assert labels_of(learn(*pairs)) == ("bad", "good")


def test_a_text_with_a_label_beside_it_stays_text_unless_the_job_says_otherwise() -> None:
    rows = raw(*PAIRS)
    assert detect_format(rows, "d")[0] is DataFormat.TEXT
    assert detect_format(rows, "d", DataFormat.CLASSIFICATION)[0] is DataFormat.CLASSIFICATION
    as_text, _ = parse_examples(rows, DataFormat.TEXT, "d")
    assert as_text[0].content_hash() != learn(*PAIRS)[0].content_hash()


def test_rows_without_the_two_columns_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="row 1: a classifier learns from rows with text and label") as caught:
        split([RawRow(number=1, value={"sentence": "x", "label": 1})])
    assert caught.value.hint is not None and "dataset.columns, like {text: review, label: mood}" in caught.value.hint
    renamed = [RawRow(number=n, value={"sentence": t, "mood": m}) for n, (t, m) in enumerate(PAIRS)]
    found = split(renamed, columns={"text": "sentence", "label": "mood"}, test_size=0.5)
    assert labels_of(found.train) == ("bad", "good")


def test_content_tells_labels_apart_and_is_what_it_was_for_other_rows() -> None:
    good, bad = learn(("x", "good"), ("x", "bad"))
    assert good.content_hash() != bad.content_hash()
    import hashlib

    before = hashlib.sha256(json.dumps(([], "", "x")).encode()).hexdigest()  # as splits of earlier versions had it
    assert Example(number=1, text="x").content_hash() == before


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=4, max_size=60), st.floats(0.01, 0.99))
def test_no_label_is_held_out_whole(drawn: list[tuple[int, int]], test_size: float) -> None:
    rows = learn(*((f"text {n} of {label}", label) for n, label in drawn))
    distinct = Counter(label for _, label in set(drawn))
    if max(distinct.values()) < 2:
        with pytest.raises(DataError, match=r"no label with two different rows|at least two different rows"):
            split_held_out(rows, test_size, "d")
        return
    train, held_out = split_held_out(rows, test_size, "d")
    assert held_out and {e.label for e in train} == {e.label for e in rows}
    assert not {e.content_hash() for e in train} & {e.content_hash() for e in held_out}


def test_each_label_keeps_a_row_to_train_on_and_a_final_row_has_a_label_that_is_taught() -> None:
    rows = raw(*((f"text {n}", label) for n, label in enumerate(["good"] * 12 + ["bad"] * 2)))
    dataset = {"path": "d", "format": "classification", "test_size": 0.2, "final_size": 0.7}
    found = split_data(DatasetSpec.model_validate(dataset), rows, None)
    assert found.final and labels_of(found.train) == ("bad", "good")
    last = raw(("new", "good"), ("odd", "none"))
    asked = {"path": "d", "format": "classification", "final_path": "f"}
    with pytest.raises(DataError, match="none"):
        split_data(DatasetSpec.model_validate(asked), rows, None, final_rows=last)
    found = split_data(DatasetSpec.model_validate(asked | {"on_bad_row": "drop"}), rows, None, final_rows=last)
    assert [e.text for e in found.final or ()] == ["new"]


def test_one_label_alone_is_nothing_to_learn() -> None:
    rows = raw(("x", "good"), ("y", "good"), ("z", "good"))
    for held in (None, raw(("v", "good"))):
        with pytest.raises(DataError, match="every row to train on has the label 'good': there is nothing to learn"):
            split(rows, held)


def test_a_held_out_label_that_is_not_taught_is_refused_or_left_out_with_its_row() -> None:
    held = raw(("new", "good"), ("newer", "mixed"))
    with pytest.raises(DataError, match=r"h.jsonl: row 2: has the label 'mixed', .* \(bad, good\)") as caught:
        split(raw(*PAIRS), held)
    assert caught.value.kind == "unknown label" and "dataset.on_bad_row: drop" in (caught.value.hint or "")
    left = split(raw(*PAIRS), held, on_bad_row=BadRow.DROP)
    assert [e.number for e in left.held_out] == [1] and "row 2" in left.dropped[0]
    with pytest.raises(DataError):
        split(raw(*PAIRS), held[1:], on_bad_row=BadRow.DROP)


def many(label: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(f"a {label}ish text {n}", label) for n in range(start, start + count)]


def test_the_labels_are_counted_and_rare_lopsided_and_unmeasured_ones_told() -> None:
    train = learn(*many("good", 90), *many("bad", 9), *many("mixed", 1))
    held_out = learn(*many("good", 9, 90), *many("bad", 1, 90))
    notes, warnings = kinds(train, held_out, "note"), kinds(train, held_out, "warning")
    assert notes["labels"] == "3 labels: “good” 90 %, “bad” 9 %, “mixed” 1 %"
    assert "1 of 3 labels have no row held out" in notes["labels not held out"]
    assert warnings["rare labels"] == f"1 row of labels with fewer than {FEW_OF_A_LABEL} of them: “mixed” 1 (row 100)"
    assert "lopsided labels" in warnings
    even = learn(*many("good", 20), *many("bad", 20))
    assert kinds(even, held_out, "warning") == {}


def test_one_text_with_two_labels_and_a_text_on_both_sides_are_told() -> None:
    pairs = [*many("good", 20), *many("bad", 20)]
    train, held_out = (
        learn(*pairs, ("a goodish text 0", "bad")),
        learn(*many("good", 9, 50), ("a badish text 1", "good")),
    )
    warnings = kinds(train, held_out, "warning")
    assert warnings["contradicting answers"].endswith("(row 1)")
    assert warnings["overlapping prompts"].endswith("(row 10)")
    assert "duplicate rows" in kinds(learn(*pairs, ("a goodish text 0", "good")), held_out, "warning")
