"""Tasks on which several adapters are scored: the held-out rows of a job's own data, or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loractl.common.data.formats import detect_format, parse_examples
from loractl.common.data.rows import read_rows
from loractl.common.data.split import distinct
from loractl.common.errors import ArtifactError, DataError, JobNotFound, UsageError
from loractl.common.job.method import Method
from loractl.common.job.sections import DatasetSpec, EvaluationSpec, Metric, Overflow
from loractl.common.job.spec import JobSpec
from loractl.worker.base.arithmetic import evaluating
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import positions_of
from loractl.worker.data.prepared import PreparedData, prepare_data, rows_taught
from loractl.worker.data.prompt import templated
from loractl.worker.data.token_rows import TokenRows
from loractl.worker.data.token_set import TokenSet, fit_examples
from loractl.worker.evaluation.answers import rouge
from loractl.worker.evaluation.comparison import Array, Compared, Measure, percent
from loractl.worker.evaluation.confusion import Labels
from loractl.worker.evaluation.evaluation import Work
from loractl.worker.evaluation.generation import generate
from loractl.worker.evaluation.row_losses import by_example, score_rows
from loractl.worker.serving.adapter_pool import AdapterPool
from loractl.worker.serving.library import Library, Listed

LOSS, ACCURACY, ROUGE_L = "loss", "accuracy", "rougeL"

MEASURES = {
    LOSS: Measure(name=LOSS, label="held-out loss"),
    ACCURACY: percent(ACCURACY, "accuracy"),
    ROUGE_L: percent(ROUGE_L, "ROUGE-L"),
}
"""The measures of a cell."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to score, and which of them each adapter's job was trained on."""

    name: str
    work: Work
    likenesses: tuple[int, ...]  # of the rows, see Example

    @property
    def measure(self) -> str:
        """The measure of its answers."""
        return ACCURACY if self.work.labelled else ROUGE_L if self.work.prompts else LOSS


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model on one task, row by row: summed loss and learned tokens, and a value of each answer in percent."""

    loss: Array
    tokens: Array
    answers: Array


def task_of(
    name: str, adapter: Listed, library: Library, pool: AdapterPool, asked: EvaluationSpec, warn: Callable[[str], None]
) -> tuple[Task, set[int]]:
    """The rows that an adapter's job held out, and the likenesses of those that it, or one before it, trained on."""
    dataset, paths = adapter.spec.dataset, _paths(adapter, library)
    cache, tokenizer = library.settings.cache_dir, templated(pool.tokenizer, dataset.template)
    more = [paths[f"more.{number}"] for number in range(len(dataset.more))]
    data = prepare_data(dataset, paths["path"], paths.get("eval_path"), None, tokenizer, cache, more)
    spec = adapter.spec.model_copy(update={"evaluation": asked})
    own = {e.likeness() for e in data.train_examples}
    return _task(name, data, spec, tokenizer, pool.model), own | learned_before(name, adapter, library, warn)


def learned_before(name: str, adapter: Listed, library: Library, warn: Callable[[str], None]) -> set[int]:
    """The likenesses of what the adapters were trained on from which this one was begun."""
    found = set[int]()
    try:
        for one in library.before(adapter):
            found |= set(rows_taught(one.spec.dataset, _paths(one, library)).likenesses)
    except (ArtifactError, JobNotFound, DataError, TrainingFailed) as error:
        warn(f"{name} was begun from another adapter, and what that one was trained on is not known: {error.sentence}")
    return found


def _paths(adapter: Listed, library: Library) -> dict[str, str]:
    """Where its rows to train on and to hold out are, by the names of JobSpec.data_sets."""
    keys = [key for key in adapter.spec.data_sets() if key not in ("final_path", "regression")]
    return {key: path for key in keys if (path := library.data_file(adapter, key)) is not None}


def task_from_file(name: str, path: Path, pool: AdapterPool, asked: EvaluationSpec) -> Task:
    """All distinct rows of a file. Raises DataError, UsageError."""
    if not path.is_file():
        raise UsageError(f"--data: there is no file {path}", "like --data faq=faq.jsonl")
    rows = read_rows(path)
    format, why = detect_format(rows, path)
    examples = distinct(parse_examples(rows, format, path)[0])
    dataset = DatasetSpec(path=str(path), on_overflow=Overflow.TRUNCATE)
    tokens = fit_examples(examples, str(path), dataset, pool.tokenizer, format)
    data = PreparedData(
        format=format, why=why, train=TokenSet(rows=TokenRows.of(()), truncated=0, too_long=0), held_out=tokens,
        train_examples=examples, held_out_examples=examples, dropped=[], overlap=0, sha256=None,
    )  # fmt: skip
    spec = JobSpec(name="matrix", base_model="matrix", method=Method.LORA, dataset=dataset, evaluation=asked)
    return _task(name, data, spec, pool.tokenizer, pool.model)


def _task(name: str, data: PreparedData, spec: JobSpec, tokenizer: Any, model: Any) -> Task:
    used = data.held_out_examples[: spec.evaluation.max_rows]
    work = Work.of(data, spec, tokenizer, positions_of(model))
    return Task(name=name, work=work, likenesses=tuple(e.likeness() for e in used))


def asked_for(rows: int, samples: int, max_new_tokens: int, batch: int) -> EvaluationSpec:
    """What a cell measures, in a job file's words."""
    return EvaluationSpec(
        metrics=[Metric.LOSS, Metric.LABELS, Metric.ROUGE],
        samples=samples,
        max_rows=rows,
        max_new_tokens=max_new_tokens,
        per_device_eval_batch_size=batch,
    )


def score(pool: AdapterPool, key: str | None, task: Task, asked: EvaluationSpec) -> Scores:
    """Score a loaded adapter, or for None the base, on a task."""
    model, tokenizer, batch, work = pool.model, pool.tokenizer, asked.per_device_eval_batch_size, task.work
    if key is not None:
        pool.switch(key)
    prompts, longest = (work.labelled, work.label_tokens) if work.labelled else (work.prompts, work.longest_answer)
    with evaluating(model, base=key is None), pool.arithmetic(key):
        rows = by_example(score_rows(model, tokenizer, work.rows, batch), work.rows)
        texts = [text for text, _ in generate(model, tokenizer, [p.ids for p in prompts], batch, longest)]
    expected = [prompt.expected for prompt in prompts]
    if work.labelled:
        said = Labels.of(work.labels, expected, texts, texts)
        answers = 100 * np.array(said.right(said.base), float)
    else:
        answers = rouge(texts, expected)[ROUGE_L] if prompts else np.zeros(0)
    return Scores(loss=rows.loss, tokens=rows.tokens, answers=answers)


def compare(base: Scores, tuned: Scores, measure: str) -> Compared:
    """A cell: one measure of an adapter on one task next to the base's, on the same rows."""
    if measure == LOSS:
        return MEASURES[measure].compare(base.loss, tuned.loss, base.tokens)
    return MEASURES[measure].compare(base.answers, tuned.answers, np.ones(len(base.answers)))
