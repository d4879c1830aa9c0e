"""Answers that cost no training: a base that has never seen the rows is easy to beat, and these beat it as well.

Where answers are labels, one that never looks at a question always gives the most frequent label, with each label's
share as its probability. Where one answer is frequent, it is always given. Where questions are much like their answers,
they are repeated. And the base has a few training examples in its prompt (Brown et al., 2020). The tuned model is
compared with each of them.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loractl.common.data.examples import Example
from loractl.common.data.findings import answer_of
from loractl.common.data.giveaway import FormRule
from loractl.common.job.sections import DataFormat, EvaluationSpec, Metric
from loractl.common.verdict import FORM
from loractl.worker.data.tokens import IGNORED, TokenRow, encode

from .answers import ROUGE, Answer, Prompt, exact, own_scores, prompts_of, rouge
from .comparison import Compared, Labels, Measure, compare_shares, percent
from .row_losses import RowScores

CHEAP_LOSS = Measure(name="cheap_loss", label="loss, against labels' shares")
SHOTS_LOSS = Measure(name="few_shot_loss", label="loss, against the base with examples")

UNSEEN = 1e-3
"""Probability of a label that no row to train on has: as if a thousand rows lacked it."""

FREQUENT, FEWEST = 0.1, 3
"""From this share of the expected answers, and from this many, one is compared with as the most frequent."""

COPIED = 50.0
"""From this ROUGE-L on, in percent, questions are compared with as answers."""

SHOTS = 4
"""Examples in the base's prompt."""

MOST_ROWS = 24
"""The most held-out rows that are measured with examples in the prompt: each has about five times its tokens."""

FEWEST_ROWS = 8

LONGEST_CONTEXT = 1 << 20
"""Tokens, of a model whose context is not known."""


def cheap_metrics(
    examples: Sequence[Example], shares: Mapping[str, float] | None, tuned: RowScores, labels: Labels | None
) -> list[Compared]:
    """The tuned model's loss and right answers against those of the shares. None if answers are no labels, or if an
    example has several.

    `examples`, `tuned`: row by row. `shares`: of each label, the most frequent first, see label_shares.
    """
    if shares is None or any(len(example.answers) > 1 for example in examples if example.turns):
        return []
    cheap = np.array([-np.log(shares.get(answer_of(example).strip(), UNSEEN)) for example in examples])
    metrics = [CHEAP_LOSS.compare(cheap, tuned.loss, tuned.tokens)]
    if labels is not None:
        known = Counter(label for label in labels.expected if label != labels.other)
        most_frequent = labels.right([max(known, key=known.__getitem__, default=0)] * len(labels.expected))
        right = labels.right(labels.tuned)
        metrics.append(
            compare_shares("cheap_accuracy", "labels right, against the most frequent", most_frequent, right)
        )
    return metrics


def form_metrics(rule: FormRule | None, numbers: Sequence[int], labels: Labels | None) -> list[Compared]:
    """The tuned model's right labels against a rule's by the questions' form. `numbers`: of the labelled rows."""
    if rule is None or labels is None:
        return []
    right = zip(numbers, labels.right(labels.tuned), strict=True)
    pairs = [(rule.right[number], tuned) for number, tuned in right if number in rule.right]
    label = f"labels right, against {rule.what} alone"
    return [compare_shares(FORM, label, *map(list, zip(*pairs, strict=True)))] if pairs else []


def frequent_metrics(answers: Sequence[Answer], asked: EvaluationSpec, *, labels: bool = False) -> list[Compared]:
    """The tuned model's answers against the most frequent expected one, if one is frequent. For a measure of the job's
    own, answers are alike if all that it compares is: an expression may find the same in each of them.

    `labels`: answers are labels, which have other measures than these, but for those of the job's own.
    """
    texts, metrics = [answer.expected for answer in answers], list[Compared]()
    for own in asked.own:
        try:
            goals = own.score.goals(texts, time.thread_time)
        except ValueError:
            continue  # its own row says so
        if (place := _most_frequent(goals)) is not None:
            alone = asked.model_copy(update={"metrics": [own]})
            metrics += text_metrics("cheap", "the most frequent", [texts[place]] * len(texts), answers, alone)
    if not labels and (place := _most_frequent([" ".join(text.split()) for text in texts])) is not None:
        plain = asked.model_copy(update={"metrics": [one for one in asked.metrics if one not in asked.own]})
        metrics += text_metrics("cheap", "the most frequent", [texts[place]] * len(texts), answers, plain)
    return metrics


