"""Answers to held-out prompts, base and tuned side by side, and how good they are: by general measures, and by those
that a job file defines."""

from __future__ import annotations

import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loractl.common import verdict
from loractl.common.data.examples import Example
from loractl.common.data.findings import shares_of
from loractl.common.job.sections import EvaluationSpec, Metric, OwnMetric
from loractl.common.verdict import NEW_ROWS
from loractl.worker.data.tokens import prompt_of

from .comparison import Array, Compared, Measure, compare_shares, percent

LENGTH = Measure(name=verdict.LENGTH, label="answer length", unit="tokens", higher_is_better=None)
EXPECTED_LENGTH = Measure(
    name=verdict.EXPECTED_LENGTH, label="answer length, against the expected", unit="tokens", higher_is_better=None
)
"""In place of the base: the expected answers, as far as an answer may go."""

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out row's question, as given to the model and as shown, and the expected answer."""

    row: int
    ids: list[int]
    shown: str
    expected: str
    rejected: str | None = None  # of a pair: the rejected answer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out row, answered by base and tuned."""

    row: int
    prompt: str
    expected: str
    base: str
    tuned: str
    base_ended: bool  # ended by itself rather than at max_new_tokens
    tuned_ended: bool
    rejected: str | None = None  # the prompt's

    @property
    def base_exact(self) -> bool:
        return exact(self.base, self.expected)

    @property
    def tuned_exact(self) -> bool:
        return exact(self.tuned, self.expected)


def prompts_of(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Prompt]:
    """The prompts of the examples that have one: plain text has none. Prompts of more than `max_length` tokens are left
    out, like those of a long conversation whose last answers were cut off: memory planning and training were for rows
    of that length."""
    prompts = [prompt for example in examples if (prompt := _prompt(example, tokenizer)) is not None]
    return [prompt for prompt in prompts if len(prompt.ids) <= max_length]


def _prompt(example: Example, tokenizer: Any) -> Prompt | None:
    """The question of the last answer; for a pair, that of the first, up to which both are the same."""
    if not example.rejected:
        found, other = prompt_of(example, tokenizer), None
    else:
        found, other = (prompt_of(_first_answer(one), tokenizer) for one in (example, example.other))
    if found is None:
        return None
    ids, shown, expected = found
    return Prompt(row=example.number, ids=ids, shown=shown, expected=expected, rejected=other[2] if other else None)


def _first_answer(example: Example) -> Example:
    return replace(example, turns=example.turns[: example.answers[0] + 1]) if example.turns else example


def side_by_side(
    prompts: Sequence[Prompt], base: Sequence[tuple[str, bool]], tuned: Sequence[tuple[str, bool]]
) -> list[Answer]:
    """The answers of base and tuned, prompt by prompt."""
    return [
        Answer(
            row=prompt.row,
            prompt=prompt.shown,
            expected=prompt.expected,
            base=of_base[0],
            base_ended=of_base[1],
            tuned=of_tuned[0],
            tuned_ended=of_tuned[1],
            rejected=prompt.rejected,
        )
        for prompt, of_base, of_tuned in zip(prompts, base, tuned, strict=True)
    ]


def answer_metrics(answers: Sequence[Answer], wanted: set[Metric]) -> list[Compared]:
    """Exact match and ROUGE if the job asks for them, and how many answers end by themselves."""
    if not answers:
        return []
    metrics = []
    if Metric.EXACT_MATCH in wanted:
        both = ([a.base_exact for a in answers], [a.tuned_exact for a in answers])
        metrics.append(compare_shares("exact_match", "exact match", *both))
    if Metric.ROUGE in wanted:
        expected, weight = [a.expected for a in answers], np.ones(len(answers))
        base, tuned = rouge([a.base for a in answers], expected), rouge([a.tuned for a in answers], expected)
        metrics += [percent(kind, label).compare(base[kind], tuned[kind], weight) for kind, label in ROUGE.items()]
    ended = ([a.base_ended for a in answers], [a.tuned_ended for a in answers])
    return [*metrics, compare_shares("ends_by_itself", "answers that end by themselves", *ended)]


def length_metrics(answers: Sequence[Answer], tokenizer: Any, longest: int | None = None) -> list[Compared]:
    """How many tokens the tuned model's answers have, against the base's, and against the expected answers where
    `longest` is given: the most tokens that were generated."""
    if not answers:
        return []

    def lengths(texts: Iterable[str]) -> Array:
        return np.array([len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts], float)

    base, tuned = lengths(a.base for a in answers), lengths(a.tuned for a in answers)
    each = np.ones(len(answers))
    metrics = [LENGTH.compare(base, tuned, each)]
    if longest is not None:
        expected = np.minimum(lengths(a.expected for a in answers), longest)
        metrics.append(EXPECTED_LENGTH.compare(expected, tuned, each))
    return metrics


def rouge(texts: Sequence[str], expected: Sequence[str]) -> dict[str, Array]:
    """F1 in percent for each kind of ROUGE (https://aclanthology.org/W04-1013), as Google's rouge-score computes it
    without stemming, over words of any script: rouge-score's own tokenizer finds no words in Russian.

    rouge-score itself loads nltk, scikit-learn and pandas, which takes 1.6 s of a processor."""
    pairs = [(words(text), words(right)) for text, right in zip(texts, expected, strict=True)]
    return {kind: np.array([100 * _f1(kind, *pair) for pair in pairs]) for kind in ROUGE}


