"""Whether a row's question alone may fill it: submit counts tokens, which takes seconds, only where that may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from loractl.common.job.spec import JobSpec
from loractl.scheduler.submit.lengths import MARKS, check_overflow, may_fill_a_row

LENGTH = 200
"""dataset.max_length."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose tokens are words."""
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "base").mkdir()
    words.save(str(tmp_path / "base" / "tokenizer.json"))
    return tmp_path / "base"


def job(base: Path, *rows: dict[str, Any], **dataset: Any) -> JobSpec:
    file = base.parent / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "a", "completion": "b"}, *rows)))
    named = {"path": str(file), "max_length": LENGTH, **dataset}
    return JobSpec.model_validate({"name": "job", "base_model": str(base), "dataset": named})


def asked(question: str) -> dict[str, str]:
    return {"prompt": question, "completion": "an answer"}


def test_a_question_of_many_tokens_may(base: Path) -> None:
    assert may_fill_a_row(job(base, asked("word " * (LENGTH - MARKS))))
    assert not may_fill_a_row(job(base, asked("word " * (LENGTH - MARKS - 1)))), "long in bytes, not in tokens"
    assert not may_fill_a_row(job(base, {"prompt": "a", "completion": "word " * LENGTH})), "the answer is cut, not lost"


def test_without_a_tokenizer_bytes_are_counted_and_what_is_not_checked_is_said(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    assert may_fill_a_row(job(base, asked("w" * LENGTH)))
    assert check_overflow(job(base, asked("w" * LENGTH))) == "there is no tokenizer to count them with"
    assert check_overflow(job(base, asked("w" * LENGTH), on_overflow="drop")) is None
    assert not may_fill_a_row(job(base, asked("w" * (LENGTH - 1))))
    assert check_overflow(job(base)) is None


def test_only_what_stands_before_the_first_answer_counts_held_out_rows_too(base: Path) -> None:
    long, short = "word " * LENGTH, "word"
    turns = [("system", short), ("user", short), ("assistant", short), ("user", long), ("assistant", short)]
    talk = [{"role": role, "content": content} for role, content in turns]
    rows = base.parent / "talks.jsonl"
    rows.write_text(json.dumps({"messages": talk}) + "\n")
    assert not may_fill_a_row(job(base, path=str(rows)))
    talk[0]["content"] = long
    rows.write_text(json.dumps({"messages": talk}) + "\n")
    assert may_fill_a_row(job(base, path=str(rows)))
    held_out = base.parent / "held-out.jsonl"
    held_out.write_text(json.dumps(asked(long)) + "\n")
    assert may_fill_a_row(job(base, eval_path=str(held_out), test_size=None))


@pytest.mark.parametrize("column", ["prompt", "instruction"])
def test_of_a_pair_its_prompt_counts(base: Path, column: str) -> None:
    long, rows = "word " * LENGTH, base.parent / "pairs.jsonl"

    def preferred(prompt: str, answer: str) -> JobSpec:
        rows.write_text(json.dumps({column: prompt, "chosen": answer, "rejected": " no"}) + "\n")
        tree = {"name": "job", "base_model": str(base), "task_type": "preference"}
        return JobSpec.model_validate({**tree, "dataset": {"path": str(rows), "max_length": LENGTH}})

    assert may_fill_a_row(preferred(long, " word")) and not may_fill_a_row(preferred("word", f" {long}"))


def test_of_plain_text_all_is_learned(base: Path) -> None:
    rows = base.parent / "texts.jsonl"
    rows.write_text(json.dumps({"text": "word " * LENGTH}) + "\n")
    assert not may_fill_a_row(job(base, path=str(rows)))
