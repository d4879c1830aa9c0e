"""The split of a data set: what a job trains on, and what it holds out to measure the result."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec

from .example import Example
from .examples import Examples
from .formats import detect_format, map_columns, parse_examples
from .labels import check_taught, untaught
from .rows import RawRow


@dataclass(frozen=True, kw_only=True)
class Split:
    """A job's examples: what is trained on, what is held out, and what became of the rest."""

    format: DataFormat
    why: str
    train: Examples
    held_out: Examples
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    overlap: int  # rows of the held-out file left out because they are trained on


def split_data(dataset: DatasetSpec, rows: Iterable[RawRow], held_rows: Iterable[RawRow] | None) -> Split:
    """The examples of a data set's rows, and of those of its eval_path where there is one. Raises DataError."""
    file, held_file = dataset.path, dataset.eval_path or dataset.path
    rows = map_columns(rows, dataset.columns, file)
    format, why = detect_format(rows, file, dataset.format)
    examples, dropped = parse_examples(rows, format, file, dataset.on_bad_row)
    if held_rows is None:
        assert dataset.test_size is not None, "the job file's check leaves one of test_size and eval_path"
        train, held_out = split_held_out(examples, dataset.test_size, file)
        if format is DataFormat.CLASSIFICATION:
            check_taught(train, file)
        return Split(format=format, why=why, train=train, held_out=held_out, dropped=dropped, overlap=0)
    held_rows = map_columns(held_rows, dataset.columns, held_file)
    held_out, also_dropped = parse_examples(held_rows, format, held_file, dataset.on_bad_row)
    if format is DataFormat.CLASSIFICATION:
        held_out, untold = _of_known_labels(held_out, check_taught(examples, file), held_file, dataset.on_bad_row)
        also_dropped += untold
    trained = frozenset(examples.digests)
    new = held_out.part(place for place, digest in enumerate(held_out.digests) if digest not in trained)
    if not new:
        raise DataError(held_file, "has no row that is not trained on as well", kind="overlap")
    overlap = len(held_out) - len(new)
    return Split(format=format, why=why, train=examples, held_out=new, dropped=dropped + also_dropped, overlap=overlap)


def split_held_out(examples: Sequence[Example], test_size: float, file: str | Path) -> tuple[Examples, Examples]:
    """(train, held out), by content: the same rows are held out in any order and with any seed.

    Equal rows land on the same side, so that no held-out row was trained on. Each label keeps a row to train on:
    without one a classifier could not know it.
    """
    rows = examples if isinstance(examples, Examples) else Examples(examples)
    label_of = {} if rows and rows[0].label is None else dict(zip(rows.digests, (e.label for e in rows), strict=True))
    hashes = [digest for digest, _ in itertools.groupby(sorted(rows.digests))]
    if len(hashes) < 2:
        raise DataError(
            file,
            "needs at least two different rows: one to train on and one held out",
            hint="or set dataset.eval_path",
            kind="too few rows",
        )
    count = min(max(1, round(test_size * len(hashes))), len(hashes) - 1)
    held_out: set[int] = set()
    left: Counter[str | None] = Counter(label_of.values()) if label_of else Counter({None: len(hashes)})
    for content in hashes:
        if len(held_out) < count and left[label_of.get(content)] > 1:  # a label's last row is for training
            held_out.add(content)
            left[label_of.get(content)] -= 1
    if not held_out:
        what = "has no label with two different rows: one to train on and one held out"
        raise DataError(file, what, hint="or set dataset.eval_path", kind="too few rows")
    sides: tuple[array[int], array[int]] = array("Q"), array("Q")
    for place, content in enumerate(rows.digests):
        sides[content in held_out].append(place)
    return rows.part(sides[0]), rows.part(sides[1])


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
