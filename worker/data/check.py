"""A job's data as its tokenizer and chat template make them: counts, and what looks wrong.

common/checks.py has what the rows show without a tokenizer; here both are put together, for `loractl data check` and,
on a sample of rows, for the trainer before it takes any memory.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loractl.common.data.findings import Finding, check_examples, found, refusals
from loractl.common.data.labels import labels_of, untaught
from loractl.common.data.rows import Example, detect_format, map_columns, parse_each, split_data
from loractl.common.errors import DataError
from loractl.common.job.spec import BadRow, DataFormat, DatasetSpec, JobSpec, Overflow
from loractl.common.memory.architecture import find_config

from .origin import load_rows
from .prepared import PreparedData
from .tokens import IGNORED, TokenRow, encode, rendered

SAMPLED_ROWS = 200
"""So many rows a trainer looks at for what the template makes of them: it makes the same of all."""

BUCKETS = 10

FEW_STEPS = 10
"""Fewer optimizer steps than these hardly move an adapter."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long rows are, in tokens."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Lengths:
        ordered = sorted(values)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        return cls(least=ordered[0], median=int(statistics.median(ordered)), p95=p95, most=ordered[-1])


@dataclass(kw_only=True)
class Checked:
    """What a check of a job's data found. Without `rows` it did not come as far as the tokenizer."""

    findings: list[Finding] = field(default_factory=list)
    format: DataFormat | None = None
    why: str = ""
    train_rows: int = 0
    held_out_rows: int = 0
    lengths: Lengths | None = None  # of rows to train on, before they are cut
    learned: Lengths | None = None  # None for a classifier: its row's one label is no token
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # of a classifier: its rows to train on, held out
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # (from, to, rows)
    rows: list[TokenRow] = field(default_factory=list)  # to train on, uncut
    longest_held_out: int = 0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


