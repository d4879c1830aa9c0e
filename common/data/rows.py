"""The rows of a data file, unchanged: jsonl, json, csv or parquet."""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loractl.common.errors import DataError
from loractl.common.job.sections import DATA_SUFFIXES
from loractl.common.job.slices import Slice, parse_split
from loractl.common.settings import load_settings
from loractl.common.text import slip_of
from loractl.common.units import amount


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row as the file has it; `number` is its line in jsonl, else its place, from 1."""

    number: int
    value: Mapping[str, Any]


def column_names(row: Mapping[str, Any]) -> str:
    """A row's columns for people; names that would look different in print, like "Frage ", are in quotes."""
    names = (name if name and name == name.strip() else json.dumps(name, ensure_ascii=False) for name in row)
    return ", ".join(names) or "nothing"


_RELATIVE = "a path in a job file is relative to the job file"

_A_LINE_EACH = "one object a line? name it .jsonl"
_NO_ARRAY = "a .jsonl file has one object a line; name it .json if it is one array"
_KEEP_ONE = "rename or remove one of them"


def _hint_of_missing(path: Path) -> str:
    """What a path without a file was probably meant to be."""
    if "\\" in str(path):
        return "write / between folders, as in data/rows.jsonl; a drive of Windows is not on this machine"
    if "$" in str(path):
        return "variables are not replaced: write the path itself, or one from the job file's folder"
    beside: dict[str, Path] = {}
    with contextlib.suppress(OSError):
        beside = {file.stem: file for file in path.parent.iterdir() if file.suffix.lower() in DATA_SUFFIXES}
    close = slip_of(path.stem, beside)
    return f"did you mean {beside[close]}? {_RELATIVE}" if close else _RELATIVE


Told = Callable[[int, int], None]
"""Called while a file is read: bytes read, bytes of the file."""


class DataFile:
    """A jsonl, json, csv or parquet file. Its rows are read again each time, one after the other.

    Only a .json array is in memory as a whole. Reading raises DataError for a row that can't be read, or that is longer
    than this machine's settings allow.
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
            raise DataError(self._path, "no such file", hint=_hint_of_missing(self._path)) from None
        except UnicodeDecodeError:
            what = f"is not UTF-8 (byte {_bad_byte(self._path)})"
            raise DataError(self._path, what, hint=_way_to_utf8(self._path), kind="not UTF-8") from None
        except OSError as error:
            raise DataError(self._path, f"can't be read: {error.strerror}") from None

    def _rows(self) -> Iterator[RawRow]:
        path, suffix = self._path, self._path.suffix.lower()
        size, settings = size_of_rows(path), load_settings()
        if suffix == ".parquet":
            yield from _read_parquet(path, settings.max_row, settings.max_data)
        elif suffix == ".json":
            if size > settings.max_data:
                what = f"has {amount(size)}, a .json file at most {amount(settings.max_data)}"
                hint = f"a .jsonl file is read row by row; {_MORE_DATA}"
                raise DataError(path, what, hint=hint)
            yield from _parse_json(path, path.read_text(encoding="utf-8-sig"))
        else:
            with path.open(encoding="utf-8-sig") as file:
                lines = self._lines(file, size, settings.max_row)
                yield from _parse_jsonl(path, lines) if suffix == ".jsonl" else _parse_csv(path, lines)

    def _lines(self, file: IO[str], size: int, longest: int) -> Iterator[str]:
        for number, line in enumerate(iter(lambda: file.readline(longest + 1), "")):
            if len(line) > longest:
                raise _too_long(self._path, longest, f"line {number + 1} ")
            if self._told is not None and number % 1000 == 0:
                self._told(os.lseek(file.fileno(), 0, os.SEEK_CUR), size)
            yield line


def open_rows(path: Path, split: str, told: Told | None = None) -> Iterable[RawRow]:
    """The rows of a file that `split` names (see `parse_split`); they can be read again. Raises DataError."""
    parts = parse_split(split)
    if other := next((part.name for part in parts if part.name != "train"), None):
        what = f"is a file, whose only split is train, and {split} names {other}"
        raise DataError(path, what, hint="a data set on the hub may have others", kind="too few rows")
    rows = DataFile(path, told)
    return rows if split == "train" else _SlicedFile(path, split, parts, rows)


class _SlicedFile:
    """The rows of a file that a split names, in the order of its parts; each keeps its number in the file."""

    def __init__(self, path: Path, split: str, parts: Sequence[Slice], rows: DataFile) -> None:
        self._path, self._split, self._parts, self._rows = path, split, parts, rows

    def __iter__(self) -> Iterator[RawRow]:
        wanted = [part.places(self._count) for part in self._parts]
        if not any(wanted):
            what = f"has {self._count} row{'s' * (self._count != 1)}, and {self._split} names none of them"
            raise DataError(self._path, what, hint="select other rows", kind="too few rows")
        if any(max(a.start, b.start) < min(a.stop, b.stop) for a, b in itertools.combinations(wanted, 2)):
            what = f"is read twice in part: the parts of {self._split} overlap"
            raise DataError(self._path, what, hint="let each part end where the next begins", kind="too few rows")
        for places in wanted:
            for place, row in enumerate(itertools.islice(self._rows, places.stop)):
                if place in places:
                    yield row

    @functools.cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._rows)


def read_rows(path: Path) -> list[RawRow]:
    """All rows of a jsonl, json, csv or parquet file. Raises DataError for a row that can't be read."""
    return list(DataFile(path))


