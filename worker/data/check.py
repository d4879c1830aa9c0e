"""The check of a job's data: its counts, findings about the effects of the tokenizer and the chat template, and what to
set: the max_length that cuts nothing, and the micro-batch that a card holds with it.

`loractl data check` looks at every row. The trainer looks at a sample before it takes any memory.
"""

from __future__ import annotations

import functools
import statistics
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loractl.common.data.examples import Example
from loractl.common.data.fields import Reading
from loractl.common.data.findings import Finding, about_fields, about_measures, about_rows, about_warmup, refusals
from loractl.common.data.formats import labels_of, map_columns, parse_each, untaught
from loractl.common.data.giveaway import Giveaway
from loractl.common.data.inspection import Leaks, check_examples
from loractl.common.data.split import Split, fitting, format_of, split_data
from loractl.common.errors import DataError
from loractl.common.job.method import permitted_methods
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec
from loractl.common.job.slices import held_out_split
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import largest_fit
from loractl.common.memory.step import Lengths
from loractl.common.progress import Report
from loractl.common.units import gib

from .origin import load_rows
from .prepared import PreparedData
from .row_forms import form_of, with_prompt
from .token_findings import TemplateLook, TokenLook
from .token_set import no_row_fits
from .tokens import TokenRow

RENDERED_ROWS = 200
"""Rows that a trainer renders to see what the template leaves out: it treats all rows alike."""

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
    """The result of a check of a job's data. Without `rows`, it ended before the tokenizer."""

    findings: list[Finding] = field(default_factory=list)
    format: DataFormat | None = None
    why: str = ""
    train_rows: int = 0  # those used, as in all fields
    held_out_rows: int = 0
    final_rows: int | None = None  # None: the job has none
    left_out: int = 0  # rows of more than max_length tokens that on_overflow: drop leaves out
    lengths: Quantiles | None = None  # of rows to train on, before they are cut or left out
    learned: Quantiles | None = None  # None for a classifier: its label is not a token
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # of a classifier: rows to train on, held out
    histogram: list[tuple[int, int, int]] = field(default_factory=list)  # (from, to, rows)
    rows: list[TokenRow] = field(default_factory=list)  # a short, a medium and a long row to train on, uncut
    longest_held_out: int = 0
    advice: list[str] = field(default_factory=list)  # sentences on max_length and batch size

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def as_json(self) -> dict[str, Any]:
        """`ok`: the trainer would take the data; `format`, and `why` it was taken for that; `train_rows`,
        `held_out_rows`, `final_rows`: those used; `too_long_rows_dropped`; `tokens` and `learned_tokens` of rows: the
        `least`, `median`, `p95` and `most`; `labels`: of a classifier, rows to `train` and `held_out` by label;
        `histogram`: `rows` with tokens `from` to `to`; `findings`; `advice`: sentences on other settings."""
        return {
            "ok": not self.errors,
            "format": None if self.format is None else self.format.value,
            "why": self.why,
            "train_rows": self.train_rows,
            "held_out_rows": self.held_out_rows,
            "final_rows": self.final_rows,
            "too_long_rows_dropped": self.left_out,
            "tokens": None if self.lengths is None else vars(self.lengths),
            "labels": self.labels or None,
            "learned_tokens": None if self.learned is None else vars(self.learned),
            "histogram": [{"from": low, "to": high, "rows": count} for low, high, count in self.histogram],
            "findings": [vars(finding) for finding in self.findings],
            "advice": self.advice,
        }


def check_data(spec: JobSpec, tokenizer: Any, report: Report = lambda what, done, total: None) -> Checked:
    """All findings about a job's data; never raises DataError. `report` gets the progress."""
    checked, split = _look_at_rows(spec.dataset, report)
    return checked if split is None else _look(checked, split, spec, tokenizer, report)


def findings_about(
    spec: JobSpec,
    data: PreparedData,
    tokenizer: Any,
    leaks: Leaks | None = None,
    final: Leaks | None = None,
    giveaway: Giveaway | None = None,
) -> list[Finding]:
    """The findings in prepared data, with the numbers of `check_data`. What the template leaves out is looked for only
    in the first rows, and the finding says so."""
    template, tokens = TemplateLook(tokenizer, RENDERED_ROWS), TokenLook(spec, tokenizer)
    for example in data.train_examples:
        template.see(example)
    for rows in data.train.rows.by_example():
        tokens.see(rows)
    findings = check_examples(data.train_examples, data.held_out.examples, leaks=leaks, final=final, giveaway=giveaway)
    findings += about_measures(spec.evaluation, data.held_out.examples)
    findings += about_warmup(spec.training, len(data.train_examples))
    return findings + template.findings() + tokens.findings(every=False)


