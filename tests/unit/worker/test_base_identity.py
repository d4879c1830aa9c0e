"""A base is hashed beside the training, and what goes wrong there is not lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loractl.common.artifacts import sha256_of
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.source import BaseIdentity, identify


def test_the_hashes_are_those_of_the_files_and_are_remembered(tmp_path: Path) -> None:
    base, cache = tmp_path / "base", tmp_path / "cache"
    base.mkdir()
    (base / "model.safetensors").write_bytes(os.urandom(1 << 20))
    found = identify(str(base), None, cache)
    assert found["files"] == {"model.safetensors": sha256_of(base / "model.safetensors")}
    assert found["commit"] is None and found == BaseIdentity(str(base), None, cache).wait()


def test_a_base_into_which_an_adapter_is_merged_that_must_stay_in_the_lab_says_so(tmp_path: Path) -> None:
    """In the report, for where the client sees no folder of the box."""
    (tmp_path / "merge.json").write_text('{"publish": false}')
    assert identify(str(tmp_path), None, tmp_path / "cache")["publish"] is False
    (tmp_path / "merge.json").write_text('{"publish": true}')
    assert "publish" not in identify(str(tmp_path), None, tmp_path / "cache")


def test_waiting_for_the_hashes_of_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    identity = BaseIdentity(str(tmp_path / "gone"), None, tmp_path / "cache")
    with pytest.raises(TrainingFailed, match="gone can't be read: there is no such folder on this box"):
        identity.wait()
