"""What a hand-made spec may not make a worker read or run."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.settings import Settings, load_settings
from loractl.common.store.records import StoredCheckpoint
from loractl.worker.protocol.trust import Refused, check_checkpoint, check_claim, may_run_code

from ..factories import spec

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A worker whose owner allows tmp_path/allowed."""
    (tmp_path / "allowed").mkdir()
    return load_settings({"LORACTL_HOME": str(tmp_path / "home"), "LORACTL_MODEL_ROOTS": str(tmp_path / "allowed")})


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def check(settings: Settings, base: object = "org/model", data: dict[str, Any] | None = None, **dataset: str) -> None:
    check_claim(spec(base_model=str(base), dataset={"path": "org/data", **dataset}), data or {}, settings)


def test_a_folder_inside_an_allowed_one_and_a_hub_id_pass(settings: Settings, tmp_path: Path) -> None:
    check(settings, model(tmp_path / "allowed" / "lab" / "base"))
    check(settings, "org/model")
    check(settings, "gpt2")


def test_without_roots_any_folder_passes(settings: Settings, tmp_path: Path) -> None:
    check(replace(settings, model_roots=()), model(tmp_path / "elsewhere"))


@pytest.mark.parametrize("path", ["elsewhere", "allowed/../elsewhere", "allowed-too", "link", ""])
def test_a_folder_outside_is_refused_however_it_is_written(settings: Settings, tmp_path: Path, path: str) -> None:
    model(tmp_path / "elsewhere")
    model(tmp_path / "allowed-too")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=r"LORACTL_MODEL_ROOTS|not a plain path"):
        check(settings, tmp_path / ("allowed/link" if path == "link" else path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "sub"])
def test_a_link_that_leads_out_of_the_roots_is_refused(settings: Settings, tmp_path: Path, name: str) -> None:
    outside, inside = model(tmp_path / "elsewhere"), model(tmp_path / "allowed" / "base")
    (inside / name).unlink(missing_ok=True)
    (inside / name).symlink_to(outside / name if name != "sub" else outside)
    with pytest.raises(Refused, match=f"{name} leads there"):
        check(settings, inside)


def test_links_in_a_circle_are_refused_in_a_sentence(settings: Settings, tmp_path: Path) -> None:
    inside = model(tmp_path / "allowed" / "base")
    (inside / "loop").symlink_to("loop")
    with pytest.raises(Refused) if sys.version_info < (3, 13) else contextlib.nullcontext():
        check(settings, inside)


def test_a_link_to_another_allowed_place_passes(settings: Settings, tmp_path: Path) -> None:
    blobs = tmp_path / "allowed" / "blobs"  # the hub's cache keeps files so
    inside = model(tmp_path / "allowed" / "snapshot")
    blobs.mkdir()
    (inside / "model.safetensors").rename(blobs / "abc")
    (inside / "model.safetensors").symlink_to(blobs / "abc")
    check(settings, inside)


@pytest.mark.parametrize("shard", ["../elsewhere/model.safetensors", "/etc/passwd", "sub/../../x"])
def test_an_index_that_names_weights_elsewhere_is_refused(settings: Settings, tmp_path: Path, shard: str) -> None:
    base = model(tmp_path / "allowed" / "base")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": shard}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=r"model\.safetensors\.index\.json names"):
        check(settings, base)


@pytest.mark.parametrize(
    "name", ["../x", "./x", "~/x", "a/../b", "a//b", "..", "x/", "a/b/c", "-x", "file:///x", "a b", "hf://datasets/a/b"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(settings: Settings, name: str) -> None:
    with pytest.raises(Refused, match=r"base_model .* hub id"):
        check(settings, name)
    with pytest.raises(Refused, match=r"dataset\.path .* is not in the artifact store"):
        check(settings, path=name)
    with pytest.raises(Refused, match=r"dataset\.eval_path .* is not in the artifact store"):
        check(settings, eval_path=name)


def test_a_name_that_exists_beside_the_worker_is_no_hub_id(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "org" / "thing")
    with pytest.raises(Refused, match="a file or folder in this worker"):
        check(settings, "org/thing")
    with pytest.raises(Refused, match="a file or folder in this worker"):
        check(settings, path="org/thing")


@pytest.mark.parametrize("name", ["/etc/secrets.json", "json", "csv", "text", "data.jsonl"])
def test_data_that_are_not_stored_are_on_the_hub_under_an_owner(settings: Settings, name: str) -> None:
    with pytest.raises(Refused, match="no hub id of the form owner/name"):
        check(settings, path=name)
    sha256 = "ab" * 32
    check(
        settings,
        path=name,
        data={"path": {"uri": f"{settings.artifacts_url}/datasets/{sha256}.jsonl", "sha256": sha256}},
    )
    for uri in (f"file:///etc/datasets/{sha256}.jsonl", f"{settings.artifacts_url}/datasets/../{sha256}.jsonl"):
        with pytest.raises(Refused, match="is not a data set of this store"):
            check(settings, path=name, data={"path": {"uri": uri, "sha256": sha256}})


@pytest.mark.parametrize("entry", ["x", 1, [], {}, {"uri": "x"}, {"uri": 1, "sha256": "x"}])
def test_a_row_that_speaks_of_stored_data_in_another_form_is_refused(settings: Settings, entry: object) -> None:
    for key in ("path", "eval_path"):
        with pytest.raises(Refused, match="no address and hash of a stored data set"):
            check(settings, data={key: entry})


def test_a_model_s_own_code_runs_only_for_the_pairs_that_the_owner_lists(settings: Settings) -> None:
    trusting = replace(settings, trusted_code=frozenset({f"org/model@{COMMIT}"}))
    assert may_run_code(spec(revision=COMMIT), trusting)
    assert not may_run_code(spec(revision=COMMIT), settings)
    assert not may_run_code(spec(), trusting)
    assert not may_run_code(spec(revision="main"), trusting)
    assert not may_run_code(spec(base_model="org/other", revision=COMMIT), trusting)
    assert not may_run_code(spec(base_model="/srv/org/model", revision=COMMIT), trusting)


def test_a_checkpoint_of_this_job_passes() -> None:
    check_checkpoint(7, StoredCheckpoint(step=120, prefix="jobs/7/checkpoints/2-120"))


@pytest.mark.parametrize(
    ("step", "prefix"),
    [
        (120, "jobs/8/checkpoints/2-120"),
        (121, "jobs/7/checkpoints/2-120"),
        (120, "jobs/7/checkpoints/2-120/.."),
        (120, "jobs/7/attempt-1"),
        (120, "datasets/x"),
        (-1, "jobs/7/checkpoints/2--1"),
        ("1/../../../x", "jobs/7/checkpoints/2-1/../../../x"),
        ("1", "jobs/7/checkpoints/2-1"),
        (1.5, "jobs/7/checkpoints/2-1.5"),
        (1, ["jobs/7/checkpoints/2-1"]),
        (1, None),
    ],
)
def test_a_row_that_names_another_checkpoint_is_refused(step: Any, prefix: Any) -> None:
    """The step becomes the name of a folder on this box: a path in it would be written to."""
    with pytest.raises(Refused, match="of another job"):
        check_checkpoint(7, StoredCheckpoint(step=step, prefix=prefix))
