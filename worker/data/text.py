"""A check of data, or one row of them as the trainer sees it, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from loractl.common.data.fields import SIDES
from loractl.common.errors import DataError, UsageError
from loractl.common.job.kinds import PAIRS
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec, Overflow
from loractl.common.job.spec import JobSpec
from loractl.common.text import clean_text

from .check import Checked
from .origin import dataset_hash
from .prepared import PreparedData, prepare_data
from .row_forms import form_of, with_prompt
from .token_findings import learned_tokens
from .tokens import APART, IGNORED, TokenRow


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """An example to train on as its rows, usually one, with its data."""

    rows: list[TokenRow]
    data: PreparedData

    def as_json(self) -> dict[str, Any]:
        """The `row`'s number; its `input_ids`, and which of them are `learned`; `label`: of a classifier; `chosen` and
        `rejected`: both of a pair; `rows`: those of a conversation that makes several; `data`: the whole data set."""
        first = self.rows[0]
        if self.data.format in PAIRS:
            texts = form_of(self.data.format).texts(first)
            halves = {side: _told(text) for side, text in zip(SIDES, texts, strict=True)}
            return {"row": first.number, **halves, "data": self.data.facts()}
        told = list(map(_told, self.rows))
        label = {} if first.label is None else {"label": self.data.label_names[first.label]}
        shown = told[0] if len(told) == 1 else {"rows": told}
        return {"row": first.number, **shown, **label, "data": self.data.facts()}


def _told(row: TokenRow) -> dict[str, Any]:
    return {"input_ids": row.input_ids, "learned": [label != IGNORED for label in row.labels]}


def trained_row(spec: JobSpec, tokenizer: Any, number: int | None) -> TrainedRow:
    """The row with this number, or for None the first row to train on. Raises DataError, UsageError."""
    dataset = spec.dataset
    more = [source.path for source in dataset.more]
    given = (dataset.path, dataset.eval_path, dataset_hash(dataset.path), tokenizer, None, more)
    prepare = partial(prepare_data, final_path=dataset.final_path)
    try:
        data = prepare(dataset, *given)
    except DataError as error:
        if number is None or error.row is None or error.row == number:
            raise
        data = prepare(dataset.model_copy(update={"on_bad_row": BadRow.DROP}), *given)  # another row may be bad
    rows = data.train.rows
    wanted = rows[0].number if number is None else number
    found = next((of for of in rows.by_example() if of[0].number == wanted), None)
    if found is not None and spec.preference.learns_prompts:
        found = list(map(with_prompt, found))
    if found is None:
        sources, numbers = ", ".join([dataset.path, *more]), rows.numbers
        raise UsageError(
            f"row {number} is not trained on",
            f"rows of {sources} that are: {min(numbers)} to {max(numbers)}, less those held out or left out",
        )
    return TrainedRow(rows=found, data=data)


SHOWN_LABELS = 20

BAR = 24

COLORS = {"error": "red", "warning": "yellow", "note": None}


def check_text(spec: JobSpec, checked: Checked, tokenizer: Any, *, styled: bool) -> str:
    """The whole check. `styled`: it goes to a terminal, so that learned tokens need no brackets."""
    learned = "both, and the prompt of the chosen one" if spec.preference.learns_prompts else "both"
    lines = [*_head(spec.dataset, checked), *_lengths(checked, spec.dataset, learned), *_labels(checked)]
    for row in checked.rows:
        lines += [f"\nRow {row.number}: {_size(row, list(checked.labels), checked.format)}.\n"]
        lines += [textwrap.indent(_marked(row, tokenizer, styled, checked.format).rstrip("\n"), "  ")]
    if checked.findings:
        lines.append("")
    for finding in sorted(checked.findings, key=lambda finding: list(COLORS).index(finding.level)):
        level = click.style(f"{finding.level:<8}", fg=COLORS[finding.level])
        lines.append(level + " " + clean_text(f"{finding.kind}: {finding.sentence}."))
        lines += [f"         Hint: {finding.hint}."] if finding.hint else []
    counts = [(n, word) for word in ("error", "warning") if (n := sum(f.level == word for f in checked.findings))]
    told = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts) or "Nothing wrong was found"
    return "\n".join([*lines, f"\n{told}.", *checked.advice])


def row_text(dataset: DatasetSpec, shown: TrainedRow, tokenizer: Any, *, styled: bool) -> str:
    """One row to train on, with its learned part marked."""
    data = shown.data
    final = "" if data.final is None else f", {data.final.rows.examples} final"
    if len(shown.rows) == 1:
        size = _size(shown.rows[0], data.label_names, data.format)
    else:
        tokens, learned = sum(len(row.labels) for row in shown.rows), sum(map(learned_tokens, shown.rows))
        size = f"{tokens} tokens, {learned} learned"
    lines = [
        f"Row {shown.rows[0].number} of {', '.join(s.path for s in dataset.sources)}: {size}.",
        f"Format {data.format.value}: {data.why}. "
        f"{data.train.rows.examples} {_noun(data.format)} to train on, {data.held_out.rows.examples} held out{final}.",
    ]
    lines += [f"{told}." for told in data.sources]
    if len(shown.rows) > 1:
        lines.append(f"{len(shown.rows)} rows, one for each answer, {APART}.")
    for number, row in enumerate(shown.rows, start=1):
        lines += [f"\n{number}: {_size(row, data.label_names, data.format)}.\n"] if len(shown.rows) > 1 else [""]
        lines.append(_marked(row, tokenizer, styled, data.format))
    return "\n".join(lines)


def _head(dataset: DatasetSpec, checked: Checked) -> list[str]:
    if checked.format is None:
        return []
    held = f", {checked.held_out_rows} held out" if checked.held_out_rows else ""
    held += f", {checked.final_rows} final" if checked.final_rows else ""
    held += f"; {checked.left_out} too long are left out" if checked.left_out else ""
    rows = f": {checked.train_rows} {_noun(checked.format)} to train on{held}" if checked.train_rows else ""
    names = ", ".join(Path(source.path).name for source in dataset.sources)
    return [f"{names}{rows}. Format {checked.format.value}: {checked.why}."]


def _lengths(checked: Checked, dataset: DatasetSpec, learned: str) -> list[str]:
    """The quantiles, and a histogram that shows what max_length cuts or leaves out. `learned`: of a pair's answers."""
    if checked.lengths is None:
        return []
    pairs = checked.format in PAIRS
    lines = [f"\nThe longer answer of a pair counts, with its prompt; learned: {learned}."] if pairs else []
    lines.append("\nTOKENS      MIN  MEDIAN     P95     MAX")
    for label, of in (("longer" if pairs else "a row", checked.lengths), ("learned", checked.learned)):
        if of is not None:
            lines.append(f"{label:<9}{of.least:>6}{of.median:>8}{of.p95:>8}{of.most:>8}")
    lines.append("")
    most = max(count for _, _, count in checked.histogram)
    words = {Overflow.DROP: "left out", Overflow.ERROR: "too long", Overflow.TRUNCATE: "cut"}
    word = words[dataset.on_overflow]
    for low, high, count in checked.histogram:
        cut = f"  {word}" if low > dataset.max_length else ""
        bar = "█" * max(1 if count else 0, round(BAR * count / most))
        lines.append(f"{low:>6} to {high:<6} {bar:<{BAR}} {count:>6}{cut}")
    return lines


