"""A job's data as the recipe takes it: read, checked, split, tokenised."""

from __future__ import annotations

import bisect
import datetime as dt
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loractl.common.data.examples import Example, Examples
from loractl.common.data.fields import Reading
from loractl.common.data.findings import label_shares
from loractl.common.data.formats import detect_format, labels_of, parse_examples
from loractl.common.data.giveaway import FormRule
from loractl.common.data.split import all_trained_on, distinct, fitting, own_rows, split_data
from loractl.common.errors import DataError
from loractl.common.job.identity import data_digest
from loractl.common.job.sections import DataFormat, DatasetSpec, Overflow
from loractl.common.job.slices import held_out_split
from loractl.common.job.spec import JobSpec
from loractl.common.verdict import RESEMBLE

from .origin import load_pinned, load_rows
from .token_rows import TokenRows
from .token_set import RowTokenizer, TokenSet, fit_examples
from .tokens import TokenRow, joined


@dataclass(frozen=True, kw_only=True)
class MeasuredRows:
    """Rows to measure on: held out, or final, which choose nothing and are measured once, at the end."""

    tokens: TokenSet
    examples: Sequence[Example]  # of `rows`, in the same order; one may have several rows
    overlap: int = 0  # rows of their own file left out because they are trained on, final ones also if held out
    repeated: int = 0  # rows left out as duplicates
    leaks: tuple[str, ...] = ()  # what they have in common with rows to train on
    given_away: tuple[int, ...] = ()  # numbers of examples that a row to train on gives away
    resemble: str = RESEMBLE  # the same in a verdict's words: an adapter before this one may have learned them
    read_off: str = ""  # a clause: how most answers can be told without reading what is asked; else empty
    rule: FormRule | None = None  # where that is by the questions' form

    @property
    def rows(self) -> TokenRows:
        return self.tokens.rows

    def doubts(self, called: str = "held-out") -> list[str]:
        """Sentences that a reader of a verdict on these rows should know. `called`: their name."""
        cut, rows = self.tokens.truncated, self.rows.examples
        about = [f"{cut} of {rows} {called} rows were cut at dataset.max_length."] if cut else []
        return [*(f"{leak}." for leak in self.leaks), *about]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Everything that the recipe and the evaluation need to know about the data."""

    format: DataFormat
    why: str
    train: TokenSet
    train_examples: Sequence[Example]  # of train.rows, in the same order; one may have several rows
    held_out: MeasuredRows
    final: MeasuredRows | None = None
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    sha256: str | None
    unused: tuple[str, ...] = ()  # unread fields of rows
    sources: tuple[str, ...] = ()  # how many rows are from which data set, if there are several
    warnings: tuple[str, ...] = ()  # what looks wrong but is used for training
    packed: TokenRows | None = None  # the rows to train on, several examples in each
    regression: TokenSet | None = None  # rows of another kind, to show what was forgotten
    label_names: tuple[str, ...] = ()  # what a classifier learns to tell apart; empty for any other job
    commits: dict[str, str] = field(default_factory=dict)  # of the data sets on the hub, by what they are for
    prompt_date: dt.date | None = None  # what the chat template writes as today's; None: it writes none

    @property
    def trained_rows(self) -> TokenRows:
        """The rows that the Trainer gets."""
        return self.train.rows if self.packed is None else self.packed

    @property
    def of_final(self) -> PreparedData | None:
        """This data with the final rows as the held-out rows, to measure them in the same way; None if there are
        none."""
        return None if self.final is None else replace(self, held_out=self.final, regression=None, final=None)

    def facts(self) -> dict[str, Any]:
        """What the report says about the data.

        `format`, and `why` it was taken for that; `sha256`; `train_rows` and `held_out_rows`, in their order
        `train_rows_sha256` and `held_out_sha256`; `commits` of data sets from the hub; `train_tokens`, and of them the
        `supervised_tokens`; `truncated_rows`, cut at max_length; `bad_rows_dropped`, the first 20 in sentences in
        `bad_rows`; `too_long_rows_dropped`; `overlap_rows_dropped` and `repeated_rows_dropped`: held-out rows that are
        trained on or repeated; of final rows `final_rows`, `final_sha256`, `final_overlap_rows_dropped`,
        `final_repeated_rows_dropped`; `conversations_apart`, which make `rows_of_conversations_apart`; `unused_fields`;
        `sources`: with dataset.more, how many rows come from where; `warnings`: rows that look wrong but are trained
        on; `labels`: of a classifier, rows to `train` and `held_out` by label; `prompt_date`: what the chat template
        writes as today's date, if it does.
        """
        return dict(self._facts)

    @functools.cached_property
    def answer_shares(self) -> dict[str, float] | None:
        """Share of each answer of the rows to train on, the most frequent first; None if they are no labels."""
        return label_shares(self.train_examples)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what is read in training: the rows' tokens, and a classifier's labels. Checkpoints name it."""
        rows = ([row.input_ids, row.starts] for row in self.trained_rows)
        classified = [self.label_names, self.trained_rows.class_labels] if self.label_names else []
        return data_digest(itertools.chain(rows, classified))

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        held_out, final = self.held_out, self.final
        sides = [self.train, held_out.tokens, *([] if final is None else [final.tokens])]
        of_final = (
            {}
            if final is None
            else {
                "final_rows": final.rows.examples,
                "final_sha256": _hash_of(final.examples),
                "final_overlap_rows_dropped": final.overlap,
                "final_repeated_rows_dropped": final.repeated,
            }
        )
        return {
            "format": self.format.value,
            "why": self.why,
            "sha256": self.sha256,
            "train_rows": self.train.rows.examples,
            "train_rows_sha256": _hash_of(self.train_examples),
            "commits": dict(self.commits),
            "held_out_rows": held_out.rows.examples,
            "held_out_sha256": _hash_of(held_out.examples),
            "train_tokens": self.train.tokens,
            "supervised_tokens": self.train.supervised,
            **of_final,
            "truncated_rows": sum(side.truncated for side in sides),
            "too_long_rows_dropped": sum(side.too_long for side in sides),
            "conversations_apart": sum(side.apart for side in sides),
            "rows_of_conversations_apart": sum(side.apart_rows for side in sides),
            "bad_rows_dropped": len(self.dropped),
            "overlap_rows_dropped": held_out.overlap,
            "repeated_rows_dropped": held_out.repeated,
            "bad_rows": self.dropped[:20],
            "unused_fields": list(self.unused),
            "sources": list(self.sources),
            "warnings": list(self.warnings),
            "labels": self.label_counts() or None,
            "prompt_date": self.prompt_date and self.prompt_date.isoformat(),
        }

    def label_counts(self) -> dict[str, dict[str, int]]:
        """The number of rows of each classifier's label, to train on and held out."""
        train, held_out = (Counter(side.rows.class_labels) for side in (self.train, self.held_out))
        names = enumerate(self.label_names)
        return {name: {"train": train[place], "held_out": held_out[place]} for place, name in names}


