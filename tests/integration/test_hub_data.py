"""A hub data set's own card says where its files are; files of the worker's box are not among them.

Files of the hub are read in tests/integration/test_hub.py and tests/acceptance/test_hub.py.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from loractl.common.job.status import Reason
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.data.origin import load_rows

from ..models import write_helpdesk


def test_a_card_that_names_files_of_this_box_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write_helpdesk(tmp_path / "train.jsonl")
    builder = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, revision: builder)
    with pytest.raises(TrainingFailed, match=r"names a file that is not on the hub: .*train\.jsonl") as failure:
        load_rows("org/data")
    assert failure.value.reason is Reason.BAD_SPEC
