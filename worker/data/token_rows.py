"""Tokenised rows: in columns, which take little memory and are in files that another process maps, and as the tensors
of a batch.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from .tokens import IGNORED, TokenRow

if TYPE_CHECKING:
    import torch


def inputs_of(row: TokenRow) -> dict[str, list[int]]:
    """A row as a data set's item, for `collate`."""
    if row.label is not None:
        return {"input_ids": row.input_ids, "label": [row.label]}
    return {"input_ids": row.input_ids, "labels": row.labels, "starts": list(row.starts)}


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors of shape (rows, longest row): input_ids, labels and attention_mask; for packed rows
    position_ids instead of the mask, restarting with every example and with the padding. A classifier's labels have the
    shape (rows,)."""
    import torch  # a process that only prepares or checks rows needs none

    longest = max(len(r["input_ids"]) for r in rows)

    def padded(values: Callable[[dict[str, list[int]]], list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([(v := values(r)) + [fill] * (longest - len(v)) for r in rows])

    mask = padded(lambda r: [1] * len(r["input_ids"]), 0)
    if "label" in rows[0]:
        labels = torch.tensor([r["label"][0] for r in rows])
        return {"input_ids": padded(lambda r: r["input_ids"], pad), "labels": labels, "attention_mask": mask}
    batch = {"input_ids": padded(lambda r: r["input_ids"], pad), "labels": padded(lambda r: r["labels"], IGNORED)}
    if any(r.get("starts") for r in rows):
        return batch | {"position_ids": torch.tensor([_positions(r, longest) for r in rows])}
    return batch | {"attention_mask": mask}


def _positions(row: dict[str, list[int]], longest: int) -> list[int]:
    borders = sorted({0, *row.get("starts", ()), len(row["input_ids"]), longest})
    return [place for begin, end in itertools.pairwise(borders) for place in range(end - begin)]


Column = npt.NDArray[Any]

_END = ".npy"


class TokenRows(Sequence[TokenRow]):
    """Rows in order. Each is built when it is asked for.

    Columns: `number` and `end` (the index after its last token) have a value for each row, `input_ids` and `labels` one
    for each token. `start` has a value for each further example of packed rows, `start_end`, a classifier's `label` and
    a pair's `asked` one for each row; these are missing if no row has any.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = columns

    @classmethod
    def of(cls, rows: Iterable[TokenRow]) -> TokenRows:
        """The columns of these rows, which are read once."""
        number, end, ids, labels = array("q"), array("q"), array("i"), array("i")
        start, start_end, label, asked = array("q"), array("q"), array("q"), array("q")
        for row in rows:
            number.append(row.number)
            ids.extend(row.input_ids)
            labels.extend(row.labels)
            end.append(len(ids))
            start.extend(row.starts)
            start_end.append(len(start))
            asked.append(row.asked)
            if row.label is not None:
                label.append(row.label)
        columns = {"number": number, "end": end, "input_ids": ids, "labels": labels}
        columns |= {"start": start, "start_end": start_end} if start else {}
        columns |= {"label": label} if label else {}
        columns |= {"asked": asked} if any(asked) else {}
        return cls({name: np.asarray(column) for name, column in columns.items()})

    @classmethod
    def load(cls, folder: Path) -> TokenRows:
        """Map the rows saved there. Raises OSError, ValueError, EOFError for incomplete files."""
        columns = {path.stem: np.load(path, "r", allow_pickle=False) for path in cls.files(folder)}
        if not columns:
            raise FileNotFoundError(f"no rows lie in {folder}")
        return cls(columns)

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """The files of the rows saved there."""
        return list(folder.glob(f"*{_END}"))

    def save(self, folder: Path) -> None:
        """Write the columns into this folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, column in self._columns.items():
            with (folder / f"{name}{_END}").open("wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(column))
                file.write(np.ascontiguousarray(column).data)  # np.save would not say that the disk is full

    def labelled(self, labels: Sequence[int]) -> TokenRows:
        """The rows with these labels, in order."""
        return TokenRows({**self._columns, "label": np.array(labels, dtype=np.int64)})

    @property
    def numbers(self) -> list[int]:
        return self._list("number")

    @property
    def examples(self) -> int:
        """The number of examples: a conversation may have several rows."""
        return len(self._firsts())

    def first(self, examples: int | None) -> list[TokenRow]:
        """The rows of the first examples; None: of all."""
        firsts = self._firsts()
        return self[: None if examples is None or examples >= len(firsts) else int(firsts[examples])]

    def by_example(self) -> Iterator[list[TokenRow]]:
        """The rows of each example together."""
        firsts = [*self._firsts().tolist(), len(self)]
        return (self[begin:end] for begin, end in itertools.pairwise(firsts))

    def _firsts(self) -> Column:
        """The index of each example's first row."""
        number = self._columns["number"]
        return np.flatnonzero(np.diff(number, prepend=number[:1] - 1))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = np.diff(self._columns["end"], prepend=0).tolist()
        return lengths

    @property
    def texts(self) -> list[int]:
        """Tokens of the longer text of each row; a pair's row has two texts."""
        lengths = np.diff(self._columns["end"], prepend=0)
        longer: list[int] = np.maximum(self._columns["start"], lengths - self._columns["start"]).tolist()
        return longer

    @property
    def class_labels(self) -> list[int]:
        """A classifier's label of each row; empty for other rows."""
        return self._list("label") if "label" in self._columns else []

    @property
    def tokens(self) -> int:
        return len(self._columns["input_ids"])

    def count_labels(self, other_than: int) -> int:
        """Tokens whose label differs from them."""
        return int(np.count_nonzero(self._columns["labels"] != other_than))

    def __len__(self) -> int:
        return len(self._columns["number"])

    def __iter__(self) -> Iterator[TokenRow]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenRows):
            return NotImplemented
        mine, theirs = self._columns, other._columns
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # equal by what they hold, like a list

    @overload
    def __getitem__(self, place: int) -> TokenRow: ...

    @overload
    def __getitem__(self, place: slice) -> list[TokenRow]: ...

    def __getitem__(self, place: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(place, slice):
            return [self._at(one) for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._at(place % len(self))

    def _at(self, place: int) -> TokenRow:
        columns, tokens = self._columns, self._span("end", place)
        return TokenRow(
            number=int(columns["number"][place]),
            input_ids=columns["input_ids"][tokens].tolist(),
            labels=columns["labels"][tokens].tolist(),
            starts=tuple(columns["start"][self._span("start_end", place)].tolist()) if "start" in columns else (),
            label=int(columns["label"][place]) if "label" in columns else None,
            asked=int(columns["asked"][place]) if "asked" in columns else 0,
        )

    def _span(self, ends: str, place: int) -> slice:
        end = self._columns[ends]
        return slice(int(end[place - 1]) if place else 0, int(end[place]))

    def _list(self, name: str) -> list[int]:
        values: list[int] = self._columns[name].tolist()
        return values


def lengths_in(rows: Sequence[TokenRow]) -> list[int]:
    """Tokens of each row, without building rows that are in columns."""
    return rows.lengths if isinstance(rows, TokenRows) else [len(row.input_ids) for row in rows]
