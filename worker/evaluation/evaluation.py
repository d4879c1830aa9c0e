"""Base against tuned on the held-out rows: losses, generated answers, and how certain the difference is.

Both are measured on the same weights in one process: the base is the model with its adapter switched off. For jobs of a
box with the same base and held-out rows, like those of a sweep, the base is measured once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from loractl.common.job.sections import DataFormat, Metric
from loractl.common.job.spec import JobSpec
from loractl.worker.base.gauge import in_own_thread
from loractl.worker.base.model import Learner, measuring, positions_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.data.row_forms import form_of
from loractl.worker.data.tokens import TokenRow, unlearned

from .answers import Answer, OwnScores, Prompt, answer_metrics, length_metrics, own_scores, prompts_of, side_by_side
from .base_measurements import BaseMeasurements, EarlierMeasurement, MeasuredModel
from .cheap import Shots, cheap_metrics, copied_metrics, form_metrics, frequent_metrics, shots_metrics
from .comparison import Compared, Labels, Mask, Measure, judged_apart, label_metrics, labels_taught, with_new_rows
from .dialogue import Answered, Turns, answers_of, by_turn, turn_metrics
from .harness import Benchmarks
from .row_losses import RowScores, end_ids, generate, loss_metrics, score_rows
from .stretches import ANSWERS, LABELS, ROWS, SHOTS, Stretch, answered, scored

LABEL_SLACK = 2
"""Tokens beyond the longest label: for its end, and to see that an answer continues."""

REGRESSION_LOSS = Measure(name="regression_loss", label="loss on the regression set")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the report says about the comparison."""

    metrics: list[Compared]
    answers: list[Answer]
    rows: int
    seconds: float
    row_losses: list[tuple[int, int, float, float] | tuple[int, int, float, float, int]]
    """(row, weight, loss of the base, loss of the tuned model in nats): two jobs are compared row by row with them. An
    answer's weight is its learned tokens, over which its losses are summed; a label and a pair weigh 1. A fifth value
    counts the tokens of a pair's two answers."""
    own: list[OwnScores] = field(default_factory=list)  # of `answers`, by the job file's own measures
    labels: Labels | None = None
    turns: list[Turns] = field(default_factory=list)
    baseline: str | None = None  # the name of `base` if it is not the base model
    against: str = "the base"  # the same in a verdict
    given_away: int = 0  # rows that resemble a row to train on
    benchmarks: Benchmarks | None = None  # of the lm-eval harness, if the job names tasks
    cheap: str = ""  # a sentence on the base with examples in its prompt
    base_measured: EarlierMeasurement | None = None  # by an earlier job; None: by this one


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What an evaluation needs."""

    learner: Learner
    data: PreparedData
    spec: JobSpec
    check_stop: Callable[[], None]
    progress: Callable[[int, int], None] = lambda done, of: None
    kept: BaseMeasurements | None = None  # None: the base is measured here and now


def evaluate(task: EvaluationTask) -> Evaluation:
    """Score base and tuned on the held-out rows, and generate answers of each.

    Answers: to the first `evaluation.samples` rows in full; if answers are labels, to every row, as long as a label.
    """
    began, learner, data, spec = time.monotonic(), task.learner, task.data, task.spec
    positions = positions_of(learner.model)
    made_for = getattr(learner.model.config.get_text_config(), "max_position_embeddings", None)  # tokens
    work = Work.of(data, spec, learner.tokenizer, positions)
    work = work.with_shots(data, spec, learner.tokenizer, positions or made_for)
    base, tuned, earlier = measure_both(task, work)
    judged, seen = Judged.of(work, base, tuned), frozenset(data.held_out.given_away)
    own = own_scores(judged.answers, spec.evaluation, seen)
    stops, given_away = data.format is not DataFormat.TEXT, np.isin(work.numbers, data.held_out.given_away)
    parts = [judged, judged.without(seen)] if judged_apart(given_away) else [judged]
    metrics = loss_metrics(base.rows, tuned.rows, spec.evaluation.wanted, stops=stops, given_away=given_away)
    metrics += with_new_rows(*(_label_metrics(task, part) for part in parts))
    metrics += [one for scores in own for one in scores.metrics]
    metrics += with_new_rows(*(_answer_metrics(task, part) for part in parts))
    metrics += turn_metrics(work.turns, (base.whole, tuned.whole), (base.alone, tuned.alone))
    if work.regression:
        before, after = base.regression, tuned.regression
        metrics.append(REGRESSION_LOSS.compare(before.loss, after.loss, before.tokens))
    return Evaluation(
        metrics=metrics,
        answers=judged.answers,
        rows=len(work.numbers),
        seconds=time.monotonic() - began,
        row_losses=[
            (number, int(tokens), round(float(b), 6), round(float(t), 6))
            for number, tokens, b, t in zip(
                work.numbers, base.rows.tokens, base.rows.loss, tuned.rows.loss, strict=True
            )
        ],
        own=own,
        labels=judged.labels,
        given_away=int(given_away.sum()),
        turns=by_turn(work.turns, base.whole, tuned.whole),
        base_measured=earlier,
        cheap=work.shots.told,
    )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What base and tuned made of some held-out rows, by which they are judged beside the loss."""

    numbers: list[int]
    tuned: RowScores  # of these rows
    answers: list[Answer]
    names: list[str]  # the labels, if answers are labels
    labelled: list[Answer]  # then to all rows
    shots: Shots
    shot_scores: RowScores  # the base's, by example
    shot_texts: list[tuple[str, bool]]  # and by prompt

    @classmethod
    def of(cls, work: Work, base: MeasuredModel, tuned: MeasuredModel) -> Judged:
        return cls(
            numbers=work.numbers,
            tuned=tuned.rows,
            answers=side_by_side(work.prompts, base.texts, tuned.texts),
            names=work.labels,
            labelled=side_by_side(work.labelled, base.labels, tuned.labels),
            shots=work.shots,
            shot_scores=base.shots,
            shot_texts=base.shot_texts,
        )

    def without(self, left_out: Collection[int]) -> Judged:
        """The rest, if rows of these numbers are left out."""

        def kept(numbers: Iterable[int]) -> Mask:
            return np.array([number not in left_out for number in numbers], bool)

        shots = self.shots
        return replace(
            self,
            numbers=[number for number in self.numbers if number not in left_out],
            tuned=self.tuned.among(kept(self.numbers)),
            answers=[answer for answer in self.answers if answer.row not in left_out],
            labelled=[answer for answer in self.labelled if answer.row not in left_out],
            shots=replace(
                shots,
                rows=tuple(row for row in shots.rows if row.number not in left_out),
                prompts=tuple(prompt for prompt in shots.prompts if prompt.row not in left_out),
            ),
            shot_scores=self.shot_scores.among(kept(dict.fromkeys(row.number for row in shots.rows))),
            shot_texts=list(itertools.compress(self.shot_texts, kept(prompt.row for prompt in shots.prompts))),
        )

    @property
    def labels(self) -> Labels | None:
        """None if answers are no labels."""
        if not self.labelled:
            return None
        said = ([getattr(answer, side) for answer in self.labelled] for side in ("expected", "base", "tuned"))
        return Labels.of(self.names, *said)