def _look_at_rows(dataset: DatasetSpec, report: Report) -> tuple[Checked, Split | None]:
    """Findings without a tokenizer; no split if the data can't be read or split."""
    checked, findings = Checked(), list[Finding]()
    try:
        read = functools.partial(report, "Reading the data")
        rows = [load_rows(source.path, source.split, read) for source in dataset.sources]
        held_rows, final_rows = (
            load_rows(file, held_out_split(file, split), read) if file else None
            for file, split in ((dataset.eval_path, dataset.eval_split), (dataset.final_path, None))
        )
        first: DataFormat | None = None
        for source, own in zip(dataset.sources, rows, strict=True):
            mapped = map_columns(own, source.columns or {}, source.path)
            format, why = format_of(source, mapped, first)
            if first is None:
                first, checked = format, replace(checked, format=format, why=why)
            refused = parse_each(mapped, format, source.path, dataset.template, Reading.of(dataset))[1]
            named = f"{Path(source.path).name}: " if dataset.more else ""
            findings += [replace(found, text=named + found.text) for found in _bad_rows(refused, dataset)]
        asked: list[tuple[str, Sequence[Example]]] = []
        for file, others in ((dataset.eval_path, held_rows), (dataset.final_path, final_rows)):
            if file is None or others is None or first is None:
                continue
            mapped = map_columns(others, dataset.columns, file)
            parsed, refused = parse_each(mapped, first, file, dataset.template, Reading.of(dataset))
            findings += _bad_rows(refused, dataset)
            asked.append((file, parsed))
        tolerant = dataset.model_copy(update={"on_bad_row": BadRow.DROP})  # bad rows are reported; the rest is checked
        split = split_data(tolerant, rows[0], held_rows, rows[1:], final_rows=final_rows)
    except DataError as error:
        return replace(checked, findings=[*findings, *refusals([error])]), None
    if names := labels_of(split.train):
        for file, examples in asked:
            findings += _bad_rows(untaught(examples, names, file), dataset)
    return replace(checked, findings=findings + about_fields(split.unused)), split


def _look(checked: Checked, split: Split, spec: JobSpec, tokenizer: Any, report: Report) -> Checked:
    """The check of the used rows, before and after the tokenizer and the chat template."""
    template = TemplateLook(tokenizer)
    trained, held, last = (TokenLook(spec, tokenizer) for _ in range(3))
    refused: list[Finding] = []
    try:
        _tokenise(split, tokenizer, template, (trained, held, last), report, prompts=spec.preference.learns_prompts)
    except ValueError as error:
        kind = "chat template" if split.train[0].turns else "nothing to learn"
        refused = [Finding(level="error", kind=kind, text=str(error))]
    else:
        checked = replace(
            checked,
            lengths=Quantiles.of(trained.lengths),
            learned=Quantiles.of(trained.learned) if trained.learned else None,
            histogram=_histogram(trained.lengths),
            longest_held_out=max(*held.lengths, *last.lengths, 0),
        )
        try:
            _check_left(split, spec.dataset, (trained, held, last))
            split = fitting(split, spec.dataset, *(set(look.numbers) for look in (trained, held, last)))
        except DataError as error:
            lengths = trained.length_findings(held, last)
            return replace(checked, findings=[*checked.findings, *lengths, *refusals([error])])
        refused = trained.findings() + trained.length_findings(held, last)
    names = labels_of(split.train)
    train, held_out = (Counter(example.label for example in side) for side in (split.train, split.held_out))
    looked = functools.partial(report, "Looking at the rows")
    findings = split.about_sources(spec.dataset)
    findings += check_examples(split.train, split.held_out, split, looked, final=Leaks.of_final(split.final))
    findings += about_measures(spec.evaluation, split.held_out) + template.findings() + refused
    findings += about_warmup(spec.training, len(split.train))
    return replace(
        checked,
        findings=[*checked.findings, *findings],
        rows=[
            with_prompt(row) if spec.preference.learns_prompts else row
            for row in _shown(trained, split, tokenizer, names)
        ],
        labels={name: {"train": train[name], "held_out": held_out[name]} for name in names},
        learned=None if names else checked.learned,
        train_rows=len(split.train),
        held_out_rows=len(split.held_out),
        final_rows=None if split.final is None else len(split.final),
        left_out=trained.left_out + held.left_out + last.left_out,
    )


