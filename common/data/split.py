"""The split of a data set: what a job trains on, and what it holds out to measure the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec

from .example import Example
from .examples import Examples
from .fields import Reading
from .findings import Finding
from .formats import map_columns, parse_examples
from .labels import check_taught, untaught
from .rows import RawRow
from .sources import Portion, about_sources, gather, in_turn

ALL_TRAINED_ON = "all of its rows are trained on, too"
"""What is wrong with a file of rows to measure by, none of which is new."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A job's examples: what is trained on, what is held out, and what became of the rest."""

    format: DataFormat
    why: str
    train: Examples
    held_out: Examples
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    overlap: int  # rows of the held-out file left out because they are trained on
    near: int  # of those, the ones that differ from what is trained on in case or spaces
    repeated: int  # held-out rows left out because they stand there already, but for case and spaces
    portions: tuple[Portion, ...]
    unused: tuple[str, ...] = ()  # fields of rows that are not read

    def about_sources(self, dataset: DatasetSpec) -> list[Finding]:
        """How many rows come from which data set, where there are several."""
        held_out = [] if dataset.eval_path else [example.number for example in self.held_out]
        return about_sources(self.portions, held_out)


def split_data(
    dataset: DatasetSpec,
    rows: Iterable[RawRow],
    held_rows: Iterable[RawRow] | None,
    more: Sequence[Iterable[RawRow]] = (),
) -> Split:
    """The examples of a data set's rows and of those of its `more`, and of its eval_path where there is one.

    Raises DataError.
    """
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    reading = Reading.of(dataset)
    gathered = gather(dataset, (rows, *more), reading)
    format, why, examples, dropped = gathered.format, gathered.why, gathered.examples, gathered.dropped
    if held_rows is None:
        assert dataset.test_size is not None, "the job file's check leaves one of test_size and eval_path"
        train, held_out = split_held_out(examples, dataset.test_size, file)
        if format is DataFormat.CLASSIFICATION:
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
            repeated=len(examples) - len(train) - len(held_out),
            unused=tuple(reading.unused),
        )
    held_rows = map_columns(held_rows, dataset.columns, held_file)
    held_out, also_dropped = parse_examples(held_rows, format, held_file, dataset.on_bad_row, dataset.template, reading)
    if format is DataFormat.CLASSIFICATION:
        held_out, untold = _of_known_labels(held_out, check_taught(examples, file), held_file, dataset.on_bad_row)
        also_dropped += untold
    new = distinct(held_out, trained := frozenset(examples.likenesses))
    if not new:
        hint = "name a file with other rows, or leave eval_path out: then dataset.test_size of the rows are held out"
        raise DataError(held_file, ALL_TRAINED_ON, hint=hint, kind="overlap")
    overlap, known = sum(one in trained for one in held_out.likenesses), frozenset(examples.digests)
    return Split(
        format=format,
        why=why,
        train=examples,
        held_out=new,
        dropped=dropped + also_dropped,
        overlap=overlap,
        near=overlap - sum(digest in known for digest in held_out.digests),
        repeated=len(held_out) - len(new) - overlap,
        portions=gathered.portions,
        unused=tuple(reading.unused),
    )


def distinct(rows: Examples, trained: Collection[int] = frozenset()) -> Examples:
    """The first of all rows that are alike, without those like a row that is trained on (its likeness is in `trained`).

    A row that counted twice would make an interval look surer than it is, and a row that the model knows by heart
    would make a gain.
    """
    return rows.part(_firsts(rows.likenesses, trained))


def _firsts(likenesses: Iterable[int], without: Collection[int]) -> Iterator[int]:
    seen: set[int] = set()
    for place, one in enumerate(likenesses):
        if one not in without and one not in seen:
            seen.add(one)
            yield place


def fitting(split: Split, dataset: DatasetSpec, train: Collection[int], held_out: Collection[int]) -> Split:
    """The split of the rows of these numbers alone: on_overflow: drop leaves out the others, which are too long.

    Raises DataError where nothing is left to train on or held out, or of a classifier not two labels.
    """
    if len(train) == len(split.train) and len(held_out) == len(split.held_out):
        return split
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    trained = split.train.part(place for place, e in enumerate(split.train) if e.number in train)
    held = split.held_out.part(place for place, e in enumerate(split.held_out) if e.number in held_out)
    for side, name, of in ((trained, "to train on", file), (held, "held out", held_file)):
        if not side:
            raise no_row_fits(of, dataset.max_length, f" {name}")
    dropped = split.dropped
    if split.format is DataFormat.CLASSIFICATION:
        held, untold = _of_known_labels(held, check_taught(trained, file), held_file, dataset.on_bad_row)
        dropped = dropped + untold
    return replace(split, train=trained, held_out=held, dropped=dropped)


def no_row_fits(file: str | Path, max_length: int, side: str = "") -> DataError:
    """The refusal of a file, or of one side of its split, of which every row is too long."""
    return DataError(
        file, f"has no row{side} of at most {max_length} tokens", hint="raise dataset.max_length", kind="too long"
    )


def split_held_out(examples: Sequence[Example], test_size: float, file: str | Path) -> tuple[Examples, Examples]:
    """(train, held out), by content: the same rows are held out in any order and with any seed.

    Rows that are alike land on the same side, so that no held-out row was trained on, and the held-out side keeps one
    of them. Each label keeps a row to train on: without one a classifier could not know it.
    """
    rows = examples if isinstance(examples, Examples) else Examples(examples)
    labelled = bool(rows) and rows[0].label is not None
    label_of = dict(zip(rows.likenesses, (e.label for e in rows), strict=True)) if labelled else {}
    different = len(label_of) or len(set(rows.likenesses))
    if different < 2:
        raise DataError(
            file,
            "needs at least two different rows: one to train on and one held out",
            hint="or set dataset.eval_path",
            kind="too few rows",
        )
    count = min(max(1, round(test_size * different)), different - 1)
    held_out: dict[int, int] = {}  # likeness: the place of the row that stands for it
    left: Counter[str | None] = Counter(label_of.values()) if labelled else Counter({None: different})
    for place in sorted(range(len(rows)), key=rows.digests.__getitem__):
        one = rows.likenesses[place]
        if len(held_out) == count:
            break
        if one not in held_out and left[label_of.get(one)] > 1:  # a label's last row is for training
            held_out[one] = place
            left[label_of.get(one)] -= 1
    if not held_out:
        what = "has no label with two different rows: one to train on and one held out"
        raise DataError(file, what, hint="or set dataset.eval_path", kind="too few rows")
    train = rows.part(place for place, one in enumerate(rows.likenesses) if one not in held_out)
    return train, rows.part(sorted(held_out.values()))


def _of_known_labels(
    held_out: Examples, labels: tuple[str, ...], file: str | Path, on_bad_row: BadRow
) -> tuple[Examples, list[str]]:
    """The held-out rows with a label that is taught, and a sentence for each other row, where those are left out."""
    refused = untaught(held_out, labels, file)
    if refused and (on_bad_row is BadRow.ERROR or len(refused) == len(held_out)):
        refused[0].hint = "teach it, correct it, or leave such rows out with dataset.on_bad_row: drop"
        raise refused[0]
    known = set(labels)
    taught = held_out.part(place for place, e in enumerate(held_out) if e.label in known)
    return taught, [error.sentence for error in refused]
