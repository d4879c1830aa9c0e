"""Which rows of a data set are read: its split, or slices of splits, in the syntax of the datasets library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HINT = "like train, train[:1000], train[10%:20%], train[-5%:], or such parts joined by +"


_PART = re.compile(
    r"(?P<name>\w+(\.\w+)*)(\[((?P<first>-?\d{1,12})(?P<first_percent>%)?)?"
    r":((?P<end>-?\d{1,12})(?P<end_percent>%)?)?\])?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Neighbouring rows of one split: bounds as Python's slices have them, in rows or in percent of all rows."""

    name: str
    bounds: tuple[int | None, int | None]
    percent: bool

    def places(self, rows: int) -> range:
        """Their places in `rows` rows. Rounded as datasets does (`_pct_to_abs_closest` in its arrow_reader)."""
        # the product first: 75 * (14 / 100) is more than 10.5, which rounds to another row
        first, end = (
            round(bound * rows / 100) if self.percent and bound is not None else bound for bound in self.bounds
        )
        return range(*slice(first, end).indices(rows))


def parse_split(text: str) -> tuple[Slice, ...]:
    """The parts of a split. Raises ValueError with what is wrong."""
    return tuple(_part(part) for part in re.split(r"\s*\+\s*", text.strip()))


def rows_in(text: str, rows: int) -> int:
    """How many of a data set's rows a split names, if all of its parts are of the one split that has these rows."""
    return sum(len(part.places(rows)) for part in parse_split(text))


def held_out_split(path: str, asked: str | None = None) -> str:
    """The split that held-out rows are read from; of a file, which is an absolute path, all of it."""
    return asked or ("train" if Path(path).is_absolute() else "test")


def _part(text: str) -> Slice:
    found = _PART.fullmatch(text)
    if found is None:
        raise ValueError("is not a split of a data set")
    first, end = (None if found[name] is None else int(found[name]) for name in ("first", "end"))
    percents = {found[f"{name}_percent"] is not None for name in ("first", "end") if found[name] is not None}
    if len(percents) == 2:
        raise ValueError("has one bound in rows and one in percent")
    if True in percents and max(abs(first or 0), abs(end or 0)) > 100:
        raise ValueError("has a bound beyond 100 %")
    return Slice(name=found["name"], bounds=(first, end), percent=True in percents)
