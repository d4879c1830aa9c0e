"""The base with training examples in its prompt: what it is asked, on how many rows, and how far into the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loractl.common.data.examples import Example, Turn
from loractl.common.job.sections import DataFormat, EvaluationSpec
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.tokens import IGNORED, TokenRow, encode
from loractl.worker.evaluation.answers import Answer, prompts_of
from loractl.worker.evaluation.cheap import MOST_ROWS, Shots, frequent_metrics


def chat(number: int, *said: str, system: str = "") -> Example:
    first = (Turn(role="system", content=system),) if system else ()
    turns = (Turn(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(said))
    return Example(number=number, turns=(*first, *turns))


TRAIN = [chat(n, f"ask {n}", f"say {n}") for n in range(20)]
HELD_OUT = [chat(100 + n, f"what of {n}", f"this {n}", system="Be kind.") for n in range(30)]


def shots(tokenizer: Any, held_out: list[Example] = HELD_OUT, format: DataFormat = DataFormat.MESSAGES,
          train: list[Example] = TRAIN, **how: Any) -> Shots:  # fmt: skip
    rows = [row for example in held_out for row in encode(example, tokenizer, format)]
    sizes: dict[str, Any] = {"longest": 256, "most": 2048, "answer": 8, "batch": 8, **how}
    return Shots.of(train, held_out, rows, prompts_of(held_out[:5], tokenizer, 256), format, tokenizer, **sizes)


def learned(rows: list[TokenRow] | tuple[TokenRow, ...]) -> list[list[int]]:
    return [[label for label in row.labels if label != IGNORED] for row in rows]


def test_four_examples_are_earlier_turns_and_only_the_row_s_own_answer_is_measured(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), None)
    found = shots(tokenizer)
    alone = [row for example in HELD_OUT[:MOST_ROWS] for row in encode(example, tokenizer, DataFormat.MESSAGES)]
    assert (found.count, len(found.rows), len(found.prompts), found.batch) == (4, MOST_ROWS, 5, 8)
    assert learned(found.rows) == learned(alone)
    text = tokenizer.decode(found.rows[0].input_ids)
    assert text.count("ask ") == text.count("say ") == 4 and text.index("Be kind.") < text.index("ask ")
    assert text.rindex("say ") < text.index("what of 0") < text.index("this 0")
    prompt = tokenizer.decode(found.prompts[0].ids)
    assert prompt.count("say ") == 4 and "what of 0" in prompt and "this 0" not in prompt
    assert found.told == "The base was also asked with 4 training examples in its prompt, on 24 rows."
    assert shots(tokenizer) == found, "always the same examples"


def test_the_context_decides_how_many_examples_there_are_and_none_is_said(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), None)
    long = max(len(row.input_ids) for row in shots(tokenizer).rows)
    less = shots(tokenizer, most=long - 10)
    assert 0 < less.count < 4 and f"with {less.count} training example" in less.told
    assert max(len(row.input_ids) for row in less.rows) <= long - 10
    none = shots(tokenizer, most=20)
    assert (none.count, none.rows) == (0, ())
    assert none.told == "The base was not asked with training examples in its prompt: they do not fit."
    few = shots(tokenizer, HELD_OUT[:7])
    assert few.rows == () and few.told.endswith("in its prompt: fewer than 8 rows are held out.")
    one = shots(tokenizer, longest=long // 2, batch=1)
    assert all(len(row.input_ids) <= long // 2 for row in one.rows), "no more tokens than a batch without examples"
    small = shots(tokenizer, longest=long // 4)
    assert small.batch == 8 * (long // 4) // max(len(row.input_ids) for row in small.rows) < 8


def test_each_answer_of_a_conversation_and_a_completion_are_measured_behind_examples(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), None)
    talks = [chat(100 + n, f"what of {n}", f"this {n}", "and then", f"that {n}") for n in range(10)]
    alone = [row for example in talks for row in encode(example, tokenizer, DataFormat.MESSAGES)]
    assert learned(shots(tokenizer, talks).rows) == learned(alone)
    plain, others = (
        [Example(number=n, prompt=f"Q{n}:", text=f"Q{n}: yes {n}") for n in numbers]
        for numbers in (range(100, 110), range(10))
    )
    found = shots(tokenizer, plain, DataFormat.PROMPT_COMPLETION, others)
    assert found.count == 4
    assert tokenizer.decode(found.rows[0].input_ids).count("yes") == 5
    assert learned(found.rows) == learned([encode(one, tokenizer, DataFormat.PROMPT_COMPLETION)[0] for one in plain])


@pytest.mark.parametrize(("same", "measured"), [(4, True), (1, False)])
def test_a_frequent_answer_is_compared_with(same: int, measured: bool) -> None:
    train = [chat(n, f"ask {n}", "no idea" if n < same else f"say {n}") for n in range(30)]
    answers = [
        Answer(row=n, prompt="p", expected="no idea" if n < 6 else f"this {n}", base="b", tuned=f"this {n}",
               base_ended=True, tuned_ended=True)
        for n in range(12)
    ]  # fmt: skip
    found = {metric.name: metric for metric in frequent_metrics(answers, train, EvaluationSpec())}
    assert bool(found) == measured
    if measured:
        assert (found["cheap_exact_match"].base, found["cheap_exact_match"].tuned) == (50, 50)
        assert found["cheap_rougeL"].base == 50
