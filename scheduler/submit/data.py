"""A job's local data sets: checked as a trainer checks them, stored for every box, fetched for a repetition."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.data.findings import Finding
from loractl.common.data.rows import RawRow
from loractl.common.errors import ArtifactError, DataError
from loractl.common.job.spec import JobSpec, data_set_key
from loractl.common.progress import Report


def check_data(spec: JobSpec, report: Report = lambda what, done, total: None) -> list[Finding]:
    """Refuse local data that the trainer would refuse, as far as possible without a tokenizer, and say what looks
    wrong.

    `report` gets the progress. Raises DataError. Empty for data from the hub, and for parquet without pyarrow: the
    trainer checks them.
    """
    from loractl.common.data.fields import Reading
    from loractl.common.data.findings import about_fields, about_measures, about_warmup
    from loractl.common.data.formats import check_taught, detect_format, parse_examples
    from loractl.common.data.inspection import Leaks, check_examples
    from loractl.common.data.rows import open_rows
    from loractl.common.data.split import about_sources, gather, split_data

    _refuse_unknown_names(spec)
    dataset, sources = spec.dataset, spec.dataset.sources
    read, looked = functools.partial(report, "Reading the data"), functools.partial(report, "Looking at the rows")

    def rows_of(text: str | None, split: str) -> Iterable[RawRow] | None:
        here = text is not None and is_local(text) and not unreadable_here(text)
        return open_rows(Path(text), split, read) if text is not None and here else None

    trained = [rows_of(source.path, source.split) for source in sources]
    held_out = rows_of(dataset.eval_path, dataset.eval_split or "train")
    other = spec.evaluation.regression
    if other is not None and (rows := rows_of(other, "train")) is not None:
        format, reading = detect_format(rows, other)[0], Reading.of(dataset)
        parse_examples(rows, format, other, dataset.on_bad_row, reading=reading)
    readable = [rows for rows in trained if rows is not None]
    if len(readable) < len(sources):
        for file in (*readable, *([] if held_out is None else [held_out])):
            collections.deque(file, maxlen=0)  # only whether it can be read: its purpose is unknown here
        return about_warmup(spec.training, None)
    if dataset.eval_path is not None and held_out is None:  # the held-out rows can't be read here
        reading = Reading.of(dataset)
        gathered = gather(dataset, readable, reading)
        check_taught(gathered.examples, dataset.path)
        findings = about_sources(gathered.portions, ()) + check_examples(gathered.examples, [], told=looked)
        findings += about_fields(tuple(reading.unused))
        return findings + about_warmup(spec.training, len(gathered.examples))
    last = rows_of(dataset.final_path, "train")
    split = split_data(dataset, readable[0], held_out, readable[1:], final_rows=last)
    findings = split.about_sources(dataset)
    findings += check_examples(split.train, split.held_out, split, looked, final=Leaks.of_final(split.final))
    findings += about_measures(spec.evaluation, split.held_out)
    return findings + about_fields(split.unused) + about_warmup(spec.training, len(split.train))


def store_data(
    spec: JobSpec, artifacts: ArtifactStore, known: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Upload the local data sets, so that a worker on another box has them. `known`: those already stored."""
    stored: dict[str, Any] = {}
    for key, text in spec.data_sets().items():
        if key in known:
            stored[key] = known[key]
        elif is_local(text):
            uri, digest = artifacts.put_dataset(Path(text))
            stored[key] = {"uri": uri, "sha256": digest, **_counted(Path(text))}
    return stored


def counted_data(spec: JobSpec) -> dict[str, Any]:
    """What is known of the local data sets without storing them; a file that can't be read is left out."""
    counted = {}
    for key, text in spec.data_sets().items():
        with contextlib.suppress(DataError):
            counted.update({key: _counted(Path(text))} if Path(text).is_file() else {})
    return counted


BYTES_A_TOKEN = 4
"""Of a row's texts."""

PARSED = 500
"""Rows of a file of lines whose texts are looked at: the others have as large a share of their bytes."""


def _counted(file: Path) -> dict[str, int]:
    """The rows and bytes of a file, and an estimate of its tokens without a tokenizer: how long a job takes is
    predicted by them."""
    from loractl.common.data.rows import open_rows

    if unreadable_here(str(file)):
        return {}
    if file.suffix.lower() != ".jsonl":
        texts = [_text_size(row.value) for row in open_rows(file, "train")]
        return {"rows": len(texts), "bytes": file.stat().st_size, "tokens": sum(texts) // BYTES_A_TOKEN}
    with file.open("rb") as lines:
        rows = size = 0
        for line in lines:
            if line.strip():
                rows, size = rows + 1, size + len(line)
    every = max(1, rows // PARSED)
    parsed = seen = 0
    with file.open("rb") as lines:
        for line in itertools.islice(lines, 0, None, every):
            if line.strip():
                parsed, seen = parsed + _line_size(line), seen + len(line)
    return {"rows": rows, "bytes": size, "tokens": round(parsed / max(1, seen) * size / BYTES_A_TOKEN)}


def _line_size(line: bytes) -> int:
    """Of a row that is no JSON by itself, like all rows of a file whose lines end in CR alone, its bytes."""
    try:
        return _text_size(json.loads(line))
    except (ValueError, RecursionError):
        return len(line)


def _text_size(value: Any) -> int:
    """Bytes of all texts in a row, without the names of its columns."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_text_size, parts))


@contextlib.contextmanager
def data_at_hand(job_id: int, data: Mapping[str, Any], artifacts: ArtifactStore) -> Iterator[list[Path]]:
    """A job's data sets as submitted, in a temporary folder.

    Raises ArtifactError if one is gone, ServiceUnreachable.
    """
    with tempfile.TemporaryDirectory(prefix="loractl-") as folder:
        yield [_fetched(job_id, key, stored, artifacts, Path(folder)) for key, stored in data.items()]


def is_local(text: str) -> bool:
    """Whether a job's data set is a file. load_spec has made every local path absolute; the rest are hub ids."""
    return Path(text).is_absolute()


def _refuse_unknown_names(spec: JobSpec) -> None:
    """Raises DataError for text that is neither a file nor a possible name on the hub."""
    from loractl.common.job.names import is_hub_data

    for text in spec.data_sets().values():
        if not is_local(text) and not is_hub_data(text):
            hint = "name a file (jsonl, json, csv, parquet) next to the job file, or a hub id like owner/name"
            if "://" in text:
                hint = "copy it next to the job file and name that file, or name a data set of the hub like owner/name"
            elif text[0] in "\N{LEFT DOUBLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}":
                hint = "write straight quotes, or none"
            raise DataError(text, "is neither a file here nor a data set on the hub", hint=hint)


def unreadable_here(text: str) -> bool:
    """Parquet needs pyarrow, which the light client does not have: the trainer checks it."""
    return text.lower().endswith(".parquet") and importlib.util.find_spec("pyarrow") is None and Path(text).is_file()


def _fetched(job_id: int, key: str, stored: Mapping[str, Any], artifacts: ArtifactStore, folder: Path) -> Path:
    try:
        return artifacts.fetch_dataset(stored["uri"], stored["sha256"], folder)
    except ArtifactError as error:
        raise ArtifactError(
            f"job {job_id} can't run again on the same data: {data_set_key(key)} (sha256 {stored['sha256'][:12]}) "
            f"can't be fetched from the artifact store: {error.sentence}",
            "loractl gc removes what no job needs; put the file back by submitting a job file that names it",
        ) from error