_MORE_DATA = "LORACTL_MAX_DATA=... allows more, here and on the workers"


def size_of_rows(path: Path) -> int:
    """The bytes of a file that can be read here. Reading a pipe would wait, and a device would never end.

    Raises DataError, OSError.
    """
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise DataError(path, f"has none of the endings {', '.join(DATA_SUFFIXES)}", hint=_way_for(path, suffix))
    facts = path.stat()
    if stat.S_ISDIR(facts.st_mode):
        raise DataError(path, "is a folder", hint="name one file in it")
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(path, "is not a regular file", hint="write the rows into a file")
    return facts.st_size


def _too_long(path: Path, longest: int, where: str = "", row: int | None = None) -> DataError:
    hint = "a row is one example, on a separate line; " if where else ""
    hint += "for longer rows: LORACTL_MAX_ROW=64MiB"
    return DataError(path, f"{where}has more than {amount(longest)}, the most of a row", row=row, hint=hint)


def _way_to_utf8(path: Path) -> str:
    """What to do about a file that is not UTF-8. Without -f, iconv takes it for what the terminal has, UTF-8."""
    with path.open("rb") as file:
        begin = file.read(2)
    if begin == b"\x1f\x8b":
        return "it is packed with gzip: unpack it first"
    others = "utf-16" if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
    return f"convert it: iconv -f {others} -t utf-8"


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


