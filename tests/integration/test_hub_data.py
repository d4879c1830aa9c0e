"""A hub data set's own card says where its files are; files of the worker's box are not among them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loractl.common.status import Reason
from loractl.worker.data import load_rows
from loractl.worker.model import TrainingFailed

from ..models import write_helpdesk


def test_a_card_that_names_files_of_this_box_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write_helpdesk(tmp_path / "train.jsonl")
    builder = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path: builder)
    with pytest.raises(TrainingFailed, match=r"names a file that is not on the hub: .*train\.jsonl") as failure:
        load_rows("org/data")
    assert failure.value.reason is Reason.BAD_SPEC


def test_files_of_the_hub_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def builder(path: str) -> Any:
        return SimpleNamespace(
            config=SimpleNamespace(data_files={"train": [f"hf://datasets/{path}@0123/train.jsonl"]}),
            download_and_prepare=lambda: None,
            as_dataset=lambda split: [{"text": split}],
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert [row.value for row in load_rows("org/data")] == [{"text": "train"}]