def _labels(checked: Checked) -> list[str]:
    """How often each of a classifier's labels is taught and held out."""
    if not checked.labels:
        return []
    lines = [f"\n{'LABEL':<24}{'TO TRAIN ON':>12}{'HELD OUT':>10}"]
    most = sorted(checked.labels.items(), key=lambda item: -item[1]["train"])
    lines += [
        f"{clean_text(name)[:23]:<24}{rows['train']:>12}{rows['held_out']:>10}" for name, rows in most[:SHOWN_LABELS]
    ]
    return [*lines, f"and {len(most) - SHOWN_LABELS} more"] if len(most) > SHOWN_LABELS else lines


def _noun(format: DataFormat) -> str:
    return "pairs" if format in PAIRS else "rows"


def _size(row: TokenRow, label_names: Sequence[str], format: DataFormat | None) -> str:
    if row.label is not None:
        return f"{len(row.input_ids)} tokens, label {clean_text(label_names[row.label])}"
    named = _texts(row, format)
    sizes = [f"{name} {len(text.labels)} tokens, {learned_tokens(text)} learned" for name, text in named]
    return "; ".join(sizes).strip()


def _texts(row: TokenRow, format: DataFormat | None) -> list[tuple[str, TokenRow]]:
    """A row's texts with their names; most rows have only one text, without a name."""
    if format not in PAIRS:
        return [("", row)]
    return list(zip(SIDES, form_of(format).texts(row), strict=True))


def _marked(row: TokenRow, tokenizer: Any, styled: bool, format: DataFormat | None) -> str:
    """The row's text; without colours the learned parts are in brackets, so that a pipe shows the same."""
    named = _texts(row, format)
    if len(named) == 1:
        return _marked_text(row, tokenizer, styled)
    return "\n\n".join(f"{name}:\n\n{_marked_text(text, tokenizer, styled).rstrip()}" for name, text in named)


def _marked_text(row: TokenRow, tokenizer: Any, styled: bool) -> str:
    runs = _runs(row.input_ids, [label != IGNORED for label in row.labels])
    texts = ((clean_text(tokenizer.decode(ids)), learn) for ids, learn in runs)
    if styled:
        return "".join(click.style(text, dim=not learn, bold=learn) for text, learn in texts)
    return "".join(f"[[{text}]]" if learn else text for text, learn in texts)


def _runs(ids: list[int], learned: list[bool]) -> list[tuple[list[int], bool]]:
    """Neighbouring tokens of one kind, joined: a character may take several tokens."""
    joined: list[tuple[list[int], bool]] = []
    for token, learn in zip(ids, learned, strict=True):
        if not joined or joined[-1][1] != learn:
            joined.append(([], learn))
        joined[-1][0].append(token)
    return joined