def _most_frequent(values: Sequence[Any]) -> int | None:
    """The place of the value that most have; None if that are few."""
    counted = Counter(value for value in values if value is not None)
    value, count = counted.most_common(1)[0] if counted else (None, 0)
    return values.index(value) if count >= max(FEWEST, FREQUENT * len(values)) else None


def copied_metrics(answers: Sequence[Answer], examples: Mapping[int, Example], asked: EvaluationSpec) -> list[Compared]:
    """The tuned model's answers against the longest line of each question, without a word like "Correct:" before it, if
    those are much like the expected answers: a text to correct is nearly right already.

    `examples`: by number.
    """
    texts = []
    for example in (examples[answer.row] for answer in answers):
        asked_for = next((turn.content for turn in example.turns[::-1] if turn.role == "user"), example.prompt)
        texts.append(_COMMAND.sub("", max(asked_for.splitlines(), key=len, default="")))
    if not answers or rouge(texts, [answer.expected for answer in answers])["rougeL"].mean() < COPIED:
        return []
    return text_metrics("copied", "the question repeated", texts, answers, asked)


_COMMAND = re.compile(r"^[\w ]{1,40}:\s+")


def text_metrics(
    kind: str, whose: str, texts: Sequence[str], answers: Sequence[Answer], asked: EvaluationSpec
) -> list[Compared]:
    """The tuned model's answers against other texts for the same prompts, by the measures that the job asks for."""
    expected, tuned, wanted = [a.expected for a in answers], [a.tuned for a in answers], asked.wanted
    others = [replace(answer, base=text) for answer, text in zip(answers, texts, strict=True)]
    metrics = [
        replace(own, name=f"{kind}_{own.name}", label=f"{own.label}, against {whose}", own=False, decides=False)
        for own in (scores.metrics[0] for scores in own_scores(others, asked))
        if own.cases
    ]
    if Metric.EXACT_MATCH in wanted:
        both = ([exact(text, e) for text, e in zip(some, expected, strict=True)] for some in (texts, tuned))
        metrics.append(compare_shares(f"{kind}_exact_match", f"exact match, against {whose}", *both))
    if Metric.ROUGE in wanted:
        theirs, ours = rouge(texts, expected)["rougeL"], rouge(tuned, expected)["rougeL"]
        measure = percent(f"{kind}_rougeL", f"{ROUGE['rougeL']}, against {whose}")
        metrics.append(measure.compare(theirs, ours, np.ones(len(answers))))
    return metrics


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Held-out rows with training examples before their questions, for the base alone."""

    count: int = 0  # examples in each prompt
    rows: tuple[TokenRow, ...] = ()  # only what their row alone learns is learned
    prompts: tuple[Prompt, ...] = ()
    batch: int = 1  # so that a batch has no more tokens than one without examples
    answer: int = 0  # the most tokens of an answer
    told: str = ""  # what was measured, and on how many rows; empty if nothing was asked for

    @classmethod
    def of(
        cls,
        train: Sequence[Example],
        held_out: Sequence[Example],
        rows: Sequence[TokenRow],
        prompts: Sequence[Prompt],
        format: DataFormat,
        tokenizer: Any,
        *,
        longest: int,
        most: int | None,
        answer: int,
        batch: int,
    ) -> Shots:
        """`rows`, `prompts`: of the held-out rows, without examples. `longest`: tokens of a planned row. `most`: the
        model's context, if it is known. `answer`: the most tokens of an answer.

        With as many examples as fit into the context for half of the rows; without any if not even one does.
        """
        measured = held_out[:MOST_ROWS]
        if len(measured) < FEWEST_ROWS:
            return cls(told=f"{_NOT_ASKED}: fewer than {FEWEST_ROWS} rows are held out.")
        learned = {
            number: [label for row in some for label in row.labels if label != IGNORED]
            for number, some in itertools.groupby(rows, key=lambda row: row.number)
        }
        chosen = _chosen(train)
        room = min(most or LONGEST_CONTEXT, min(SHOTS + 1, batch) * longest)
        for count in range(min(SHOTS, len(chosen)), 0, -1):
            shown = [_shown(example, chosen[:count], format) for example in measured]
            found = [
                row
                for example in shown
                for row in _rows(example, learned.get(example.number, []), format, tokenizer)
                if len(row.input_ids) <= room
            ]
            kept = {row.number for row in found}
            if len(kept) < max(FEWEST_ROWS, len(measured) / 2):
                continue
            asked = {prompt.row for prompt in prompts} & kept
            fitting = prompts_of([e for e in shown if e.number in asked], tokenizer, room - answer)
            most_tokens = max(len(row.input_ids) for row in found)
            plural = "s" * (count != 1)
            told = f"The base was also asked with {count} training example{plural} in its prompt, on {len(kept)} rows."
            return cls(
                count=count,
                rows=tuple(found),
                prompts=tuple(fitting),
                batch=max(1, batch * longest // max(longest, most_tokens)),
                answer=answer,
                told=told,
            )
        return cls(told=f"{_NOT_ASKED}: they do not fit.")


_NOT_ASKED = "The base was not asked with training examples in its prompt"


def shots_metrics(
    shots: Shots,
    scores: RowScores,
    texts: Sequence[tuple[str, bool]],
    numbers: Sequence[int],
    tuned: RowScores,
    answers: Sequence[Answer],
    asked: EvaluationSpec,
    labels: Sequence[str] = (),
) -> list[Compared]:
    """The tuned model against the base with examples in its prompt, on the same rows.

    `scores`, `texts`: of the base with examples, by example and by prompt. `numbers`, `tuned`: of all held-out rows.
    `labels`: where answers are labels, which have other measures than texts.
    """
    if not shots.rows:
        return []
    place = {number: n for n, number in enumerate(numbers)}
    here = [place[number] for number in dict.fromkeys(row.number for row in shots.rows)]
    metrics = [SHOTS_LOSS.compare(scores.loss, tuned.loss[here], tuned.tokens[here])]
    by_row = {answer.row: answer for answer in answers}
    same = [by_row[prompt.row] for prompt in shots.prompts]
    said, whose = [text for text, _ in texts], "the base with examples"
    if labels and same:
        found = Labels.of(labels, [a.expected for a in same], said, [a.tuned for a in same])
        both = found.right(found.base), found.right(found.tuned)
        metrics.append(compare_shares("few_shot_accuracy", f"labels right, against {whose}", *both))
        asked = asked.model_copy(update={"metrics": asked.own})
    return metrics + (text_metrics("few_shot", whose, said, same, asked) if same else [])


def _chosen(train: Sequence[Example]) -> list[Example]:
    """The examples for the prompt: always the same of the same rows, none longer than half of the rows are, with
    different answers first."""
    if not train:
        return []
    sizes = [len("".join(turn.said for turn in example.turns) or example.text) for example in train]
    middle = sorted(sizes)[len(sizes) // 2]
    short = sorted((e for e, size in zip(train, sizes, strict=True) if size <= middle), key=Example.digest)
    seen = set[str]()
    first: list[Example] = []
    others: list[Example] = []
    for example in short:
        answer = answer_of(example).strip()
        (others if answer in seen else first).append(example)
        seen.add(answer)
    return [*first, *others][:SHOTS]


def _shown(example: Example, chosen: Sequence[Example], format: DataFormat) -> Example:
    """The example with others before its question: as earlier turns, or as text with an empty line between."""
    if example.turns:
        system = example.turns[:1] if example.turns[0].role == "system" else ()
        before = [turn for shot in chosen for turn in shot.turns[: shot.answers[-1] + 1] if turn.role != "system"]
        return replace(example, turns=(*system, *before, *example.turns[len(system) :]))
    begin = "".join(f"{shot.text}\n\n" for shot in chosen)
    return replace(example, prompt=begin + example.prompt, text=begin + example.text)


def _rows(example: Example, learned: Sequence[int], format: DataFormat, tokenizer: Any) -> list[TokenRow]:
    """The rows of an example behind others, in which just the tokens of `learned` are learned; none if its answers have
    other tokens there, or if a chat template refuses it."""
    try:
        rows = encode(example, tokenizer, format)
    except ValueError:
        return []
    left, kept = list(learned), list[TokenRow]()
    for row in reversed(rows):
        labels = [IGNORED] * len(row.labels)
        for place in range(len(labels) - 1, -1, -1):
            if left and row.labels[place] != IGNORED:
                labels[place] = row.labels[place]
                if labels[place] != left.pop():
                    return []
        if any(label != IGNORED for label in labels):
            kept.append(replace(row, labels=labels))
    return kept[::-1] if not left else []
