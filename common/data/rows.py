"""The rows of a data file, unchanged: jsonl, json, csv or parquet."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loractl.common.errors import DataError
from loractl.common.job.sections import DATA_SUFFIXES


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row as the file has it; `number` is its line in jsonl, else its place, from 1."""

    number: int
    value: Mapping[str, Any]


def column_names(row: Mapping[str, Any]) -> str:
    """A row's columns for people; those that would not be seen as they are, like "Frage ", in quotes."""
    names = (name if name and name == name.strip() else json.dumps(name, ensure_ascii=False) for name in row)
    return ", ".join(names) or "nothing"


_RELATIVE = "a path in a job file is relative to the job file"

_A_LINE_EACH = "one object a line? name it .jsonl"

Told = Callable[[int, int], None]
"""Called while a file is read: bytes read, bytes of the file."""


class DataFile:
    """A jsonl, json, csv or parquet file. Its rows are read anew each time, one after the other.

    Only a .json array is in memory as a whole. Reading raises DataError with the row that can't be read.
    """

    def __init__(self, path: Path, told: Told | None = None) -> None:
        self._path = path
        self._told = told

    def __iter__(self) -> Iterator[RawRow]:
        rows = iter(self._rows())
        try:
            first = next(rows, None)
            if first is None:
                raise DataError(self._path, "has no rows", kind="too few rows")
            yield first
            yield from rows
        except FileNotFoundError:
            raise DataError(self._path, "no such file", hint=_RELATIVE) from None
        except UnicodeDecodeError:
            what = f"is not UTF-8 (byte {_bad_byte(self._path)})"
            raise DataError(self._path, what, hint="convert it with iconv -t utf-8", kind="not UTF-8") from None
        except OSError as error:
            raise DataError(self._path, f"can't be read: {error.strerror}") from None

    def _rows(self) -> Iterator[RawRow]:
        path, suffix = self._path, self._path.suffix.lower()
        if suffix not in DATA_SUFFIXES:
            raise DataError(path, f"has none of the endings {', '.join(DATA_SUFFIXES)}", hint=_way_for(path, suffix))
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix == ".json":
            yield from _parse_json(path, path.read_text(encoding="utf-8-sig"))
        else:
            with path.open(encoding="utf-8-sig") as file:
                yield from (
                    _parse_jsonl(path, self._lines(file)) if suffix == ".jsonl" else _parse_csv(path, self._lines(file))
                )

    def _lines(self, file: IO[str]) -> Iterator[str]:
        size = os.fstat(file.fileno()).st_size
        for number, line in enumerate(file):
            if self._told is not None and number % 1000 == 0:
                self._told(os.lseek(file.fileno(), 0, os.SEEK_CUR), size)
            yield line


def read_rows(path: Path) -> list[RawRow]:
    """All rows of a jsonl, json, csv or parquet file. Raises DataError with the row that can't be read."""
    return list(DataFile(path))


def _bad_byte(path: Path) -> int:
    """The place of the first byte that is not UTF-8."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            block = file.read(2**20)
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return before - kept + error.start
            before += len(block)


def _parse_jsonl(path: Path, lines: Iterable[str]) -> Iterator[RawRow]:
    for number, line in enumerate(lines, start=1):  # splitlines() would split a row at U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip("\n"))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
            where = f" (column {error.colno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
            hint = (
                "a .jsonl file has one object a line; name it .json if it is one array"
                if line.strip() in ("[", "{")
                else None
            )
            raise DataError(path, f"is not valid JSON{where}", row=number, hint=hint, kind="broken JSON") from None
        yield _row(path, number, value)


def _parse_json(path: Path, text: str) -> list[RawRow]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
        where = f" (line {error.lineno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(path, f"is not valid JSON{where}", hint=_A_LINE_EACH, kind="broken JSON") from None
    if not isinstance(value, list):
        inside = [key for key, rows in value.items() if isinstance(rows, list)] if isinstance(value, dict) else []
        hint = f"its rows are in {inside[0]!r}: write that array alone" if inside else _A_LINE_EACH
        raise DataError(path, "is not an array of objects", hint=hint)
    return [_row(path, number, item) for number, item in enumerate(value, start=1)]


def _parse_csv(path: Path, lines: Iterable[str]) -> Iterator[RawRow]:
    reader = csv.DictReader(lines, strict=True)
    number = 0
    try:
        if (only := reader.fieldnames) and len(only) == 1 and (marks := [mark for mark in ";\t|" if mark in only[0]]):
            hint = "write commas between the columns, and quote a value that holds one"
            raise DataError(path, f"has one column, divided by {marks[0]!r}", hint=hint, kind="broken CSV")
        for number, value in enumerate(reader, start=1):
            if None in value or None in value.values():
                raise DataError(
                    path,
                    f"does not have the {len(reader.fieldnames or ())} fields of the header",
                    row=number,
                    kind="broken CSV",
                )
            yield RawRow(number=number, value=value)
    except csv.Error as error:
        raise DataError(path, f"is not valid CSV: {error}", row=number + 1, kind="broken CSV") from None


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        import pyarrow.parquet as parquet  # comes with datasets
    except ImportError:
        raise DataError(path, "parquet needs the training stack here", hint="pip install 'loractl[worker]'") from None
    if not path.exists():
        raise DataError(path, "no such file", hint=_RELATIVE)
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            values = (value for batch in file.iter_batches(batch_size=1000) for value in batch.to_pylist())
            for number, value in enumerate(values, start=1):
                yield RawRow(number=number, value=value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not valid parquet: {str(error).splitlines()[0]}") from None


def _row(path: Path, number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(path, f"is {kind_of(value)}, not an object with columns", row=number)
    return RawRow(number=number, value=value)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)


def _way_for(path: Path, suffix: str) -> str:
    """What to do about a file that no reader here takes."""
    if path.is_dir():
        return "it is a folder: name one file in it"
    if suffix in (".gz", ".zip", ".zst", ".bz2", ".xz"):
        return "it is packed: unpack it first"
    return 'write one JSON object a line, like {"text": "..."}, and name it .jsonl'
