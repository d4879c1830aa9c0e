"""The check of a job's data: its counts, and findings about what the tokenizer and the chat template make of it.

`loractl data check` looks at every row. The trainer looks at a sample before it takes any memory.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.common.data.example import Example
from loractl.common.data.findings import Finding, about_rows, check_examples, refusals
from loractl.common.data.formats import detect_format, map_columns, parse_each
from loractl.common.data.labels import labels_of, untaught
from loractl.common.data.split import Split, split_data
from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec
from loractl.common.job.spec import JobSpec

from .origin import load_rows
from .prepared import PreparedData
from .token_findings import check_length, check_template, check_tokens, learned_tokens
from .tokens import TokenRow, encode

SAMPLED_ROWS = 200
"""Rows that a trainer checks after the template: the template treats all rows alike, so a sample is enough."""

BUCKETS = 10


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """How long rows are, in tokens."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Quantiles:
        ordered = sorted(values)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        return cls(least=ordered[0], median=int(statistics.median(ordered)), p95=p95, most=ordered[-1])


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of a check of a job's data. Without `rows` it ended before the tokenizer."""

    findings: list[Finding] = field(default_factory=list)
    format: DataFormat | None = None
    why: str = ""
    train_rows: int = 0
    held_out_rows: int = 0
    lengths: Quantiles | None = None  # of rows to train on, before they are cut
    learned: Quantiles | None = None  # None for a classifier: its row's label is not a token
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # of a classifier: its rows to train on, held out
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # (from, to, rows)
    rows: list[TokenRow] = field(default_factory=list)  # to train on, uncut
    longest_held_out: int = 0
    advice: list[str] = field(default_factory=list)  # sentences on max_length and batch size

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def as_json(self) -> dict[str, Any]:
        """The check for programs. `ok`: the trainer would take the data."""
        return {
            "ok": not self.errors,
            "format": None if self.format is None else self.format.value,
            "why": self.why,
            "train_rows": self.train_rows,
            "held_out_rows": self.held_out_rows,
            "tokens": None if self.lengths is None else vars(self.lengths),
            "labels": self.labels or None,
            "learned_tokens": None if self.learned is None else vars(self.learned),
            "histogram": [{"from": low, "to": high, "rows": count} for low, high, count in self.histogram],
            "findings": [vars(finding) for finding in self.findings],
            "advice": self.advice,
        }


def check_data(spec: JobSpec, tokenizer: Any, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Checked:
    """All findings about a job's data; never raises DataError."""
    checked, split = _look_at_rows(spec.dataset)
    return checked if split is None else _look_at_tokens(checked, split, spec, tokenizer, progress)


def warnings_about(spec: JobSpec, data: PreparedData, tokenizer: Any) -> tuple[str, ...]:
    """A sentence for each finding in prepared data. Where the template treats rows alike, only a sample is read."""
    sample = data.train_examples[:SAMPLED_ROWS]
    rows = [_encoded(example, tokenizer, data.format) for example in sample]
    findings = check_examples(data.train_examples, data.held_out_examples)
    findings += check_template(sample, tokenizer) + check_tokens(rows, spec, tokenizer, every=False)
    return tuple(finding.sentence for finding in findings if finding.level == "warning")


def _look_at_rows(dataset: DatasetSpec) -> tuple[Checked, Split | None]:
    """Findings without a tokenizer; no split where the data can't be read or split."""
    checked, findings = Checked(), list[Finding]()
    try:
        rows = load_rows(dataset.path)
        held_rows = load_rows(dataset.eval_path, split="test") if dataset.eval_path else None
        mapped = map_columns(rows, dataset.columns, dataset.path)
        format, why = detect_format(mapped, dataset.path, dataset.format)
        checked = replace(checked, format=format, why=why)
        findings += _bad_rows(parse_each(mapped, format, dataset.path)[1], dataset)
        asked: list[Example] = []
        if held_rows is not None and dataset.eval_path:
            mapped = map_columns(held_rows, dataset.columns, dataset.eval_path)
            asked, refused = parse_each(mapped, format, dataset.eval_path)
            findings += _bad_rows(refused, dataset)
        tolerant = dataset.model_copy(update={"on_bad_row": BadRow.DROP})  # bad rows are told; the rest is looked at
        split = split_data(tolerant, rows, held_rows)
    except DataError as error:
        return replace(checked, findings=[*findings, *refusals([error])]), None
    if names := labels_of(split.train):
        findings += _bad_rows(untaught(asked, names, dataset.eval_path or dataset.path), dataset)
    findings += check_examples(split.train, split.held_out, split.overlap)
    checked = replace(checked, train_rows=len(split.train), held_out_rows=len(split.held_out))
    return replace(checked, findings=findings, labels=_label_counts(names, split)), split


def _look_at_tokens(
    checked: Checked, split: Split, spec: JobSpec, tokenizer: Any, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> Checked:
    """The check of the rows after the tokenizer and the chat template."""
    findings, rows = [*checked.findings, *check_template(split.train, tokenizer)], list[TokenRow]()
    try:
        rows = [_encoded(example, tokenizer, split.format) for example in progress(split.train)]
        tested = [_encoded(example, tokenizer, split.format) for example in split.held_out]
    except ValueError as error:
        kind = "chat template" if split.train[0].turns else "nothing to learn"
        findings.append(Finding(level="error", kind=kind, text=str(error)))
        return replace(checked, findings=findings, rows=rows)
    findings += check_tokens(rows, spec, tokenizer) + check_length(rows, spec.dataset)
    lengths = [len(row.input_ids) for row in rows]
    if checked.labels:
        places = {name: place for place, name in enumerate(checked.labels)}
        rows = [replace(row, label=places[str(e.label)]) for row, e in zip(rows, split.train, strict=True)]
    return replace(
        checked,
        findings=findings,
        rows=rows,
        lengths=Quantiles.of(lengths),
        learned=None if checked.labels else Quantiles.of([learned_tokens(row) for row in rows]),
        histogram=_histogram(lengths),
        longest_held_out=max(len(row.input_ids) for row in tested),
    )


def _label_counts(names: Sequence[str], split: Split) -> dict[str, dict[str, int]]:
    train, held_out = (Counter(example.label for example in side) for side in (split.train, split.held_out))
    return {name: {"train": train[name], "held_out": held_out[name]} for name in names}


def _bad_rows(refused: list[DataError], dataset: DatasetSpec) -> list[Finding]:
    if dataset.on_bad_row is BadRow.ERROR:
        return refusals(refused)
    numbers = [error.row for error in refused if error.row is not None]
    text = f"{{n}} left out, as dataset.on_bad_row says; the first: {refused[0].what}" if refused else ""
    return about_rows("warning", "bad rows dropped", text, numbers)


def _encoded(example: Example, tokenizer: Any, format: DataFormat) -> TokenRow:
    ids, labels = encode(example, tokenizer, format)
    return TokenRow(number=example.number, input_ids=ids, labels=labels)


def _histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BUCKETS))
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + n * width, low + (n + 1) * width - 1, count) for n, count in enumerate(counts)]