def _label_metrics(task: EvaluationTask, judged: Judged) -> list[Compared]:
    """Labels, and what the tuned model is if nothing but their shares or the questions' form tells them."""
    data, labels = task.data, judged.labels
    metrics = label_metrics(labels) if labels is not None else []
    if data.format is DataFormat.TEXT:
        return metrics
    numbered = {example.number: example for example in data.held_out.examples}
    metrics += cheap_metrics([numbered[one] for one in judged.numbers], data.answer_shares, judged.tuned, labels)
    return metrics + form_metrics(data.held_out.rule, [answer.row for answer in judged.labelled], labels)


def _answer_metrics(task: EvaluationTask, judged: Judged) -> list[Compared]:
    """Generated answers, next to the base's and to cheap ones."""
    data, asked, answers = task.data, task.spec.evaluation, judged.answers
    are_labels = data.answer_shares is not None
    metrics = [*answer_metrics(answers, asked.wanted), *frequent_metrics(answers, asked, labels=are_labels)]
    if not are_labels and data.format is not DataFormat.TEXT:
        metrics += copied_metrics(answers, {example.number: example for example in data.held_out.examples}, asked)
    shown, same = (judged.shots, judged.shot_scores, judged.shot_texts), judged.labelled or answers
    metrics += shots_metrics(*shown, judged.numbers, judged.tuned, same, asked, judged.names)
    return metrics + length_metrics(answers, task.learner.tokenizer, asked.max_new_tokens)


