"""The rows of all data sets that a job trains on, as one: read, drawn by their shares, numbered apart."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, DatasetSpec, SourceSpec

from .examples import Example, Examples
from .fields import Reading
from .findings import Finding
from .formats import detect_format, map_columns, parse_examples
from .rows import RawRow

CONVERSATIONS = frozenset({DataFormat.MESSAGES, DataFormat.SHAREGPT, DataFormat.ALPACA})
"""Formats that teach the same way, so that one job may have rows of each."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What a job takes of one of its data sets."""

    file: str
    share: float | None
    before: int  # added to the numbers of its rows, so that they are unique in a job
    rows: int  # that can be learned from
    wanted: int  # that its share would be
    taken: int

    @property
    def name(self) -> str:
        return Path(self.file).name if Path(self.file).is_absolute() else self.file


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The examples of all data sets of a job, one data set after the other."""

    format: DataFormat
    why: str
    examples: Examples
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    portions: tuple[Portion, ...]


def gather(dataset: DatasetSpec, rows: Sequence[Iterable[RawRow]], reading: Reading) -> Gathered:
    """The examples of `dataset.sources`, given the rows of each. Raises DataError."""
    formats: list[tuple[DataFormat, str]] = []
    parsed: list[Examples] = []
    dropped: list[str] = []
    for source, own in zip(dataset.sources, rows, strict=True):
        mapped = map_columns(own, source.columns or {}, source.path)
        formats.append(format_of(source, mapped, formats[0][0] if formats else None))
        read = parse_examples(mapped, formats[-1][0], source.path, dataset.on_bad_row, dataset.template, reading)
        parsed.append(read[0])
        dropped += read[1]
    portions = _portions(dataset.sources, parsed)
    examples = parsed[0]
    for portion, others in zip(portions[1:], parsed[1:], strict=True):
        for place in _drawn(others, portion.taken):
            example = others[place]
            examples.add(replace(example, number=portion.before + example.number))
    return Gathered(format=formats[0][0], why=formats[0][1], examples=examples, dropped=dropped, portions=portions)


def format_of(source: SourceSpec, rows: Iterable[RawRow], first: DataFormat | None) -> tuple[DataFormat, str]:
    """The format of a data set's rows, and why. Raises DataError if it can't be mixed with that of the `first` one."""
    format, why = detect_format(rows, source.path, source.format or DataFormat.AUTO)
    if first is not None and format is not first and not {format, first} <= CONVERSATIONS:
        what = f"has rows of the format {format.value}, which a job can't learn next to {first.value}"
        hint = "dataset.more: [{format: ..., columns: ...}] says how its rows are read; else train a job on each"
        raise DataError(source.path, what, hint=hint, kind="unknown columns")
    return format, why


def _portions(sources: Sequence[SourceSpec], parsed: Sequence[Examples]) -> tuple[Portion, ...]:
    """How many rows of each are taken: all of those without a share, else as many as the share of all rows.

    A data set with too few rows is taken whole, too, and the others keep their shares.
    """
    shares = {place: source.share for place, source in enumerate(sources) if source.share is not None}
    step = 10 ** len(str(max(examples[-1].number for examples in parsed)))
    wanted = [len(examples) for examples in parsed]
    short: set[int] = set()
    while True:
        drawn = shares.keys() - short
        whole = sum(len(examples) for place, examples in enumerate(parsed) if place not in drawn)
        total = whole / (1 - sum(shares[place] for place in drawn))
        for place in drawn:
            wanted[place] = max(1, round(shares[place] * total))
        if not (found := {place for place in drawn if wanted[place] > len(parsed[place])}):
            break
        short |= found
    return tuple(
        Portion(
            file=source.path,
            share=source.share,
            before=place * step,
            rows=len(examples),
            wanted=wanted[place],
            taken=min(wanted[place], len(examples)),
        )
        for place, (source, examples) in enumerate(zip(sources, parsed, strict=True))
    )


def _drawn(examples: Examples, count: int) -> list[int]:
    """The indices of `count` examples. Their content decides: neither the file's order nor the seed changes the draw.

    The lower half of their digests decides; held-out rows take the upper half, so these come from all data sets.
    """
    by_content = sorted(range(len(examples)), key=lambda place: examples.digests[place] % 2**32)
    return sorted(by_content[:count])


def in_turn(rows: Examples, portions: Sequence[Portion]) -> Examples:
    """The rows in an order whose first rows have each data set in proportion: a report measures only the first rows
    where evaluation.max_rows or .samples says so."""
    if len(portions) == 1:
        return rows
    of = [origin(portions, example).before for example in rows]
    counts, seen = Counter(of), Counter[int]()
    turns = []
    for before in of:
        turns.append((seen[before] + 0.5) / counts[before])
        seen[before] += 1
    return rows.part(sorted(range(len(rows)), key=turns.__getitem__))


def origin(portions: Sequence[Portion], row: Example | int) -> Portion:
    """The data set to which a row, or a row's number, belongs."""
    number = row if isinstance(row, int) else row.number
    return next(portion for portion in reversed(portions) if portion.before < number)


@contextlib.contextmanager
def own_rows(portions: Sequence[Portion]) -> Iterator[None]:
    """Make a DataError about a row name the row's data set, and its number there."""
    try:
        yield
    except DataError as error:
        if error.row is None or len(portions) <= 1:
            raise
        portion = origin(portions, error.row)
        own = error.row - portion.before
        raise DataError(portion.file, error.what, row=own, hint=error.hint, kind=error.kind) from error


def about_sources(portions: Sequence[Portion], held_out: Iterable[int]) -> list[Finding]:
    """How many rows come from each of several data sets. `held_out`: the numbers of held-out rows."""
    if len(portions) == 1:
        return []
    held = Counter(origin(portions, number).before for number in held_out)
    told = []
    for portion in portions:
        rows = f"{portion.taken} rows of" if portion.share is None else f"{portion.taken} of the {portion.rows} rows of"
        told.append(f"{rows} {portion.name}" + (f" ({count} held out)" if (count := held[portion.before]) else ""))
    first = portions[1]
    text = f"{', '.join(told)}; row 1 of {first.name} is row {first.before + 1} here"
    text += ", and so on for the others" if len(portions) > 2 else ""
    findings = [Finding(level="note", kind="several data sets", text=text, count=sum(p.taken for p in portions))]
    for portion in portions:
        if portion.taken < portion.wanted:
            what = f"{portion.name} has {portion.rows} rows, and a share of {portion.share:g} is {portion.wanted}"
            hint = "no row is taken twice: lower its share, or add rows"
            findings.append(
                Finding(level="warning", kind="too few for a share", text=f"{what}: all are taken", hint=hint)
            )
    return findings