def prepare_data(
    dataset: DatasetSpec,
    data_path: str,
    eval_path: str | None,
    sha256: str | None,
    tokenizer: Any,
    cache: Path | None,
    more: Sequence[str] = (),
    *,
    final_path: str | None = None,
) -> PreparedData:
    """Read, check, split and tokenise. `more`: the paths of the data sets of `dataset.more`.

    Raises DataError with file, row and what was expected.
    """
    read = [load_pinned(path, source.split) for source, path in zip(dataset.sources, (data_path, *more), strict=True)]
    held = load_pinned(eval_path, held_out_split(eval_path, dataset.eval_split)) if eval_path else (None, None)
    last = load_pinned(final_path, held_out_split(final_path)) if final_path else (None, None)
    names = ["path", *(f"more.{number}" for number in range(len(more)))]
    commits = dict(zip(names, (commit for _, commit in read), strict=True))
    commits |= {"eval_path": held[1], "final_path": last[1]}
    split = split_data(dataset, read[0][0], held[0], [rows for rows, _ in read[1:]], final_rows=last[0])
    tokeniser = RowTokenizer(dataset=dataset, tokenizer=tokenizer, format=split.format, cache=cache)
    with own_rows(split.portions):
        train_set = tokeniser.tokenise(split.train, "to train on", dataset.path)
    with own_rows(split.portions if dataset.eval_path is None else ()):
        held_set = tokeniser.tokenise(split.held_out, "held out", dataset.eval_path or dataset.path)
    with own_rows(split.portions if dataset.final_path is None else ()):
        last_file = dataset.final_path or dataset.path
        final_set = tokeniser.tokenise(split.final, "that is final", last_file) if split.final else None
    numbers = [set(tokens.rows.numbers) for tokens in (train_set, held_set, final_set) if tokens is not None]
    split = fitting(split, dataset, *numbers)
    label_names = labels_of(split.train)

    def measured(tokens: TokenSet, examples: Sequence[Example], overlap: int, repeated: int) -> MeasuredRows:
        labelled = _with_labels(_only(tokens, examples), examples, label_names)
        return MeasuredRows(tokens=labelled, examples=examples, overlap=overlap, repeated=repeated)

    final = None
    if final_set is not None and split.final is not None:
        final = measured(final_set, split.final, split.final_overlap, split.final_repeated)
    return PreparedData(
        format=split.format,
        why=split.why,
        train=_with_labels(train_set, split.train, label_names),
        train_examples=split.train,
        held_out=measured(held_set, split.held_out, split.overlap, split.repeated),
        final=final,
        dropped=split.dropped,
        unused=split.unused,
        sources=tuple(finding.text for finding in split.about_sources(dataset)),
        sha256=sha256,
        label_names=label_names,
        commits={key: commit for key, commit in commits.items() if commit},
    )


