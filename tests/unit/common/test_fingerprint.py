"""A base model is known by the content of its files, and a changed one is noticed whatever its dates say."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loractl.common import fingerprint as module
from loractl.common.fingerprint import changed_files, digest, fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights-1")
    (base / "README.md").write_text("words")
    return base


def test_files_that_decide_a_model_are_hashed_and_its_readme_is_not(folder: Path, tmp_path: Path) -> None:
    files = fingerprint(folder, tmp_path / "cache")
    assert files.keys() == {"config.json", "model.safetensors"}
    assert files["config.json"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    assert len(digest(files)) == 64


def test_weights_of_the_same_size_and_date_are_noticed(folder: Path, tmp_path: Path) -> None:
    weights, before = folder / "model.safetensors", fingerprint(folder, tmp_path / "cache")
    dates = weights.stat()
    weights.write_bytes(b"weights-2")
    os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    after = fingerprint(folder, tmp_path / "cache")
    assert changed_files(before, after) == ["model.safetensors"]
    assert digest(before) != digest(after)


def test_a_file_is_hashed_once_while_it_stays_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    first = fingerprint(folder, tmp_path / "cache")
    assert fingerprint(folder, tmp_path / "cache") == first
    assert sorted(hashed) == ["config.json", "model.safetensors"]


def test_several_threads_may_hash_a_base_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, real = threading.Barrier(4), Path.replace

    def replace(path: Path, target: Path) -> Path:
        together.wait(30)  # until all have written what they know
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(fingerprint, folder, tmp_path / "cache") for _ in range(4)]
        assert len({digest(one.result()) for one in found}) == 1


@pytest.mark.parametrize("torn", ["", "[]", '{"config.json": 1}', '{"config.json": []}'])
def test_a_note_that_cannot_be_read_is_written_anew(folder: Path, tmp_path: Path, torn: str) -> None:
    """As after a power loss."""
    first = fingerprint(folder, tmp_path / "cache")
    (note,) = (tmp_path / "cache" / "bases").iterdir()
    whole = note.read_text()
    note.write_text(torn)
    assert fingerprint(folder, tmp_path / "cache") == first
    assert note.read_text() == whole


def test_a_note_that_cannot_be_written_fails_nobody(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder can be here, as on a full disk")
    assert fingerprint(folder, tmp_path / "cache").keys() == {"config.json", "model.safetensors"}


def test_a_cache_with_more_of_the_hub_s_files_holds_the_same_model_unless_they_are_weights() -> None:
    then = {"config.json": "a", "model.safetensors": "b"}
    assert changed_files(then, {**then, "vocab.json": "c"}) == []
    assert changed_files(then, {**then, "model-2.safetensors": "c"}) == ["model-2.safetensors"]
    assert changed_files(then, {**then, "config.json": "d"}) == ["config.json"]
