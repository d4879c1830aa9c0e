"""Pickles run code when they are read: none that a model, a data set or a stored checkpoint brings is."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.data.origin import load_rows
from loractl.worker.protocol.marker import MARKER


class Touch:
    """As a pickle: a command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def test_the_mark_would_be_left_by_a_careless_reader(mark: Path) -> None:
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_weights_as_a_pickle_are_no_base_model(tiny_model: Path, tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save(Touch(mark), folder / name.removesuffix(".index.json"))
    if name.endswith(".index.json"):
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(TrainingFailed) as caught:
        load_base(str(folder), Method.LORA, "cpu", choose_precision("cpu"))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert not mark.exists()


def test_an_adapter_as_a_pickle_is_not_read(tiny_model: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    torch.save(Touch(mark), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(TrainingFailed, match="holds an adapter"):
        load_base(str(folder), Method.LORA, "cpu", choose_precision("cpu"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "spiece.model", "tokenizer.pkl", "vocab.pkl"])
def test_a_tokenizer_as_a_pickle_is_not_read(tiny_model: Path, tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(mark)))
    with contextlib.suppress(TrainingFailed):
        load_tokenizer(str(folder))
    assert not mark.exists()


def test_a_checkpoint_that_others_have_written_to_runs_nothing(
    recipe: Callable[..., Any], tmp_path: Path, mark: Path
) -> None:
    """Checkpoints come from the artifact store, to which others may write."""
    recipe("first", stop_after=5)
    files = {path.name for path in next((tmp_path / "first" / "checkpoints").glob("checkpoint-*")).iterdir()} - {MARKER}
    assert files == {"adapter_model.safetensors", "training_state.json", "training_state.safetensors"}
    for name in sorted(files):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        saved = list((tmp_path / name / "checkpoints").glob("checkpoint-*"))
        assert saved
        for folder in saved:
            marker = json.loads((folder / MARKER).read_text())
            torch.save(Touch(mark), folder / name)
            marker["files"][name] = (folder / name).stat().st_size
            (folder / MARKER).write_text(json.dumps(marker))
        with pytest.raises(TrainingFailed, match=r"the checkpoint of step \d can't be read"):
            recipe(f"after {name}", resume=name)
        assert not mark.exists(), name


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".npy"])
def test_a_hub_data_set_of_pickles_is_not_read(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (tmp_path / "org" / "data").mkdir(parents=True)
    (tmp_path / "org" / "data" / f"train{suffix}").write_bytes(pickle.dumps(Touch(mark)))
    monkeypatch.chdir(tmp_path)  # as the datasets library sees a repository that has been fetched
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nobody is asked whether the hub has it
    with pytest.raises(Exception, match=r"train|data|file"):
        load_rows("org/data")
    assert not mark.exists()
