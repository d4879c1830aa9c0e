"""The rows of a data file, unchanged: jsonl, json, csv or parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.errors import DataError
from loractl.common.job.sections import DATA_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as the file has it; `number` is its line in jsonl, else its place, from 1."""

    number: int
    value: Mapping[str, Any]


def read_rows(path: Path) -> list[RawRow]:
    """Read a jsonl, json, csv or parquet file. Raises DataError with the row that can't be read."""
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise DataError(path, f"has none of the endings {', '.join(DATA_SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(path, "no such file", hint="dataset.path is relative to the job file") from None
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise DataError(path, what, hint="convert it with iconv -t utf-8", kind="not UTF-8") from None
    except OSError as error:
        raise DataError(path, f"can't be read: {error.strerror}") from None
    rows = {".jsonl": _parse_jsonl, ".json": _parse_json, ".csv": _parse_csv}[suffix](path, text)
    if not rows:
        raise DataError(path, "has no rows", kind="too few rows")
    return rows


def _parse_jsonl(path: Path, text: str) -> list[RawRow]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would split a row at U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
            where = f" (column {error.colno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
            hint = (
                "a .jsonl file has one object a line; name it .json if it is one array"
                if line.strip() in ("[", "{")
                else None
            )
            raise DataError(path, f"is not valid JSON{where}", row=number, hint=hint, kind="broken JSON") from None
        rows.append(_row(path, number, value))
    return rows


def _parse_json(path: Path, text: str) -> list[RawRow]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4300 digits
        where = f" (line {error.lineno}: {error.msg.lower()})" if isinstance(error, json.JSONDecodeError) else ""
        hint = "one object a line? name it .jsonl"
        raise DataError(path, f"is not valid JSON{where}", hint=hint, kind="broken JSON") from None
    if not isinstance(value, list):
        raise DataError(path, "is not an array of objects", hint="one object a line? name it .jsonl")
    return [_row(path, number, item) for number, item in enumerate(value, start=1)]


def _parse_csv(path: Path, text: str) -> list[RawRow]:
    reader = csv.DictReader(io.StringIO(text, newline="\n"), strict=True)
    rows = []
    try:
        for number, value in enumerate(reader, start=1):
            if None in value or None in value.values():
                raise DataError(
                    path,
                    f"does not have the {len(reader.fieldnames or ())} fields of the header",
                    row=number,
                    kind="broken CSV",
                )
            rows.append(RawRow(number=number, value=value))
    except csv.Error as error:
        raise DataError(path, f"is not valid CSV: {error}", row=len(rows) + 1, kind="broken CSV") from None
    return rows


def _read_parquet(path: Path) -> list[RawRow]:
    try:
        import pyarrow.parquet as parquet  # comes with datasets
    except ImportError:
        raise DataError(path, "parquet needs the training stack here", hint="pip install 'loractl[worker]'") from None
    if not path.exists():
        raise DataError(path, "no such file", hint="dataset.path is relative to the job file")
    import pyarrow

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not valid parquet: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise DataError(path, "has no rows", kind="too few rows")
    return [RawRow(number=n, value=value) for n, value in enumerate(table.to_pylist(), start=1)]


def _row(path: Path, number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(path, f"is {kind_of(value)}, not an object with columns", row=number)
    return RawRow(number=number, value=value)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)
