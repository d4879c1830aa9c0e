"""The rows of all data sets that a job trains on, drawn by their shares and numbered apart, and their split: what the
job trains on, what it holds out, and final rows, on which no choice depends.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loractl.common.errors import DataError
from loractl.common.job.sections import PLAIN, BadRow, DataFormat, DatasetSpec, PromptTemplate, SourceSpec

from .examples import Example, Examples
from .fields import Reading
from .findings import Finding
from .formats import check_taught, detect_format, map_columns, parse_examples, untaught
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
        assert portion.before >= examples.highest_number, "two rows would share a number, and so tokens and labels"
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
    # not the last row's number: a split of a file may name its first rows last
    step = 10 ** len(str(max(examples.highest_number for examples in parsed)))
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


@dataclass(frozen=True, kw_only=True)
class Split:
    """A job's examples: what is trained on, what is held out, and what became of the rest."""

    format: DataFormat
    why: str
    train: Examples
    held_out: Examples
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    overlap: int  # rows of the held-out file left out because they are trained on
    near: int  # of those, rows that differ from a trained row in case or spaces
    repeated: int  # held-out rows left out because a row like them is held out already
    portions: tuple[Portion, ...]
    unused: tuple[str, ...] = ()  # unread fields of rows
    final: Examples | None = None  # on which no choice depends; None: the job has no such rows
    final_overlap: int = 0  # rows of the final file left out because they are trained on or held out
    final_repeated: int = 0  # final rows left out because a row like them is final already

    def about_sources(self, dataset: DatasetSpec) -> list[Finding]:
        """How many rows come from which of several data sets, and whether the job's template has no effect on them."""
        held_out = [] if dataset.eval_path else [example.number for example in self.held_out]
        findings = about_sources(self.portions, held_out)
        if dataset.template is not PromptTemplate.CHAT and self.format in PLAIN:
            what = f"dataset.template: {dataset.template.value} has no effect"
            text = f"{what}: rows of the format {self.format.value} are taken as they are"
            hint = "leave dataset.template out, or give rows with instruction, messages or conversations"
            findings.append(Finding(level="warning", kind="unused template", text=text, hint=hint))
        return findings


def split_data(
    dataset: DatasetSpec,
    rows: Iterable[RawRow],
    held_rows: Iterable[RawRow] | None,
    more: Sequence[Iterable[RawRow]] = (),
    *,
    final_rows: Iterable[RawRow] | None = None,
) -> Split:
    """The examples of a data set's rows and of its `more`, and of its eval_path and final_path, if it has them.

    Raises DataError.
    """
    reading = Reading.of(dataset)
    split = _split(dataset, rows, held_rows, more, reading)
    if final_rows is not None:
        split = _with_final_file(split, dataset, final_rows, reading)
    return replace(split, unused=tuple(reading.unused))


def _split(
    dataset: DatasetSpec,
    rows: Iterable[RawRow],
    held_rows: Iterable[RawRow] | None,
    more: Sequence[Iterable[RawRow]],
    reading: Reading,
) -> Split:
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    gathered = gather(dataset, (rows, *more), reading)
    format, why, examples, dropped = gathered.format, gathered.why, gathered.examples, gathered.dropped
    if held_rows is None:
        assert dataset.test_size is not None, "the job file's check leaves one of test_size and eval_path"
        train, held_out = split_held_out(examples, dataset.test_size, file)
        repeated = len(examples) - len(train) - len(held_out)
        train, final, twice = _set_final_apart(train, dataset, len(held_out))
        check_taught(train, file)
        return Split(
            format=format,
            why=why,
            train=train,
            held_out=in_turn(held_out, gathered.portions),
            dropped=dropped,
            portions=gathered.portions,
            overlap=0,
            near=0,
            repeated=repeated,
            final=None if final is None else in_turn(final, gathered.portions),
            final_repeated=twice,
        )
    held_rows = map_columns(held_rows, dataset.columns, held_file)
    held_out, also_dropped = parse_examples(held_rows, format, held_file, dataset.on_bad_row, dataset.template, reading)
    held_out, untold = _of_known_labels(held_out, check_taught(examples, file), held_file, dataset.on_bad_row)
    also_dropped += untold
    new = distinct(held_out, trained := frozenset(examples.likenesses))
    if not new:
        hint = "name a file with other rows, or leave eval_path out: then dataset.test_size of the rows are held out"
        raise DataError(held_file, all_trained_on(held_out), hint=hint, kind="overlap")
    overlap, known = sum(one in trained for one in held_out.likenesses), frozenset(examples.digests)
    train, final, twice = _set_final_apart(examples, dataset, 0, frozenset(held_out.likenesses))
    return Split(
        format=format,
        why=why,
        train=train,
        held_out=new,
        dropped=dropped + also_dropped,
        overlap=overlap,
        near=overlap - sum(digest in known for digest in held_out.digests),
        repeated=len(held_out) - len(new) - overlap,
        portions=gathered.portions,
        final=None if final is None else in_turn(final, gathered.portions),
        final_repeated=twice,
    )


