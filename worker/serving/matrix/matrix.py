"""Adapters by tasks: what each adapter scores on each task, on one loaded base, and what that costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
from loractl.worker.data.prepared import MeasuredRows, PreparedData, prepare_data, rows_taught
from loractl.worker.data.prompt import templated, today
from loractl.worker.data.token_rows import TokenRows
from loractl.worker.data.token_set import TokenSet, fit_examples
from loractl.worker.evaluation.answers import rouge
from loractl.worker.evaluation.comparison import Array, Compared, Labels, Measure, percent
from loractl.worker.evaluation.evaluation import Work
from loractl.worker.evaluation.row_losses import by_example, generate, score_rows
from loractl.worker.serving.adapter_pool import AdapterPool, BaseChoice, open_pool
from loractl.worker.serving.card import Footprint, take_card
from loractl.worker.serving.library import Library, Listed, same_base, usual_arithmetic

LOSS, ACCURACY, ROUGE_L = "loss", "accuracy", "rougeL"

MEASURES = {
    LOSS: Measure(name=LOSS, label="held-out loss"),
    ACCURACY: percent(ACCURACY, "accuracy"),
    ROUGE_L: percent(ROUGE_L, "ROUGE-L"),
}
"""The measures of a cell."""

SWITCHES = 60
"""The number of switches timed."""


@dataclass(frozen=True, kw_only=True)
class MatrixOptions:
    """What a person asks for."""

    adapters: str
    data: str | None = None
    rows: int = 200
    samples: int = 32
    max_new_tokens: int = 64
    batch: int = 16
    load_in_4bit: bool | None = None  # None: as the adapters were trained
    gpu: str | None = None


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


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One adapter: its cells by task and measure, and how many of each task's rows it was trained on."""

    name: str
    job_id: int
    method: str
    cells: dict[str, dict[str, Compared]]
    trained_on: dict[str, int]
    load_seconds: float
    memory: int
    disk: int
    as_trained: bool  # the base computes as in training

    def as_json(self) -> dict[str, Any]:
        """`name`, `job_id`, `method`; `as_trained`: the base computes as in its training; `load_seconds`,
        `memory_bytes`, `disk_bytes`; `tasks`: by task and measure (`loss`, and `rougeL` or `accuracy`) the `base`, the
        adapter's `value`, its `change` with the 95 % interval from `low` to `high`, the `cases` and the `reading`;
        `rows_trained_on` by task."""
        return {
            "name": self.name,
            "job_id": self.job_id,
            "method": self.method,
            "as_trained": self.as_trained,
            "load_seconds": self.load_seconds,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "tasks": {name: {kind: _cell(cell) for kind, cell in cells.items()} for name, cells in self.cells.items()},
            "rows_trained_on": self.trained_on,
        }


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Everything that was measured. Bytes and seconds."""

    base_model: str
    precision: str
    tasks: list[Task]
    rows: list[MatrixRow]
    base_memory: int
    base_disk: int
    base_load_seconds: float
    switch_seconds: list[float]

    @property
    def one_base(self) -> int:
        """Memory of one base with all adapters."""
        return self.base_memory + sum(row.memory for row in self.rows)

    @property
    def copies(self) -> int:
        """Memory of a full model for each adapter, as merged ones have."""
        return self.base_memory * len(self.rows)

    @property
    def switch_median(self) -> float | None:
        return statistics.median(self.switch_seconds) if self.switch_seconds else None

    def as_json(self) -> dict[str, Any]:
        """`base_model` and its `precision`; `tasks`: `name`, `rows` and the `measure` besides the loss; `adapters`;
        `memory_bytes`: of the `base`, of `one_base` with all adapters, and of `copies`, a full model for each;
        `disk_bytes` of the `base` and of all `adapters`; `base_load_seconds`; `switch_seconds`: `median` and `count`.
        NaN becomes null."""
        return {
            "base_model": self.base_model,
            "precision": self.precision,
            "tasks": [{"name": t.name, "rows": len(t.work.numbers), "measure": t.measure} for t in self.tasks],
            "adapters": [row.as_json() for row in self.rows],
            "memory_bytes": {"base": self.base_memory, "one_base": self.one_base, "copies": self.copies},
            "disk_bytes": {"base": self.base_disk, "adapters": sum(row.disk for row in self.rows)},
            "base_load_seconds": self.base_load_seconds,
            "switch_seconds": {"median": self.switch_median, "count": len(self.switch_seconds)},
        }


def reading(cell: Compared) -> str:
    """The reading of the change against the base, as in a report, or "too few rows" if it has too few cases."""
    return "too few rows" if cell.reading == "too few cases" else cell.reading


def measure(
    library: Library, options: MatrixOptions, tell: Callable[[str], None], warn: Callable[[str], None]
) -> Matrix:
    """Load the base once, and score it and every adapter on every task. Raises LoractlError."""
    named, files = _named(options.adapters, library), _files(options.data)
    pool = _open(library, list(named.values()), options, tell, warn)
    wanted = EvaluationSpec(
        metrics=[Metric.LOSS, Metric.LABELS, Metric.ROUGE],
        samples=options.samples,
        max_rows=options.rows,
        max_new_tokens=options.max_new_tokens,
        per_device_eval_batch_size=options.batch,
    )
    own = {name: task_of(name, listed, library, pool, wanted, warn) for name, listed in named.items()}
    tasks = [task for task, _ in own.values()]
    if files:
        tasks = [task_from_file(name, path, pool, wanted) for name, path in files.items()]
    folders = {name: library.fetch(listed) for name, listed in named.items()}
    loaded = {name: pool.hold(listed, folders[name]) for name, listed in named.items()}
    bases = {task.name: score(pool, None, task, wanted) for task in _told(tasks, "the base", tell)}
    rows = []
    for name, listed in named.items():
        scores = {task.name: score(pool, loaded[name].key, task, wanted) for task in _told(tasks, name, tell)}
        rows.append(
            MatrixRow(
                name=name,
                job_id=listed.job_id,
                method=listed.method.value,
                cells=_cells(tasks, bases, scores),
                trained_on={task.name: sum(row in own[name][1] for row in task.likenesses) for task in tasks},
                load_seconds=loaded[name].seconds,
                memory=loaded[name].size,
                disk=sum(path.stat().st_size for path in folders[name].rglob("*") if path.is_file()),
                as_trained=pool.as_trained(listed),
            )
        )
    return Matrix(
        base_model=pool.base.model,
        precision=pool.number_format,
        tasks=tasks,
        rows=rows,
        base_memory=pool.bytes,
        base_disk=_disk_of(pool.base.model, pool.base.revision),
        base_load_seconds=pool.seconds,
        switch_seconds=_switches(pool, [each.key for each in loaded.values()]),
    )


def _named(text: str, library: Library) -> dict[str, Listed]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(set(parts)) < len(parts) or not parts:
        raise UsageError("--adapters names none, or one twice", "like --adapters support,notebook:prod,12")
    return {part: library.find(part) for part in parts}


def _files(text: str | None) -> dict[str, Path]:
    """--data faq=faq.jsonl,mail=mail.jsonl. Raises UsageError."""
    files: dict[str, Path] = {}
    for part in (part.strip() for part in (text or "").split(",") if part.strip()):
        name, equals, path = part.partition("=")
        if not equals or not name or name in files:
            raise UsageError(
                f"--data: {part!r} is not of the form NAME=FILE, or its name is taken", "like faq=faq.jsonl"
            )
        files[name] = Path(path)
    return files


def _open(
    library: Library,
    adapters: list[Listed],
    options: MatrixOptions,
    tell: Callable[[str], None],
    warn: Callable[[str], None],
) -> AdapterPool:
    model, _ = same_base(adapters)
    base, usual = (model, library.revision(adapters[0])), usual_arithmetic(adapters, in_4bit=options.load_in_4bit)
    footprint = Footprint.of(base, usual, sum(adapter.size for adapter in adapters))
    device = take_card(library.settings, library.store, options.gpu, footprint)
    choice = BaseChoice.of(base, usual, device, run_code=library.may_run_code(adapters[0]))
    return open_pool(choice, library, adapters, tell, warn)


def _told(tasks: Sequence[Task], who: str, tell: Callable[[str], None]) -> Iterator[Task]:
    for task in tasks:
        began = time.monotonic()
        yield task
        tell(f"{who} on {task.name}: {len(task.work.numbers)} rows in {time.monotonic() - began:.0f} s")


def _cells(
    tasks: Sequence[Task], bases: dict[str, Scores], scores: dict[str, Scores]
) -> dict[str, dict[str, Compared]]:
    """By task and measure: the loss, and the measure of the task's answers."""
    return {
        task.name: {
            kind: compare(bases[task.name], scores[task.name], kind) for kind in dict.fromkeys((LOSS, task.measure))
        }
        for task in tasks
    }


