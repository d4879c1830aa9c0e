"""No data file ends in anything but rows or an error for people."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loractl.common.data.formats import detect_format, parse_examples
from loractl.common.data.rows import read_rows
from loractl.common.data.split import split_held_out
from loractl.common.job.sections import BadRow, DataFormat

from .counting import answered, fuzz

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS: list[dict[str, Any]] = [
    {"messages": HI},
    {"instruction": "say hi", "input": "", "output": "hi"},
    {"prompt": "a", "completion": "b"},
    {"text": "some text"},
    {"text": "some text", "label": "some"},
    {"prompt": "a", "chosen": " b", "rejected": " c"},
    {"instruction": "a", "system": None, "chosen": "b", "rejected": "c"},
]
TALKED = {"chosen": HI, "rejected": [HI[0], {"role": "assistant", "content": "no"}]}
"""A pair whose columns hold another type than those of ROWS, so that no table has both."""

cells: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(["user", "assistant", "system", "tool", "\ud800", "\0", " ", "\u2028", "x" * 3000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "text", "", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip
columns = st.sampled_from(
    [
        "messages", "instruction", "input", "output", "prompt", "completion", "text", "label", "conversations",
        "system", "chosen", "rejected", "", "x",
    ]
)  # fmt: skip
rows = st.one_of(st.sampled_from([*ROWS, TALKED]), st.dictionaries(columns, cells, max_size=4))
tables = st.lists(st.one_of(rows, cells), max_size=5)
deep = st.builds(
    lambda opening, depth: opening * depth, st.sampled_from(["[", '{"a":']), st.sampled_from([9, 2000, 90_000])
)


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """A file with a few bytes cut out, replaced or put in."""
    content = draw(contents)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 12)))
        content = content[:start] + draw(st.binary(max_size=6)) + content[end:]
    return content


def _jsonl(table: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table).encode()


def _csv(table: list[Any]) -> bytes:
    out = io.StringIO()
    names = sorted({str(key) for row in table if isinstance(row, dict) for key in row})
    writer = csv.writer(out)
    writer.writerow(names)
    for row in table:
        writer.writerow([str(row.get(name, "")) for name in names] if isinstance(row, dict) else [str(row)])
    return out.getvalue().encode("utf-8", "replace")


def _parquet(table: list[Any]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(table or [{"text": "a"}]), out)
    return out.getvalue()


parquets = st.one_of(
    st.lists(st.sampled_from(ROWS), min_size=1, max_size=4).map(_parquet),
    st.sampled_from(
        [
            _parquet([{"text": b"\xff\xfe"}]),
            _parquet([{"messages": [1, 2]}]),
            _parquet([{"messages": [{"role": None, "content": None}]}]),
        ]
    ),
)
FILES = {
    ".jsonl": st.one_of(tables.map(_jsonl), deep.map(str.encode)),
    ".json": st.one_of(
        tables.map(json.dumps).map(str.encode), cells.map(json.dumps).map(str.encode), deep.map(str.encode)
    ),
    ".csv": tables.map(_csv),
    ".parquet": parquets,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("suffix", FILES)
def test_a_data_file_of_any_bytes(suffix: str, folder: Path) -> None:
    @fuzz
    @given(
        content=st.one_of(st.binary(max_size=300), damaged(FILES[suffix])),
        format=st.sampled_from(DataFormat),
        on_bad_row=st.sampled_from(BadRow),
    )
    @example(content=b"[" * 90_000, format=DataFormat.AUTO, on_bad_row=BadRow.ERROR)
    @example(content=b'{"text": ' + b"9" * 5000 + b"}\n", format=DataFormat.AUTO, on_bad_row=BadRow.ERROR)
    @example(content=b'{"text": "\\ud800"}\n{"text": "b"}\n', format=DataFormat.AUTO, on_bad_row=BadRow.ERROR)
    @example(content=b'text\n"' + b"x" * 200_000 + b'"\n', format=DataFormat.AUTO, on_bad_row=BadRow.ERROR)
    def any_bytes(content: bytes, format: DataFormat, on_bad_row: BadRow) -> None:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        answered(f"data {suffix}", lambda: _read(path, format, on_bad_row))

    any_bytes()


def _read(path: Path, wanted: DataFormat, on_bad_row: BadRow) -> None:
    """What submit and the trainer do with a file before there is a tokenizer."""
    found = read_rows(path)
    format, why = detect_format(found, path, wanted)
    assert why
    examples, dropped = parse_examples(found, format, path, on_bad_row)
    assert all(sentence for sentence in dropped)
    split_held_out(examples, 0.1, path)