def _check_left(split: Split, dataset: DatasetSpec, looks: Sequence[TokenLook]) -> None:
    """Raises DataError where each row of a side is too long and left out."""
    files = (dataset.path, dataset.eval_path or dataset.path, dataset.final_path or dataset.path)
    for look, side, file in zip(looks, (" to train on", " held out", " that is final"), files, strict=True):
        if look.lengths and not look.numbers:
            raise no_row_fits(file, dataset.max_length, look.lengths, side)


def _tokenise(
    split: Split,
    tokenizer: Any,
    template: TemplateLook,
    looks: tuple[TokenLook, TokenLook, TokenLook],
    report: Report,
    *,
    prompts: bool,
) -> None:
    """Show the looks the rows to train on, the held-out rows, and the final rows. Raises ValueError, see encode.

    `prompts`: those of chosen answers are learned.
    """
    sides = (split.train, split.held_out, split.final or ())
    total, done = sum(map(len, sides)), 0
    for look, examples in zip(looks, sides, strict=True):
        for example in examples:
            rows = form_of(split.format).encode(example, tokenizer)
            look.see(list(map(with_prompt, rows)) if prompts else rows)
            if look is looks[0] and look.numbers[-1:] == array("q", [example.number]):  # it is used
                template.see(example)
            report("Tokenising", done, total)
            done += 1


def _shown(tokens: TokenLook, split: Split, tokenizer: Any, labels: Collection[str]) -> list[TokenRow]:
    """A short, a medium and a long row among those used."""
    ordered = sorted(range(len(tokens.used)), key=tokens.used.__getitem__)
    places = sorted({0, len(ordered) // 2, len(ordered) - 1}) if ordered else []
    wanted = [tokens.numbers[ordered[place]] for place in places]
    found = {example.number: example for example in split.train if example.number in wanted}
    examples = [found[number] for number in wanted]
    rows = [form_of(split.format).encode(example, tokenizer)[-1] for example in examples]
    place_of = {name: place for place, name in enumerate(labels)}
    return [replace(row, label=place_of.get(str(e.label))) for row, e in zip(rows, examples, strict=True)]


def _bad_rows(refused: list[DataError], dataset: DatasetSpec) -> list[Finding]:
    if dataset.on_bad_row is BadRow.ERROR:
        return refusals(refused)
    numbers = [error.row for error in refused if error.row is not None]
    text = f"{{n}} left out, as dataset.on_bad_row says; the first: {refused[0].what}" if refused else ""
    return about_rows("warning", "bad rows dropped", text, numbers)


def _histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BUCKETS))
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + n * width, low + (n + 1) * width - 1, count) for n, count in enumerate(counts)]


def advice_for(spec: JobSpec, checked: Checked, room: int | None) -> list[str]:
    """Sentences for a person. `room`: bytes of the card to recommend for."""
    if checked.lengths is None:
        return []
    longest = max(checked.lengths.most, checked.longest_held_out)
    advice = [f"dataset.max_length: {longest} holds all rows."]
    if longest > checked.lengths.most:
        advice = [
            f"{advice[0]} The longest to train on has {checked.lengths.most} tokens, the longest other {longest}."
        ]
    fit = _largest_batch(spec, longest, checked, room) if room else None
    return [*advice, fit] if fit else advice


def _largest_batch(spec: JobSpec, longest: int, checked: Checked, room: int) -> str | None:
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        return None
    wide = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": longest})})
    labels = len(checked.labels) or None
    rows = checked.train_rows + checked.left_out  # with this max_length all of them are used
    halves = spec.kind.halves  # the plan is for whole rows
    held_out = halves * checked.longest_held_out
    lengths = Lengths(train=halves * longest, evaluate=held_out, rows=rows, labels=labels)
    effective = spec.training.effective_batch
    for method in permitted_methods(spec.method):
        most = largest_fit(shape, wide, method, room, lengths).micro_batch
        if most:
            size = spec.training.micro_batch(most)
            return (
                f"In {gib(room)} GiB {method.value} takes up to {most} such rows at once; with the same {effective} "
                f"a step: per_device_train_batch_size: {size}, gradient_accumulation_steps: {effective // size}."
            )
    return f"Not one row of {longest} tokens fits into {gib(room)} GiB by the plan."
