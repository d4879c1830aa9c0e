"""What names a box for life is drawn once, whole, and a disk that does not take it is told in a sentence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.errors import LoractlError
from loractl.common.settings import load_settings
from loractl.worker.node.lock import read_identity


def test_the_identity_is_drawn_once_and_again_if_a_full_disk_left_it_empty(tmp_path: Path) -> None:
    settings = replace(load_settings(), home=tmp_path)
    settings.runtime_dir.mkdir()
    with ThreadPoolExecutor(4) as nodes:
        drawn = {identity.instance for identity in nodes.map(read_identity, [settings] * 4)}
    assert len(drawn) == 1 and len(drawn.pop()) == 32, "the nodes of a box agree"
    (settings.runtime_dir / "instance").write_text("")
    assert len(read_identity(settings).instance) == 32
    assert [path.name for path in settings.runtime_dir.iterdir()] == ["instance"]


def test_an_identity_that_can_t_be_written_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(LoractlError, match="instance can't be written: No such file") as told:
        read_identity(replace(load_settings(), home=tmp_path / "gone"))
    assert told.value.hint
