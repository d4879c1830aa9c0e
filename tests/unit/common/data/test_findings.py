"""A finding's sentence is right for one row and for several, and rows that run together are seen."""

from __future__ import annotations

from typing import Any

import pytest

from loractl.common.data.examples import Example
from loractl.common.data.findings import about_rows, about_warmup, number_rows
from loractl.common.data.inspection import check_examples
from loractl.common.data.rows import RawRow
from loractl.common.data.split import split_data
from loractl.common.job.sections import DatasetSpec, TrainingSpec


@pytest.mark.parametrize(
    ("rows", "text"), [(1, "1 row to train on is a duplicate"), (2, "2 rows to train on are duplicates")]
)
def test_a_number_and_its_verb_agree(rows: int, text: str) -> None:
    assert number_rows("{n} to train on {is a duplicate|are duplicates}", rows) == text
    assert about_rows("note", "some", "{n} {has|have} it", range(rows))[0].text == text.split(" to")[0] + (
        " has it" if rows == 1 else " have it"
    )


def test_one_row_that_stands_there_already_is_said_in_the_singular() -> None:
    def raw(*names: str) -> list[RawRow]:
        return [RawRow(number=n, value={"text": name}) for n, name in enumerate(names, start=1)]

    dataset = DatasetSpec(path="d.jsonl", eval_path="h.jsonl")
    split = split_data(dataset, raw(*"abcd", "a"), raw("a", "new", "New"))
    told = {f.kind: f.text for f in check_examples(split.train, split.held_out, split)}
    assert told["duplicate rows"] == "1 row to train on is a duplicate"
    assert told["repeated held-out rows"].startswith("1 row held out is a duplicate")
    assert told["overlap"] == "1 row of the held-out file left out, because it is trained on"


@pytest.mark.parametrize(
    ("prompt", "completion", "glued"),
    [
        ("foot", "ball", True),
        ("How many?", "Three.", True),
        ("Answer:", "yes", True),
        ("How many?", " Three.", False),
        ("How many?\n", "Three.", False),
        ("How many?", "- three", False),
        ("多少", "三个", False),
        ("x = f(", "3)", False),
    ],
)
def test_a_prompt_and_a_completion_that_run_together_are_seen(prompt: str, completion: str, glued: bool) -> None:
    rows = [Example(number=1, prompt=prompt, text=prompt + completion)]
    assert ("words run together" in {f.kind for f in check_examples(rows, [])}) == glued


@pytest.mark.parametrize(
    ("training", "rows", "warned"),
    [
        ({"warmup_steps": 100, "max_steps": 40}, None, True),
        ({"warmup_steps": 40, "max_steps": 40}, None, True),
        ({"warmup_steps": 39, "max_steps": 40}, None, False),
        ({"warmup_steps": 7, "num_train_epochs": 3}, 32, True),  # 3 epochs of 2 steps
        ({"warmup_steps": 7, "num_train_epochs": 4}, 32, False),
        ({"warmup_steps": 7, "num_train_epochs": 3}, None, False),
        ({"warmup_steps": 0.9, "max_steps": 1}, None, False),
        ({"warmup_steps": 1, "num_train_epochs": 1}, 16, True),
        ({"warmup_steps": 0, "max_steps": 1}, None, False),
        ({"warmup_steps": 100, "max_steps": 40, "lr_scheduler_type": "constant"}, None, False),
    ],
)
def test_a_warm_up_that_never_ends_is_told(training: dict[str, Any], rows: int | None, warned: bool) -> None:
    told = about_warmup(TrainingSpec(**training), rows)
    assert [finding.kind for finding in told] == ["long warm-up"] * warned
    assert [finding.level for finding in told] == ["error" if rows == 16 else "warning"] * warned
    if warned and training.get("max_steps") == 40:
        assert told[0].text.startswith(f"training.warmup_steps is {training['warmup_steps']} and the run has 40 steps:")