def rows_taught(dataset: DatasetSpec, paths: Mapping[str, str]) -> Examples:
    """The rows that a job trained on, before those that were too long are left out. `paths`: of its data sets, by the
    names of JobSpec.data_sets. Raises DataError, TrainingFailed."""
    keys = ["path", *(f"more.{number}" for number in range(len(dataset.more)))]
    rows = [load_rows(paths[key], source.split) for key, source in zip(keys, dataset.sources, strict=True)]
    held = paths.get("eval_path")
    held_rows = load_rows(held, held_out_split(held, dataset.eval_split)) if held else None
    return split_data(dataset, rows[0], held_rows, rows[1:]).train


def _only(tokens: TokenSet, examples: Sequence[Example]) -> TokenSet:
    """The rows of these examples: a classifier leaves out rows of labels that are not taught."""
    if len(examples) == tokens.rows.examples:
        return tokens
    kept = {example.number for example in examples}
    return replace(tokens, rows=TokenRows.of(row for row in tokens.rows if row.number in kept))


def prepare_regression(
    dataset: DatasetSpec, file: str, path: str, train: Sequence[Example], tokenizer: Any
) -> tuple[TokenSet, str | None]:
    """The distinct rows of evaluation.regression, none of them like a row to train on, and their commit on the hub.

    Raises DataError.
    """
    rows, commit = load_pinned(path, held_out_split(path))
    format = detect_format(rows, file)[0]
    trained = {example.likeness() for example in train}
    reading = Reading.of(dataset)
    parsed, _ = parse_examples(rows, format, file, dataset.on_bad_row, dataset.template, reading)
    examples = distinct(parsed, trained)
    if not examples:
        raise DataError(file, all_trained_on(parsed), hint="it is for rows of another kind", kind="overlap")
    tolerant = dataset.model_copy(update={"on_overflow": Overflow.TRUNCATE})
    return fit_examples(examples, file, tolerant, tokenizer, format), commit


def _with_labels(tokens: TokenSet, examples: Sequence[Example], label_names: Sequence[str]) -> TokenSet:
    """The rows with their labels' indices; without labels unchanged. The indices are not in the cache: they depend on
    all training rows."""
    if not label_names:
        return tokens
    place = {name: n for n, name in enumerate(label_names)}
    label_of = {e.number: place[e.label] for e in examples if e.label is not None}
    return replace(tokens, rows=tokens.rows.labelled([label_of[number] for number in tokens.rows.numbers]))


def _hash_of(examples: Sequence[Example]) -> str:
    """Equal for the same rows in the same order."""
    return hashlib.sha256("".join(example.content_hash() for example in examples).encode()).hexdigest()


def packed(data: PreparedData, spec: JobSpec) -> PreparedData:
    """The data with packed rows, if the job asks for that."""
    if not spec.training.packing:
        return data
    return replace(data, packed=TokenRows.of(pack(data.train.rows, spec.dataset.max_length)))


def pack(rows: Sequence[TokenRow], max_length: int) -> list[TokenRow]:
    """Rows of at most `max_length` tokens, each made of whole examples: the longest first, each into the fullest row
    that has room (best fit decreasing). The first token of an example is never learned: no token precedes it. No two
    rows of one conversation are packed together: it would be learned twice in a step."""
    bins: list[list[TokenRow]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in sorted(rows, key=lambda row: (-len(row.input_ids), row.number)):
        place = bisect.bisect_left(room, (len(row.input_ids), -1))
        while place < len(room) and any(row.number == other.number for other in bins[room[place][1]]):
            place += 1
        if place == len(room):
            bins.append([])
            free, number = max_length, len(bins) - 1
        else:
            free, number = room.pop(place)
        bins[number].append(row)
        bisect.insort(room, (free - len(row.input_ids), number))
    return [joined(examples) for examples in bins]