def _with_final_file(split: Split, dataset: DatasetSpec, rows: Iterable[RawRow], reading: Reading) -> Split:
    """The split with the rows of final_path that are unlike all trained and held-out rows."""
    file = dataset.final_path or dataset.path
    rows = map_columns(rows, dataset.columns, file)
    final, dropped = parse_examples(rows, split.format, file, dataset.on_bad_row, dataset.template, reading)
    final, untold = _of_known_labels(final, check_taught(split.train, dataset.path), file, dataset.on_bad_row)
    dropped += untold
    used = frozenset((*split.train.likenesses, *split.held_out.likenesses))
    new = distinct(final, used)
    if not new:
        hint = "name a file with other rows, or set dataset.final_size instead"
        raise DataError(file, all_trained_on(final, "trained on or held out"), hint=hint, kind="overlap")
    overlap = sum(one in used for one in final.likenesses)
    repeated = len(final) - len(new) - overlap
    return replace(split, dropped=split.dropped + dropped, final=new, final_overlap=overlap, final_repeated=repeated)


def all_trained_on(rows: Sequence[Example], used: str = "trained on") -> str:
    """The error for a file to measure on that has no new row."""
    return f"all of its {'prompts' if rows and rows[0].rejected else 'rows'} are {used}, too"


def _set_final_apart(
    rows: Examples, dataset: DatasetSpec, held_out: int, without: Collection[int] = frozenset()
) -> tuple[Examples, Examples | None, int]:
    """(rows to train on, final rows, how many of those were left out as repeated), by dataset.final_size.

    `held_out`: how many different rows of the same file are held out. Final rows come from the opposite end of the
    rows' order: so the held-out rows stay as they are, and no other test_size makes a final row one that is chosen by.
    """
    if dataset.final_size is None:
        return rows, None, 0
    different = len(set(rows.likenesses))
    count = min(max(1, round(dataset.final_size * (different + held_out))), different - 1)
    train, final = _set_apart(rows, count, dataset.path, "final_path", without)
    return train, final, len(rows) - len(train) - len(final)


def distinct(rows: Examples, trained: Collection[int] = frozenset()) -> Examples:
    """The first of all rows that are alike, without those like a trained row (its likeness is in `trained`).

    A row that counted twice would make an interval look surer than it is, and a row that the model knows by heart
    would look like a gain.
    """
    return rows.part(_firsts(rows.likenesses, trained))


def _firsts(likenesses: Iterable[int], without: Collection[int]) -> Iterator[int]:
    seen: set[int] = set()
    for place, one in enumerate(likenesses):
        if one not in without and one not in seen:
            seen.add(one)
            yield place


