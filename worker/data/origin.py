"""Where a job's rows come from: a file on this box, or a data set on the hub."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loractl.common.artifacts import sha256_of
from loractl.common.data.rows import RawRow, Told, open_rows
from loractl.common.errors import DataError, LoractlError
from loractl.common.job.status import Reason
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.source import (
    Refusal,
    cached_if_away,
    chain_of,
    first_line,
    known_commit,
    reaching_the_hub,
    refusal,
)


def load_rows(path: str, split: str = "train", told: Told | None = None) -> Iterable[RawRow]:
    """The rows of a split of a local file, or of a data set on the hub; they can be read repeatedly.

    `told` gets how much of a file was read. Raises DataError and TrainingFailed, DataError also during reading.
    """
    return load_pinned(path, split, told)[0]


def load_pinned(path: str, split: str, told: Told | None = None) -> tuple[Iterable[RawRow], str | None]:
    """The rows, and their commit if they are from the hub. Raises what load_rows raises."""
    if Path(path).is_absolute():
        return open_rows(Path(path), split, told), None
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    name, _, revision = path.partition("@")
    try:
        with reaching_the_hub(), cached_if_away(name, revision or None) as away:
            builder = load_dataset_builder(name, revision=revision or None)
            for file in (file for part in (builder.config.data_files or {}).values() for file in part):
                if not str(file).startswith("hf://"):  # its card lists files of this box
                    what = f"the data set {path} names a file that is not on the hub: {file}"
                    raise TrainingFailed(Reason.BAD_SPEC, what)
            builder.download_and_prepare()
    except (OSError, ValueError, DatasetsError) as error:
        raise _refused(path, error) from None
    commit = str(builder.hash)
    if away and commit != known_commit(name, revision or None):
        what = f"for dataset.path {path}, and the newest in this worker's cache is another commit ({commit})"
        raise TrainingFailed(Reason.TRAINER_ERROR, f"{Refusal.AWAY} {what}")
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError as error:
        raise DataError(path, f"has no such split on the hub: {first_line(error)}") from error
    return _HubRows(dataset), commit


class _HubRows:
    """The rows of a data set from the hub, which is in a file of its library."""

    def __init__(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[RawRow]:
        return (RawRow(number=n, value=value) for n, value in enumerate(self._dataset, start=1))


def _refused(path: str, error: BaseException) -> LoractlError:
    """The meaning of a failed read from the hub. Raises OSError for a full disk, which is not the data's fault."""
    for each in chain_of(error):
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            raise each
    answer = refusal(error)
    if answer is Refusal.AWAY:
        what = f"dataset.path {path} is no file, and the hub can't be reached to look there"
        return TrainingFailed(Reason.TRAINER_ERROR, what)
    if answer is Refusal.NO_REPOSITORY:
        return DataError(path, f"is neither a file here nor a data set on the hub: {answer}")
    cause = error
    while cause.__cause__ is not None:  # datasets says "an error occurred", and its cause which one
        cause = cause.__cause__
    return DataError(path, f"can't be read from the hub: {answer or first_line(cause)}")


def dataset_hash(path: str) -> str | None:
    """sha256 of a local data file; None for a hub id."""
    return sha256_of(Path(path)) if Path(path).exists() else None