def _disk_of(model: str, revision: str | None) -> int:
    """Bytes of the base's weights on disk: in a folder, or the hub's cache."""
    from transformers.utils import cached_file

    folder = Path(model)
    if not folder.is_dir():
        folder = Path(str(cached_file(model, "config.json", revision=revision))).parent
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(path.stat().st_size for path in weights)


def _switches(pool: AdapterPool, keys: Sequence[str]) -> list[float]:
    """Seconds of single switches between the loaded adapters, in turn."""
    took = []
    for number in range(SWITCHES if len(keys) > 1 else 0):
        began = time.perf_counter()
        pool.switch(keys[number % len(keys)])
        took.append(time.perf_counter() - began)
    return took[1:]  # the first may not have been a switch


def _cell(cell: Compared) -> dict[str, Any]:
    numbers = {"base": cell.base, "value": cell.tuned, "low": cell.low, "high": cell.high, "change": cell.change}
    shown = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    return {**shown, "cases": cell.cases, "reading": reading(cell)}


def task_of(
    name: str, adapter: Listed, library: Library, pool: AdapterPool, asked: EvaluationSpec, warn: Callable[[str], None]
) -> tuple[Task, set[int]]:
    """The rows that an adapter's job held out, and the likenesses of those that it, or one before it, trained on."""
    dataset, paths = adapter.spec.dataset, _paths(adapter, library)
    cache, tokenizer = library.settings.cache_dir, templated(pool.tokenizer, dataset.template, today())
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
        format=format, why=why, train=TokenSet(rows=TokenRows.of(()), truncated=0, too_long=0), train_examples=examples,
        held_out=MeasuredRows(tokens=tokens, examples=examples), dropped=[], sha256=None,
    )  # fmt: skip
    spec = JobSpec(name="matrix", base_model="matrix", method=Method.LORA, dataset=dataset, evaluation=asked)
    return _task(name, data, spec, pool.tokenizer, pool.model)


def _task(name: str, data: PreparedData, spec: JobSpec, tokenizer: Any, model: Any) -> Task:
    used = data.held_out.examples[: spec.evaluation.max_rows]
    work = Work.of(data, spec, tokenizer, positions_of(model))
    return Task(name=name, work=work, likenesses=tuple(e.likeness() for e in used))


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