def fitting(
    split: Split,
    dataset: DatasetSpec,
    train: Collection[int],
    held_out: Collection[int],
    final: Collection[int] = frozenset(),
) -> Split:
    """The split with only the rows of these numbers: on_overflow: drop leaves out the others, which are too long.

    Each side has a row left. Raises DataError if a classifier has fewer than two labels left.
    """
    if (len(train), len(held_out), len(final)) == (len(split.train), len(split.held_out), len(split.final or ())):
        return split
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    trained = split.train.part(place for place, e in enumerate(split.train) if e.number in train)
    held = split.held_out.part(place for place, e in enumerate(split.held_out) if e.number in held_out)
    last = split.final and split.final.part(place for place, e in enumerate(split.final) if e.number in final)
    labels = check_taught(trained, file)
    held, untold = _of_known_labels(held, labels, held_file, dataset.on_bad_row)
    dropped = split.dropped + untold
    if last is not None:
        last, untold = _of_known_labels(last, labels, dataset.final_path or file, dataset.on_bad_row)
        dropped = dropped + untold
    return replace(split, train=trained, held_out=held, final=last, dropped=dropped)


def split_held_out(examples: Sequence[Example], test_size: float, file: str | Path) -> tuple[Examples, Examples]:
    """(train, held out), by content: the same rows are held out in any order and with any seed.

    Rows that are alike land on the same side, so that no held-out row was trained on, and the held-out side keeps one
    of them. Each label keeps a row to train on: without one a classifier could not know it.
    """
    rows = examples if isinstance(examples, Examples) else Examples(examples)
    different = len(set(rows.likenesses))
    return _set_apart(rows, min(max(1, round(test_size * different)), different - 1), file)


def _set_apart(
    rows: Examples, count: int, file: str | Path, key: str = "eval_path", without: Collection[int] = frozenset()
) -> tuple[Examples, Examples]:
    """(rows that stay, rows set apart): `count` different rows, depending on `key` the first or the last by content.

    Each label keeps a row that stays, and so does a likeness in `without`.
    """
    final = key == "final_path"
    labelled = bool(rows) and rows[0].label is not None
    label_of = dict(zip(rows.likenesses, (e.label for e in rows), strict=True)) if labelled else {}
    different = len(label_of) or len(set(rows.likenesses))
    if different < 2:
        different_ones = "prompts" if rows and rows[0].rejected else "rows"
        what = f"needs at least two different {different_ones}: one to train on and one "
        what += "final" if final else "held out"
        raise DataError(file, what, hint=f"or set dataset.{key}", kind="too few rows")
    apart: dict[int, int] = {}  # likeness: the place of the row that represents it
    left: Counter[str | None] = Counter(label_of.values()) if labelled else Counter({None: different})
    for place in sorted(range(len(rows)), key=rows.digests.__getitem__, reverse=final):
        one = rows.likenesses[place]
        if len(apart) == count:
            break
        if one not in apart and one not in without and left[label_of.get(one)] > 1:  # its last row is for training
            apart[one] = place
            left[label_of.get(one)] -= 1
    if not apart:
        what = f"has no label with two different rows: one to train on and one {'final' if final else 'held out'}"
        raise DataError(file, what, hint=f"or set dataset.{key}", kind="too few rows")
    stays = rows.part(place for place, one in enumerate(rows.likenesses) if one not in apart)
    return stays, rows.part(sorted(apart.values()))


def _of_known_labels(
    held_out: Examples, labels: tuple[str, ...], file: str | Path, on_bad_row: BadRow
) -> tuple[Examples, list[str]]:
    """The held-out rows with a label that is taught, and a sentence for each other row, where those are left out. Rows
    that teach no labels have none."""
    if not labels:
        return held_out, []
    refused = untaught(held_out, labels, file)
    if refused and (on_bad_row is BadRow.ERROR or len(refused) == len(held_out)):
        refused[0].hint = "teach it, correct it, or leave such rows out with dataset.on_bad_row: drop"
        raise refused[0]
    known = set(labels)
    taught = held_out.part(place for place, e in enumerate(held_out) if e.label in known)
    return taught, [error.sentence for error in refused]
