"""Which answers are right by a measure that a job file defines, and that no expression holds a trainer up."""

from __future__ import annotations

import ast
import resource
import time
from pathlib import Path

import pytest

import loractl.worker.evaluation as room
from loractl.common import answer_score
from loractl.common.answer_score import AnswerScore
from loractl.common.job.sections import CHEAP_NAMES, MEASURED

GSM8K = r"#### ?(-?[\d.,]+)"


def right(answer: str, expected: str, compare: answer_score.Compare, extract: str | None = None) -> bool | None:
    return AnswerScore(extract=extract, compare=compare).right([answer], [expected], time.thread_time)[0]


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("48 / 2 = 24. 48 + 24 = 72.\n#### 72", "#### 72", True),
        ("#### 71\nNo, wait.\n####72.", "#### 72", True),  # the last match counts
        ("#### 72\nNo, wait.\n#### 71", "#### 72", False),
        ("#### 1,072", "#### 1072", True),
        ("#### 72.00", "#### 72", True),
        ("#### -72", "#### 72", False),
        ("The answer is 72", "#### 72", False),  # no match
        ("#### .,", "#### 72", False),  # no number
        ("#### 72", "72", None),  # nothing to compare with
        ("", "#### 72", False),
    ],
)
def test_the_last_number_after_the_marks_counts(answer: str, expected: str, found: bool | None) -> None:
    assert right(answer, expected, "number", GSM8K) is found


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        (" 1 234,5. ", "12345", True),
        ("+7", "7.0", True),
        ("1e3", "1000", True),
        ("1e999", "2e999", False),
        ("seven", "7", False),
        ("7 or 8", "7", False),
        ("١٢", "12", False),
        ("9" * 401, "9", False),
        ("7", "seven", None),
    ],
)
def test_numbers_are_equal_by_their_value(answer: str, expected: str, found: bool | None) -> None:
    assert right(answer, expected, "number") is found


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ('{"b": 1.0, "a": [1e2, true]}', '{"a":[100,true],"b":1}', True),
        ("1", "true", False),
        ("-0.0", "0", True),
        ('{"a": 1, "a": 1}', '{"a": 1}', False),
        ('Here it is: {"a": 1}', '{"a": 1}', False),
        ("[1, 2]", "[2, 1]", False),
        ("NaN", "NaN", None),
        ("[" * 100_000, "[]", False),
        ("9" * 5000, "9", False),
        ('"\\u00e4"', '"ä"', True),
        ("null", "null", True),
    ],
)
def test_json_is_equal_by_its_value(answer: str, expected: str, found: bool | None) -> None:
    assert right(answer, expected, "json") is found


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("The capital is Paris.", "paris", True),
        ("13", "3", False),
        ("It costs $5 now", "$5", True),
        ("two\n words", "Two words", True),
        ("anything", " ", None),
    ],
)
def test_an_answer_contains_whole_words(answer: str, expected: str, found: bool | None) -> None:
    assert right(answer, expected, "contains") is found


def test_exact_texts_are_equal_apart_from_spaces() -> None:
    assert right(" a  b\n", "a b", "exact") is True
    assert right("A b", "a b", "exact") is False
    assert right("x: a\ud800", "x: a?", "exact", "x: (.*)") is True, "half a character is no text"


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(", "does not compile: missing )"),
        ("(?=a)(b)", "does not compile: invalid perl operator"),
        ("abc", "with no group: write (...) around the part to compare"),
        ("(a)(b)", "with 2 groups: write (...) around the part to compare, and (?:...) around the others"),
        ("((a{0,100}){0,100}){0,100}", "does not compile: invalid repetition size"),
        (r"(\pL{1000})", "does not compile: pattern too large"),
        (f"({'a' * 1024})", "of more than 1024 letters"),
        ("(a\ud800)", "a letter that is not Unicode"),
    ],
)
def test_an_expression_that_is_none_is_a_sentence(expression: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^is an expression ") as refused:
        AnswerScore(extract=expression, compare="exact").check()
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "expression", ["(?:a|a)*b(c)", "((?:(?:a?){100}){10}b)", "((?:a|b|ab){1,500}c)", "(.*a.*a.*b)"]
)
def test_no_expression_holds_a_trainer_up_or_fills_its_memory(expression: str) -> None:
    began, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert AnswerScore(extract=expression, compare="exact").right(["a" * 5000], ["c"], time.thread_time) == [None]
    assert time.thread_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_an_expression_that_matches_at_every_letter_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_score, "MOST_SECONDS", 0.05)
    with pytest.raises(ValueError, match=r"takes more than 0\.05 s to read the answers"):
        AnswerScore(extract="(a*b|a)", compare="exact").right(["a"], ["a" * 100_000], time.thread_time)


def test_no_job_file_can_take_the_name_of_a_measure_that_reports_have() -> None:
    """Names are the first argument, or `name`, of what makes a measure in the evaluation's modules."""
    found = set()
    for file in Path(str(room.__file__)).parent.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                continue
            if call.func.id in ("percent", "compare_shares", "Measure"):
                first = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
                found |= {one.value for one in first if isinstance(one, ast.Constant)}
    assert len(found) > 12
    assert {str(name) for name in found if not str(name).startswith(CHEAP_NAMES)} <= MEASURED