def _f1(kind: str, said: list[str], expected: list[str]) -> float:
    from rapidfuzz.distance import LCSseq

    if kind == "rougeL":
        ours, theirs, common = len(said), len(expected), LCSseq.similarity(said, expected)
    else:
        first, second = (_pieces(some, int(kind.removeprefix("rouge"))) for some in (said, expected))
        ours, theirs, common = first.total(), second.total(), (first & second).total()
    if not common:
        return 0.0
    precision, recall = common / ours, common / theirs
    return 2 * precision * recall / (precision + recall)


def _pieces(said: list[str], size: int) -> Counter[tuple[str, ...]]:
    """How often each run of so many words comes."""
    return Counter(tuple(said[begin : begin + size]) for begin in range(len(said) - size + 1))


def words(text: str) -> list[str]:
    """The words of a text in any script, in lower case. Chinese and Japanese use no spaces: each character is a
    word."""
    apart = "".join(f" {c} " if _IDEOGRAPHIC.match(c) else c if _is_of_word(c) else " " for c in text.lower())
    return apart.split()


_IDEOGRAPHIC = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _is_of_word(character: str) -> bool:
    """Letters, digits, and the marks with which some scripts write vowels."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def exact(answer: str, expected: str) -> bool:
    """Exact match: equal after whitespace is folded."""
    return " ".join(answer.split()) == " ".join(expected.split())


@dataclass(frozen=True, kw_only=True)
class OwnScores:
    """One measure, answer by answer. None: the expected answer has nothing that it can compare with."""

    name: str
    decides: bool
    base: list[bool | None]
    tuned: list[bool | None]
    seen: list[bool]  # answers to rows that resemble a row to train on
    trouble: str = ""  # why nothing was measured

    @property
    def metrics(self) -> list[Compared]:
        """The share of right answers; where some rows resemble rows to train on, that of the others, too. Answers whose
        expected one can't be compared with are no cases."""
        whole = replace(self._compared(self.name, self.name, self.seen, new=False), own=True, decides=self.decides)
        if not any(self.seen):
            return [whole]
        return [
            whole,
            self._compared(
                f"{NEW_ROWS}{self.name}", f"{self.name}, rows like none that is trained on", self.seen, new=True
            ),
        ]

    def _compared(self, name: str, label: str, seen: Sequence[bool], *, new: bool) -> Compared:
        asked = [(b, t) for b, t, s in zip(self.base, self.tuned, seen, strict=True) if not (new and s)]
        pairs = [(b, t) for b, t in asked if b is not None and t is not None]
        if pairs:
            found = compare_shares(name, label, [b for b, _ in pairs], [t for _, t in pairs])
        else:
            found = percent(name, label).compared(0, *[math.nan] * 4)
        return replace(found, unmeasured=len(asked) - len(pairs))

    @property
    def doubt(self) -> str:
        """A sentence about what it could not measure, or nothing."""
        left, every = self.base.count(None), len(self.base)
        if self.trouble:
            return f"{self.name} was not measured: it {self.trouble}."
        if left == every:
            what = f"any of the {every} expected answers" if every else "answers, which no held-out row asks for"
            return f"{self.name} was not measured: it finds nothing to compare in {what}."
        return f"{self.name} leaves out {left} of {every} answers, with nothing to compare with." if left else ""


def own_scores(
    answers: Sequence[Answer], asked: EvaluationSpec, given_away: Collection[int] = frozenset()
) -> list[OwnScores]:
    """Every measure that the job file defines, on these answers. `given_away`: rows that resemble a row to train on."""
    seen = [answer.row in given_away for answer in answers]
    return [_scores(metric, answers, seen, decides=metric.name == asked.decide_by) for metric in asked.own]


def _scores(metric: OwnMetric, answers: Sequence[Answer], seen: list[bool], *, decides: bool) -> OwnScores:
    expected, trouble = [answer.expected for answer in answers], ""
    base: list[bool | None] = [None] * len(answers)
    tuned = base
    try:
        base = right(metric, [answer.base for answer in answers], expected)
        tuned = right(metric, [answer.tuned for answer in answers], expected)
    except ValueError as error:
        base, tuned, trouble = [None] * len(answers), [None] * len(answers), str(error)
    return OwnScores(name=metric.name, decides=decides, base=base, tuned=tuned, seen=seen, trouble=trouble)


def right(metric: OwnMetric, answers: Sequence[str], expected: Sequence[str]) -> list[bool | None]:
    """Whether each answer is right by the measure; None where the expected one can't be compared with.

    Raises ValueError where its expression takes too long to read them.
    """
    goals = (str(goal) for goal in metric.score.goals(expected, time.thread_time) if goal is not None)
    return metric.score.right(answers, expected, time.thread_time, shares_of(Counter(goals)) or ())


def as_json(scores: Sequence[OwnScores], place: int) -> dict[str, Any]:
    """What one answer of a report has of them: `scores`, and `decided` by the one that decides, base first."""
    found = {one.name: [one.base[place], one.tuned[place]] for one in scores}
    decided = next((found[one.name] for one in scores if one.decides), None)
    return {**({"scores": found} if found else {}), **({"decided": decided} if decided else {})}