def measure_both(task: EvaluationTask, work: Work) -> tuple[MeasuredModel, MeasuredModel, EarlierMeasurement | None]:
    """Let base and tuned do the work. Returns their results, and who measured the base, if an earlier job did."""
    tick = counter(task, 2 * work.passes + work.shot_passes)
    learner, batch = task.learner, task.spec.evaluation.per_device_eval_batch_size

    def measure_base() -> MeasuredModel:
        return _measure(task, work, tick, base=True)

    def score(rows: list[TokenRow]) -> RowScores:
        run = partial(_in_modes, learner, base=True)
        scores = score_rows(learner.model, learner.tokenizer, rows, batch, scorer=learner.scorer, run=run)
        task.check_stop()
        return scores

    if task.kept is None:
        base, earlier = measure_base(), None
    else:
        base, earlier = task.kept.find(_question(task, work), work.rows, batch, measure_base, score)
    if earlier is not None:
        tick(work.passes + work.shot_passes)
    tuned = _measure(task, work, tick, base=False)
    base, tuned = (measured.by_example(work.rows, work.regression, work.shots.rows) for measured in (base, tuned))
    return base, tuned, earlier


def counter(task: EvaluationTask, total: int) -> Callable[[int], None]:
    """A function to call after more rows: it checks for a stop, and reports progress."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        task.check_stop()
        done += count
        task.progress(done, total)

    return tick


@dataclass(frozen=True, kw_only=True)
class Work:
    """What base and tuned are both measured on."""

    rows: list[TokenRow]  # of a pair, the chosen answer after its prompt
    rejected: list[TokenRow]  # of a pair, the other answer
    given: list[TokenRow]  # the part of `rows` before the answer, if the loss learns that, too
    prompts: list[Prompt]
    labels: list[str]
    labelled: list[Prompt]
    label_tokens: int
    turns: list[Answered]
    regression: list[TokenRow]
    longest_answer: int
    batch: int
    shots: Shots = field(default_factory=Shots)

    @classmethod
    def of(cls, data: PreparedData, spec: JobSpec, tokenizer: Any, positions: int | None = None) -> Work:
        """`positions`: the model's, if it has a table of them. A prompt that leaves none for an answer is left out."""
        asked, most = spec.evaluation, spec.dataset.max_length
        longest = most if positions is None else min(most, positions - 1)
        examples = data.held_out.examples[: asked.max_rows]
        labels = labels_taught(data.answer_shares) if Metric.LABELS in asked.metrics else []
        label_tokens = max((len(tokenizer(name, add_special_tokens=False).input_ids) for name in labels), default=0)
        several = answers_of(examples, tokenizer, most) if Metric.CONTEXT in asked.metrics else []
        form = form_of(data.format)
        texts = [form.texts(row) for row in data.held_out.rows.first(asked.max_rows)]
        rows = [text for text, *_ in texts]
        return cls(
            rows=rows,
            rejected=[text for _, *others in texts for text in others],
            given=list(map(unlearned, rows)) if spec.preference.learns_prompts else [],
            prompts=prompts_of(data.held_out.examples[: asked.samples], tokenizer, longest),
            labels=labels,
            labelled=prompts_of(examples, tokenizer, longest) if labels else [],
            label_tokens=label_tokens + LABEL_SLACK,
            turns=several,
            regression=data.regression.rows.first(asked.max_rows) if data.regression else [],
            longest_answer=asked.max_new_tokens,
            batch=asked.per_device_eval_batch_size,
        )

    def with_shots(self, data: PreparedData, spec: JobSpec, tokenizer: Any, context: int | None = None) -> Work:
        """This work, with the base also asked with training examples in its prompt, where rows have questions.
        `context`: the most tokens that the model was made for, if that is known."""
        if data.format is DataFormat.TEXT or self.rejected or data.label_names:
            return self
        asked, longest = spec.evaluation, spec.dataset.max_length
        shots = Shots.of(
            data.train_examples,
            data.held_out.examples[: asked.max_rows],
            self.rows,
            self.labelled or self.prompts,
            data.format,
            tokenizer,
            longest=longest,
            most=context,
            answer=self.label_tokens if self.labelled else asked.max_new_tokens,
            batch=self.batch,
        )
        return replace(self, shots=shots)

    @property
    def shot_passes(self) -> int:
        """Rows and prompts with examples, on which the base alone works."""
        return len(self.shots.rows) + len(self.shots.prompts)

    @property
    def shot_stretches(self) -> list[Stretch]:
        """The base's work with examples in its prompt."""
        rows, prompts = self.shots.rows, [len(prompt.ids) for prompt in self.shots.prompts]
        found = (
            scored(ROWS, [[len(row.input_ids) for row in rows]]),
            answered(SHOTS, prompts, self.shots.answer, self.shots.batch),
        )
        return [stretch for stretch in found if stretch.count]

    @property
    def numbers(self) -> list[int]:
        """The sums for the held-out examples, which may have several rows each."""
        return list(dict.fromkeys(row.number for row in self.rows))

    @property
    def passes(self) -> int:
        """Rows and prompts that one model works on."""
        return sum(stretch.count for stretch in self.stretches)

    @property
    def scored_apart(self) -> tuple[list[TokenRow], ...]:
        """Every scored row: held-out rows, for pairs the other half and the prompts, answers after the whole
        conversation, answers after only a question, and regression rows."""
        alone = [turn.alone for turn in self.turns if turn.alone is not None]
        return self.rows, self.rejected, self.given, [turn.whole for turn in self.turns], alone, self.regression

    @property
    def stretches(self) -> list[Stretch]:
        """One model's work, in order; answers at their longest."""
        prompts, labelled = ([len(prompt.ids) for prompt in asked] for asked in (self.prompts, self.labelled))
        every = (
            scored(ROWS, [[len(row.input_ids) for row in rows] for rows in self.scored_apart]),
            answered(ANSWERS, prompts, self.longest_answer, self.batch),
            answered(LABELS, labelled, self.label_tokens, self.batch),
        )
        return [stretch for stretch in every if stretch.count]