def check_data(spec: JobSpec, tokenizer: Any, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Checked:
    """Everything that can be found in a job's data; never raises DataError."""
    dataset, checked = spec.dataset, Checked()
    try:
        rows = load_rows(dataset.path)
        held_rows = load_rows(dataset.eval_path, split="test") if dataset.eval_path else None
        mapped = map_columns(rows, dataset.columns, dataset.path)
        checked.format, checked.why = detect_format(mapped, dataset.path, dataset.format)
        checked.findings += _bad_rows(parse_each(mapped, checked.format, dataset.path)[1], dataset)
        asked: list[Example] = []
        if held_rows is not None and dataset.eval_path:
            mapped = map_columns(held_rows, dataset.columns, dataset.eval_path)
            asked, refused = parse_each(mapped, checked.format, dataset.eval_path)
            checked.findings += _bad_rows(refused, dataset)
        tolerant = dataset.model_copy(update={"on_bad_row": BadRow.DROP})  # bad rows are told; the rest is looked at
        split = split_data(tolerant, rows, held_rows)
    except DataError as error:
        checked.findings += refusals([error])
        return checked
    checked.train_rows, checked.held_out_rows = len(split.train), len(split.held_out)
    if names := labels_of(split.train):
        train, held_out = (Counter(example.label for example in side) for side in (split.train, split.held_out))
        checked.labels = {name: {"train": train[name], "held_out": held_out[name]} for name in names}
        checked.findings += _bad_rows(untaught(asked, names, dataset.eval_path or dataset.path), dataset)
    checked.findings += check_examples(split.train, split.held_out, split.overlap)
    checked.findings += check_template(split.train, tokenizer)
    try:
        checked.rows = [_encoded(example, tokenizer, split.format) for example in progress(split.train)]
        tested = [_encoded(example, tokenizer, split.format) for example in split.held_out]
    except ValueError as error:
        kind = "chat template" if split.train[0].turns else "nothing to learn"
        checked.findings.append(Finding(level="error", kind=kind, text=str(error)))
        return checked
    checked.findings += check_tokens(checked.rows, spec, tokenizer) + _cut_off(checked.rows, dataset)
    lengths = [len(row.input_ids) for row in checked.rows]
    checked.lengths, checked.longest_held_out = Lengths.of(lengths), max(len(row.input_ids) for row in tested)
    if names:
        places = {name: place for place, name in enumerate(names)}
        pairs = zip(checked.rows, split.train, strict=True)
        checked.rows = [replace(row, label=places[str(example.label)]) for row, example in pairs]
    checked.learned = None if checked.labels else Lengths.of([_learned(row) for row in checked.rows])
    checked.histogram = _histogram(lengths)
    return checked


def warnings_about(spec: JobSpec, data: PreparedData, tokenizer: Any) -> tuple[str, ...]:
    """A sentence on each thing that looks wrong in data that are prepared; of rows alike a sample is looked at."""
    sample = data.train_examples[:SAMPLED_ROWS]
    rows = [_encoded(example, tokenizer, data.format) for example in sample]
    findings = check_examples(data.train_examples, data.held_out_examples)
    findings += check_template(sample, tokenizer) + check_tokens(rows, spec, tokenizer, every=False)
    return tuple(finding.sentence for finding in findings if finding.level == "warning")


def check_template(examples: Sequence[Example], tokenizer: Any) -> list[Finding]:
    """Messages that the chat template leaves out, and text that the tokenizer takes for its own marks."""
    marks = [mark for mark in tokenizer.all_special_tokens if len(mark) > 2]
    marked = [e.number for e in examples if any(m in part for m in marks for part in _said(e))]
    hint = "the tokenizer ends or begins a message there; take them out of the text"
    findings = found("warning", "special tokens in text", "{n} with a special token within the text", marked, hint)
    dropped: dict[str, list[int]] = {}
    for example in examples:
        if not example.turns:
            continue
        try:
            text = rendered(example, tokenizer)
        except ValueError:
            continue  # encoding says it
        for role in {turn.role for turn in example.turns if turn.content.strip() not in text}:
            dropped.setdefault(role, []).append(example.number)
    for role, numbers in dropped.items():
        text = f"{{n}} whose {role} message the model's chat template leaves out or changes"
        findings += found("warning", f"dropped {role} message", text, numbers)
    return findings


def check_tokens(rows: Sequence[TokenRow], spec: JobSpec, tokenizer: Any, *, every: bool = True) -> list[Finding]:
    """What the token ids show. `every`: these are all the rows, so that steps can be counted."""
    bos, eos, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    doubled = [r.number for r in rows if bos is not None and r.input_ids[:2] == [bos, bos] and bos != eos]
    hint = "take it out of the text: the tokenizer puts one there"
    findings = found("warning", "doubled BOS", "{n} beginning with two BOS tokens", doubled, hint)
    most = spec.dataset.max_length
    open_ended = [r.number for r in rows if _learned(r) and eos not in r.labels[:most]]
    text = "{n} where no end-of-sequence token is learned: the model will not know where to stop"
    findings += found("warning", "EOS is not learned", text, open_ended)
    if unknown is not None and unknown not in (bos, eos, tokenizer.pad_token_id):
        strange = [r.number for r in rows if unknown in r.input_ids]
        findings += found("warning", "unknown tokens", "{n} with characters that the tokenizer does not know", strange)
    room = context_length(spec.base_model)
    if room is not None and spec.dataset.max_length > room:
        beyond = [r.number for r in rows if len(r.input_ids) > room]
        text = f"{{n}} of more tokens than the model's {room} positions"
        findings += found("warning", "beyond the context", text, beyond, f"dataset.max_length: {room}")
    generated = spec.evaluation.max_new_tokens
    if spec.evaluation.samples and any(IGNORED in r.labels for r in rows):
        long = [r.number for r in rows if _last_answer(r) > generated]
        if 20 * len(long) > len(rows):
            text = f"{{n}} with an answer longer than evaluation.max_new_tokens ({generated}): the report will cut it"
            findings += found("note", "answers longer than generated", text, long)
    batch = spec.training.effective_batch
    if every and spec.training.max_steps is None:
        steps = int(-(-len(rows) // batch) * (spec.training.num_train_epochs or 1))
        if steps < FEW_STEPS:
            text = f"only {steps} optimizer step{'' if steps == 1 else 's'}: {len(rows)} rows, {batch} a step"
            hint = "lower training.gradient_accumulation_steps, or train more epochs"
            findings.append(Finding(level="warning", kind="few steps", text=text, hint=hint))
    return findings


def context_length(base_model: str) -> int | None:
    """Positions that a model in a folder or the local cache was made for; None where its config does not say."""
    path = find_config(base_model)
    if path is None:
        return None
    config = json.loads(Path(path).read_text("utf-8"))
    config = config.get("text_config", config)
    found_there = next((config[k] for k in ("max_position_embeddings", "n_positions") if config.get(k)), None)
    return int(found_there) if found_there else None


def _bad_rows(refused: list[DataError], dataset: DatasetSpec) -> list[Finding]:
    if dataset.on_bad_row is BadRow.ERROR:
        return refusals(refused)
    numbers = [error.row for error in refused if error.row is not None]
    text = f"{{n}} left out, as dataset.on_bad_row says; the first: {refused[0].what}" if refused else ""
    return found("warning", "bad rows dropped", text, numbers)


def _cut_off(rows: Sequence[TokenRow], dataset: DatasetSpec) -> list[Finding]:
    """What dataset.max_length does to the rows."""
    most = dataset.max_length
    long = [row for row in rows if len(row.input_ids) > most]
    numbers = [row.number for row in long]
    longest = max((len(row.input_ids) for row in long), default=0)
    hint = f"dataset.max_length: {longest} would hold them all"
    if dataset.on_overflow is Overflow.ERROR:
        text = f"{{n}} of more than dataset.max_length ({most}) tokens"
        return found("error", "too long", text, numbers, hint)
    if dataset.on_overflow is Overflow.DROP:
        text = f"{{n}} left out, with more than dataset.max_length ({most}) tokens"
        return found("warning", "too long, left out", text, numbers, hint)
    learned_there = dataset.format is not DataFormat.CLASSIFICATION  # a classifier learns no token
    empty = [row.number for row in long if learned_there and all(label == IGNORED for label in row.labels[1:most])]
    text = f"{{n}} with no token to learn within dataset.max_length ({most})"
    findings = found("error", "no learned token", text, empty, hint)
    cut = [row.number for row in long if row.number not in set(empty)]
    share = 100 * sum(len(row.input_ids) - most for row in long) / max(1, sum(len(r.input_ids) for r in rows))
    text = f"{{n}} cut at dataset.max_length ({most}), which takes {share:.0f} % of all tokens"
    return findings + found("warning", "cut rows", text, cut, hint)


def _encoded(example: Example, tokenizer: Any, format: DataFormat) -> TokenRow:
    ids, labels = encode(example, tokenizer, format)
    return TokenRow(number=example.number, input_ids=ids, labels=labels)


def _learned(row: TokenRow) -> int:
    return sum(label != IGNORED for label in row.labels)


def _last_answer(row: TokenRow) -> int:
    """Tokens of the last stretch that is learned."""
    count = 0
    for label in reversed(row.labels):
        if label == IGNORED and count:
            break
        count += label != IGNORED
    return count


def _said(example: Example) -> list[str]:
    return [turn.content for turn in example.turns] or [example.text]


def _histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BUCKETS))
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + n * width, low + (n + 1) * width - 1, count) for n, count in enumerate(counts)]
