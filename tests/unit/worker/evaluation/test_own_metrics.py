"""Measures that a job file defines, on answers like GSM8K's, against a count by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from loractl.common.job.sections import EvaluationSpec
from loractl.worker.evaluation import answers as module
from loractl.worker.evaluation.answers import Answer, as_json, own_scores
from loractl.worker.evaluation.comparison import BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED

GSM8K = {"name": "gsm8k", "extract": r"#### ?(-?[\d.,]+)", "compare": "number"}


def asked(*metrics: dict[str, Any], decide_by: str | None = None) -> EvaluationSpec:
    return EvaluationSpec.model_validate({"metrics": ["loss", *metrics], "decide_by": decide_by})


def answer(row: int, expected: str, base: str, tuned: str) -> Answer:
    return Answer(
        row=row, prompt="?", expected=expected, base=base, tuned=tuned, base_ended=True, tuned_ended=True
    )  # fmt: skip


def problems(count: int) -> tuple[list[Answer], list[bool], list[bool]]:
    """Answers that reason in other words than the expected ones, and whether their numbers are right."""
    chance, answers, base, tuned = random.Random(5), [], [], []
    for row in range(count):
        total = chance.randrange(2, 5000)
        base.append(chance.random() < 0.2)
        tuned.append(chance.random() < 0.7)
        written = [
            f"First I count {row}.\nSo it is {total + (not right)}.\n#### {total + (not right):,}{'.' * (row % 2)}"
            for right in (base[-1], tuned[-1])
        ]
        answers.append(answer(row, f"He has {total} in all.\n#### {total}", *written))
    return answers, base, tuned


def test_the_share_of_right_numbers_and_its_interval_are_those_of_a_count_by_hand() -> None:
    answers, base, tuned = problems(40)
    scores = own_scores(answers, asked(GSM8K, {"name": "whole", "compare": "exact"}, decide_by="gsm8k"))
    found = [one for score in scores for one in score.metrics]
    assert [(one.name, one.own, one.decides, one.cases) for one in found] == [
        ("gsm8k", True, True, 40),
        ("whole", True, False, 40),
    ]
    assert (found[0].base, found[0].tuned) == pytest.approx((100 * sum(base) / 40, 100 * sum(tuned) / 40))
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(40, np.full(40, 1 / 40), size=BOOTSTRAP_SAMPLES)
    changes = drawn @ (np.array(tuned, float) - np.array(base, float)) * 100 / 40
    assert (found[0].low, found[0].high) == pytest.approx(tuple(np.percentile(changes, [2.5, 97.5])))
    assert found[0].reading == "better" and (found[1].base, found[1].tuned) == (0, 0), "the reasoning always differs"
    assert as_json(scores, 3) == {
        "scores": {"gsm8k": [base[3], tuned[3]], "whole": [False, False]},
        "decided": [base[3], tuned[3]],
    }


def test_answers_with_nothing_to_compare_are_no_cases_and_are_said() -> None:
    answers, *_ = problems(10)
    mute = [answer(20 + n, "He has some.", "#### 1", "#### 1") for n in range(3)]
    (score,) = own_scores([*answers, *mute], asked(GSM8K))
    assert (score.metrics[0].cases, score.metrics[0].unmeasured) == (10, 3)
    assert score.doubt == "gsm8k leaves out 3 of 13 answers, with nothing to compare with."
    assert not own_scores(answers, asked(GSM8K))[0].doubt
    (none,) = own_scores(mute, asked(GSM8K))
    assert none.metrics[0].cases == 0 and math.isnan(none.metrics[0].base)
    assert none.doubt == "gsm8k was not measured: it finds nothing to compare in any of the 3 expected answers."
    (nobody,) = own_scores([], asked(GSM8K))
    assert "no held-out row asks for" in nobody.doubt
    assert as_json(own_scores(mute, asked(GSM8K, decide_by="gsm8k")), 0)["decided"] == [None, None]
    assert as_json([], 0) == {}


def test_an_expression_that_takes_too_long_measures_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> Any:
        raise ValueError("is an expression that takes more than 60 s to read the answers")

    monkeypatch.setattr(module, "right", slow)
    (score,) = own_scores(problems(9)[0], asked(GSM8K))
    assert score.metrics[0].cases == 0
    said = "gsm8k was not measured: it is an expression that takes more than 60 s to read the answers."
    assert score.doubt == said


def test_answers_to_rows_that_resemble_rows_to_train_on_are_measured_apart() -> None:
    answers, base, tuned = problems(40)
    (score,) = own_scores(answers, asked(GSM8K, decide_by="gsm8k"), frozenset(range(25)))
    whole, new = score.metrics
    assert (whole.cases, whole.decides, new.cases, new.own, new.decides) == (40, True, 15, False, False)
    assert new.name == "new_rows_gsm8k"
    assert (new.base, new.tuned) == pytest.approx((100 * sum(base[25:]) / 15, 100 * sum(tuned[25:]) / 15))
    (leaked,) = own_scores(answers, asked(GSM8K), frozenset(range(40)))
    assert leaked.metrics[1].cases == 0, "the verdict sees that none is left"


def test_an_answer_that_lists_every_label_contains_none() -> None:
    names = ("billing", "billing dispute", "outage", "no")
    every, contains = " or ".join(names), {"name": "label", "compare": "contains"}
    says = [f"I would say: {names[row % 4]}, and nothing else." for row in range(40)]
    rows = [answer(row, names[row % 4], every, says[row]) for row in range(40)]
    (score,) = own_scores(rows, asked(contains))
    assert score.base == [False] * 40 and score.tuned == [True] * 40
    (other,) = own_scores(
        [answer(row, names[row % 4], "billing and outage", "no") for row in range(40)], asked(contains)
    )
    assert other.base == [False] * 40 and other.tuned == [row % 4 == 3 for row in range(40)]
    cities = [answer(row, f"city {row}", f"city {row}, near city {row + 1}", "?") for row in range(40)]
    (free,) = own_scores(cities, asked(contains))
    assert free.base == [True] * 40, "answers that are no labels may name others"
