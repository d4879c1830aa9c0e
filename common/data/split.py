"""The split of a data set: what a job trains on, and what it holds out to measure the result."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from loractl.common.errors import DataError
from loractl.common.job.sections import BadRow, DataFormat, DatasetSpec

from .example import Example
from .formats import detect_format, map_columns, parse_examples
from .labels import check_taught, untaught
from .rows import RawRow


@dataclass(frozen=True, kw_only=True)
class Split:
    """A job's examples: what is trained on, what is held out, and what became of the rest."""

    format: DataFormat
    why: str
    train: list[Example]
    held_out: list[Example]
    dropped: list[str]  # a sentence for each row that on_bad_row: drop left out
    overlap: int  # rows of the held-out file left out because they are trained on


def split_data(dataset: DatasetSpec, rows: list[RawRow], held_rows: list[RawRow] | None) -> Split:
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
    trained = {e.content_hash() for e in examples}
    new = [e for e in held_out if e.content_hash() not in trained]
    if not new:
        raise DataError(held_file, "has no row that is not trained on as well", kind="overlap")
    overlap = len(held_out) - len(new)
    return Split(format=format, why=why, train=examples, held_out=new, dropped=dropped + also_dropped, overlap=overlap)


def split_held_out(examples: list[Example], test_size: float, file: str | Path) -> tuple[list[Example], list[Example]]:
    """(train, held out), by content: the same rows are held out in any order and with any seed.

    Equal rows land on the same side, so that no held-out row was trained on. Each label keeps a row to train on:
    without one a classifier could not know it.
    """
    label_of = {e.content_hash(): e.label for e in examples}
    hashes = sorted(label_of)
    if len(hashes) < 2:
        raise DataError(
            file,
            "needs at least two different rows: one to train on and one held out",
            hint="or set dataset.eval_path",
            kind="too few rows",
        )
    count = min(max(1, round(test_size * len(hashes))), len(hashes) - 1)
    held_out: set[str] = set()
    left = Counter(label_of.values())
    for content in hashes:
        if len(held_out) < count and left[label_of[content]] > 1:  # a label's last row is for training
            held_out.add(content)
            left[label_of[content]] -= 1
    if not held_out:
        what = "has no label with two different rows: one to train on and one held out"
        raise DataError(file, what, hint="or set dataset.eval_path", kind="too few rows")
    train = [e for e in examples if e.content_hash() not in held_out]
    return train, [e for e in examples if e.content_hash() in held_out]


def _of_known_labels(
    held_out: list[Example], labels: tuple[str, ...], file: str | Path, on_bad_row: BadRow
) -> tuple[list[Example], list[str]]:
    """The held-out rows with a label that is taught, and a sentence for each other row, where those are left out."""
    refused = untaught(held_out, labels, file)
    if refused and (on_bad_row is BadRow.ERROR or len(refused) == len(held_out)):
        refused[0].hint = "teach it, correct it, or leave such rows out with dataset.on_bad_row: drop"
        raise refused[0]
    return [e for e in held_out if e.label in set(labels)], [error.sentence for error in refused]
