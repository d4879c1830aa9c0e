"""The labels of a classification data set: which ones its rows teach, and rows that no classifier can learn from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loractl.common.errors import DataError

from .examples import Example

LONGEST = 256
"""Characters of a label; a longer one is a text in the wrong column."""


def label_name(value: Any) -> str:
    """A label, text or a whole number, as text with its spaces folded. Raises ValueError that says what else it is."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        kinds = {bool: "true or false", dict: "an object", list: "a list", type(None): "missing or null"}
        raise ValueError(kinds.get(type(value), repr(value)))
    name = " ".join(str(value).split())
    if not name:
        raise ValueError("empty")
    if len(name) > LONGEST:
        raise ValueError(f"a text of {len(name)} characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError("not Unicode text")
    return name


def labels_of(train: Sequence[Example]) -> tuple[str, ...]:
    """The labels that training rows teach, sorted: by size where all are whole numbers, else as text.

    A label's place is its number in the model's head. The same rows in another order give the same places.
    """
    if not train or train[0].label is None:  # other formats have no labels
        return ()
    names = {example.label for example in train if example.label is not None}
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_taught(train: Sequence[Example], file: str | Path) -> tuple[str, ...]:
    """The labels that are taught; none for rows without labels. Raises DataError if there is only one: a head that
    always says it is right."""
    labels = labels_of(train)
    if len(labels) == 1:
        what = f"every row to train on has the label {labels[0]!r}: there is nothing to learn"
        raise DataError(file, what, hint="a classifier needs rows of two labels or more", kind="one label only")
    return labels


def untaught(held_out: Sequence[Example], labels: Sequence[str], file: str | Path) -> list[DataError]:
    """A sentence for each held-out row whose label the head does not have."""
    known = set(labels)
    shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    return [
        DataError(
            file,
            f"has the label {e.label!r}, which no row to train on has ({shown})",
            row=e.number,
            kind="unknown label",
        )
        for e in held_out
        if e.label not in known
    ]