def _measure(task: EvaluationTask, work: Work, tick: Callable[[int], None], *, base: bool) -> MeasuredModel:
    """Let one model do the work: the base, or the tuned one."""
    learner, batch = task.learner, task.spec.evaluation.per_device_eval_batch_size
    model, tokenizer = learner.model, learner.tokenizer
    smaller: list[bool] = []
    halved = partial(smaller.append, True)
    run = partial(_in_modes, learner, base=base)

    def score(rows: Sequence[TokenRow], batch: int = batch) -> RowScores:
        return score_rows(model, tokenizer, list(rows), batch, tick, learner.scorer, halved, run)

    def answer(prompts: Sequence[Prompt], longest: int, batch: int = batch) -> list[tuple[str, bool]]:
        ids = [prompt.ids for prompt in prompts]
        return generate(model, tokenizer, ids, batch, longest, tick, task.check_stop, halved, run)

    rows, rejected, given, whole, alone, regression = map(score, work.scored_apart)
    texts, labels = answer(work.prompts, work.longest_answer), answer(work.labelled, work.label_tokens)
    shots = work.shots if base else Shots()
    return MeasuredModel(
        shots=score(shots.rows, shots.batch),
        shot_texts=answer(shots.prompts, shots.answer, shots.batch),
        rows=rows,
        rejected=rejected,
        given=given,
        whole=whole,
        alone=alone,
        regression=regression,
        texts=texts,
        labels=labels,
        halved=bool(smaller),
    )


def _in_modes(learner: Learner, piece: Callable[[], None], *, base: bool) -> None:
    in_own_thread(partial(measuring, learner, piece, base=base))


def _question(task: EvaluationTask, work: Work) -> str:
    """A hash of all that decides the result of `_measure` for the base."""
    learner, spec = task.learner, task.spec
    ends = sorted(end_ids(learner.model, learner.tokenizer))
    how = (type(learner.scorer).__name__, repr(learner.precision), spec.evaluation.per_device_eval_batch_size, ends)
    shots = [work.shots.batch, work.shots.answer]
    facts = [how, learner.tokenizer.pad_token_id, work.longest_answer, work.label_tokens, *shots]
    found = hashlib.sha256(json.dumps(facts).encode())
    for rows in (*work.scored_apart, work.shots.rows):
        found.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            found.update(json.dumps([row.number, *row.input_ids, None, *row.labels]).encode())
    for prompts in (work.prompts, work.labelled, work.shots.prompts):
        found.update(f"{len(prompts)} prompts\n".encode())
        for prompt in prompts:
            found.update(json.dumps(prompt.ids).encode())
    return found.hexdigest()