def _loads(path: Path, text: str, row: int | None = None) -> Any:
    """The value that `text` holds; refuses an object that names a key twice, of which `json` keeps the last alone."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
            what = f"has an object with two keys {json.dumps(twice, ensure_ascii=False)}"
            raise DataError(path, what, row=row, hint=_KEEP_ONE, kind="broken JSON")
        return value

    return json.loads(text, object_pairs_hook=unique)


def _parse_jsonl(path: Path, lines: Iterable[str]) -> Iterator[RawRow]:
    for number, line in enumerate(lines, start=1):  # splitlines() would split a row at U+2028
        if not line.strip():
            continue
        try:
            value = _loads(path, line.rstrip("\n"), number)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
            where = f" (column {error.colno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
            hint = _slip_in(line.strip())
            raise DataError(path, f"is not valid JSON{where}", row=number, hint=hint, kind="broken JSON") from None
        yield _row(path, number, value)


def _slip_in(line: str) -> str | None:
    """What a line probably is in place of JSON."""
    if line.startswith("[") or line == "{":
        return _NO_ARRAY
    if not line.startswith("{"):
        return "a .jsonl file has one object a line; name it .csv if it is a table with commas"
    if line.startswith("{'"):
        return "JSON has double quotes, as json.dumps writes them"
    if line.endswith(","):
        return "a line ends without a comma"
    return 'write straight quotes, "' if "\N{LEFT DOUBLE QUOTATION MARK}" in line else None


def _parse_json(path: Path, text: str) -> list[RawRow]:
    try:
        value = _loads(path, text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
        where = f" (line {error.lineno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(path, f"is not valid JSON{where}", hint=_A_LINE_EACH, kind="broken JSON") from None
    if not isinstance(value, list):
        inside = [key for key, rows in value.items() if isinstance(rows, list)] if isinstance(value, dict) else []
        rows = "train" if "train" in inside else max(inside, key=lambda key: len(value[key]), default=None)
        hint = f"its rows are in {rows!r}: write that array alone" if rows else _A_LINE_EACH
        raise DataError(path, "is not an array of objects", hint=hint)
    return [_row(path, number, item) for number, item in enumerate(value, start=1)]


def _parse_csv(path: Path, lines: Iterable[str]) -> Iterator[RawRow]:
    reader = csv.DictReader(lines, strict=True)
    number = 0
    try:
        if (only := reader.fieldnames) and len(only) == 1 and (marks := [mark for mark in ";\t|" if mark in only[0]]):
            hint = "write commas between the columns, and quote a value that holds one"
            raise DataError(path, f"has one column, divided by {marks[0]!r}", hint=hint, kind="broken CSV")
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            what = f"has two columns named {column_names({twice: None})}"
            raise DataError(path, what, hint=_KEEP_ONE, kind="broken CSV")
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


BATCH = 100
"""Rows of a parquet file that are unpacked at once."""


def _read_parquet(path: Path, longest: int, most: int) -> Iterator[RawRow]:
    """`longest`: bytes of a row; `most`: of all rows; a file of a megabyte may unpack to gigabytes."""
    try:
        import pyarrow.parquet as parquet  # comes with datasets
    except ImportError:
        raise DataError(path, "parquet needs the training stack here", hint="pip install 'loractl[worker]'") from None
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            read = unpacked = 0
            for batch in file.iter_batches(batch_size=BATCH):
                if (unpacked := unpacked + batch.nbytes) > most:
                    raise DataError(path, f"unpacks to more than {amount(most)}", hint=_MORE_DATA)
                if batch.nbytes > longest and (place := _long_row(batch, longest)) is not None:
                    raise _too_long(path, longest, row=read + place + 1)
                for place, value in enumerate(batch.to_pylist(), start=1):
                    yield RawRow(number=read + place, value=value)
                read += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not valid parquet: {str(error).splitlines()[0]}") from None


def _long_row(batch: Any, longest: int) -> int | None:
    """The place of the first row of a parquet batch that has more bytes than this."""
    return next((place for place in range(batch.num_rows) if batch.slice(place, 1).nbytes > longest), None)


def _row(path: Path, number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        hint = _NO_ARRAY if isinstance(value, list) and path.suffix.lower() == ".jsonl" else None
        raise DataError(path, f"is {kind_of(value)}, not an object with columns", row=number, hint=hint)
    return RawRow(number=number, value=value)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)


def _way_for(path: Path, suffix: str) -> str:
    """What to do about a file that no reader here accepts."""
    if path.is_dir():
        return "it is a folder: name one file in it"
    if suffix in (".gz", ".zip", ".zst", ".bz2", ".xz"):
        return "it is packed: unpack it first"
    return 'write one JSON object a line, like {"text": "..."}, and name it .jsonl'
