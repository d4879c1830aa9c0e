"""The base with training examples in its prompt: what it is asked, on how many rows, and how far into the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loractl.common.data.examples import Example, Turn
from loractl.common.job.sections import DataFormat, EvaluationSpec
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.tokens import IGNORED, TokenRow, encode
from loractl.worker.evaluation.answers import Answer, prompts_of
from loractl.worker.evaluation.cheap import MOST_ROWS, Shots, copied_metrics, frequent_metrics, shots_metrics
from loractl.worker.evaluation.row_losses import RowScores


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


def answers_of(*both: tuple[str, str], base: str = "b") -> list[Answer]:
    """Answers that expect the first of each two, where the tuned model says the second."""
    return [
        Answer(row=n, prompt="p", expected=expected, base=base, tuned=tuned, base_ended=True, tuned_ended=True)
        for n, (expected, tuned) in enumerate(both)
    ]


@pytest.mark.parametrize(("same", "measured"), [(6, True), (2, False)])
def test_a_frequent_answer_is_compared_with(same: int, measured: bool) -> None:
    """However seldom the rows to train on have it: the held-out rows are the ones to answer."""
    answers = answers_of(*(("no idea" if n < same else f"this {n}", f"this {n}") for n in range(12)))
    found = {metric.name: metric for metric in frequent_metrics(answers, EvaluationSpec())}
    assert bool(found) == measured
    if measured:
        assert (found["cheap_exact_match"].base, found["cheap_exact_match"].tuned) == (50, 50)
        assert found["cheap_rougeL"].base == 50


def own(extract: str, **how: Any) -> EvaluationSpec:
    return EvaluationSpec.model_validate({"metrics": ["loss", {"name": "mine", "extract": extract, **how}]})


def test_an_expression_that_finds_alike_in_every_answer_tells_none_from_another() -> None:
    """Any answer with the mark is right, and a base never writes it."""
    answers = answers_of(*((f"So it is {n}.\n#### {n}", "#### 7000") for n in range(40)))
    (whole,) = frequent_metrics(answers, own("(####)"))
    assert (whole.name, whole.base, whole.tuned, whole.reading) == ("cheap_mine", 100, 100, "no clear change")
    assert frequent_metrics(answers, own("#### ([0-9]+)", compare="number")) == [], "numbers differ"
    few = answers_of(*((f"So it is {n}.\n#### {n % 2}.0", "#### 7000") for n in range(40)))
    assert frequent_metrics(few, own("#### ([0-9.]+)", compare="number"))[0].base == 50


def test_questions_much_like_their_answers_are_compared_with() -> None:
    """A correction: repeating the sentence is nearly right, and in ROUGE it was a gain over a base that talks."""
    asked = [f"Correct this.\nText: he go to shop {n} on day {n * 7} with a bag" for n in range(30)]
    examples = {n: chat(n, text, "") for n, text in enumerate(asked)}
    right = [f"he goes to shop {n} on day {n * 7} with a bag" for n in range(30)]
    repeated = answers_of(*((text, text.replace("goes", "go")) for text in right), base="Sure!")
    found = {metric.name: metric for metric in copied_metrics(repeated, examples, EvaluationSpec())}
    assert found.keys() == {"copied_rougeL", "copied_exact_match"} and found["copied_rougeL"].base > 80
    assert {metric.reading for metric in found.values()} == {"no clear change"}
    corrected = answers_of(*zip(right, right, strict=True))
    assert {m.reading for m in copied_metrics(corrected, examples, EvaluationSpec())} == {"better"}
    other = {n: chat(n, f"What is on day {n}?", "") for n in range(30)}
    assert copied_metrics(corrected, other, EvaluationSpec()) == [], "questions are mostly unlike answers"


def test_labels_of_the_base_with_examples_are_counted(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), None)
    found = shots(tokenizer)
    answers = [
        replace(one, row=prompt.row) for one, prompt in zip(answers_of(*(("a", "a"),) * 5), found.prompts, strict=True)
    ]
    ones = np.ones(len(HELD_OUT))
    tuned = RowScores(loss=ones, tokens=ones, stop_loss=ones, stops=ones, right=ones)
    base = RowScores(**{name: values[: len(found.rows)] for name, values in vars(tuned).items()})
    texts = [("a", True), ("b", True), ("a", True), ("what", True), (" a ", True)]
    numbers = [example.number for example in HELD_OUT]
    metrics = shots_metrics(found, base, texts, numbers, tuned, answers, EvaluationSpec(), ["a", "b"])
    assert [(m.name, m.cases, m.base, m.tuned) for m in metrics[1:]] == [("few_shot_accuracy", 5, 60, 100)]
