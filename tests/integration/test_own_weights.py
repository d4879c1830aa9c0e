"""A base on a processor is the trainer's own: what becomes of its files changes nothing of a training."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from loractl.common.fingerprint import fingerprint
from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.worker.base import source
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_base
from loractl.worker.base.source import identify
from loractl.worker.recipe import recipe as training

from ..models import make_tiny_model
from .conftest import Recipe


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_weights_that_are_written_over_in_place_change_no_base_that_is_loaded(tmp_path: Path, method: Method) -> None:
    """As by `cp` of another model over this one. Weights in the files' own number format would be the files' pages."""
    folder = make_tiny_model(tmp_path / "model")
    base = load_base(str(folder), method, "cpu", choose_precision("cpu", "float32"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    file = folder / "model.safetensors"
    other = save({name: tensor + 1 for name, tensor in load_file(file).items()}, metadata={"format": "pt"})
    assert len(other) == file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    with file.open("r+b") as stream:
        stream.truncate(0)  # a page of a file that has no such page any more would end the process by SIGBUS
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_base_that_changes_while_it_is_loaded_is_not_trained_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report would name the files that came, and the tokenizer be of those that went."""
    folder, base_of = make_tiny_model(tmp_path / "model"), training.base_of

    def replaced(*order: Any) -> Any:
        base = base_of(*order)
        new = shutil.copy(folder / "model.safetensors", tmp_path)
        Path(new).replace(folder / "model.safetensors")
        return base

    monkeypatch.setattr(training, "base_of", replaced)
    with pytest.raises(TrainingFailed, match="model was changed while it was loaded") as failed:
        recipe(job={"base_model": str(folder)})
    assert failed.value.reason is Reason.TRAINER_ERROR
    monkeypatch.setattr(training, "base_of", base_of)
    assert recipe("b", job={"base_model": str(folder)})[0].reason is Reason.OK


def test_a_share_that_goes_away_during_loading_is_not_the_job_s_fault(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base_of = make_tiny_model(tmp_path / "model"), training.base_of

    def unmounted(*order: Any) -> Any:
        base = base_of(*order)
        folder.rename(tmp_path / "elsewhere")
        return base

    monkeypatch.setattr(training, "base_of", unmounted)
    with pytest.raises(TrainingFailed, match="there is no such folder on this box") as failed:
        recipe(job={"base_model": str(folder)})
    assert failed.value.reason is Reason.BASE_MISSING


@pytest.mark.parametrize("number", [errno.ESTALE, None])
def test_a_share_that_goes_away_while_its_files_are_hashed_is_not_the_job_s_fault(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "model")

    def hashed(*order: Any) -> Any:
        if number is not None:
            raise OSError(number, os.strerror(number))
        files = fingerprint(*order)
        folder.rename(tmp_path / "elsewhere")
        return files

    monkeypatch.setattr(source, "fingerprint", hashed)
    with pytest.raises(TrainingFailed, match="model can't be read: ") as failed:
        identify(str(folder), None, tmp_path)
    assert failed.value.reason is Reason.BASE_MISSING


def test_a_base_that_changes_while_its_files_are_hashed_has_no_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "model")

    def hashed(*order: Any) -> Any:
        files = fingerprint(*order)
        (folder / "config.json").touch()
        return files

    assert identify(str(folder), None, tmp_path)["files"].keys() > {"config.json", "model.safetensors"}
    monkeypatch.setattr(source, "fingerprint", hashed)
    with pytest.raises(TrainingFailed, match="model was changed while its files were hashed"):
        identify(str(folder), None, tmp_path)


def test_a_share_that_numbers_a_file_anew_has_changed_no_base_and_a_replaced_file_of_one_date_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SMB and SSHFS may, once the kernel has forgotten a file: loading a large one makes it forget others."""
    folder, traits_of, looks = make_tiny_model(tmp_path / "model"), source.traits_of, itertools.count()

    def with_new_inodes(*base: Any) -> source.Traits:
        look = next(looks)
        return frozenset((*facts, inode + look) for *facts, inode in traits_of(*base))

    def hashed(*order: Any) -> Any:
        files, new = fingerprint(*order), tmp_path / "config.json"
        shutil.copy2(folder / "config.json", new).replace(folder / "config.json")
        return files

    with monkeypatch.context() as share:
        share.setattr(source, "traits_of", with_new_inodes)
        assert identify(str(folder), None, tmp_path)["files"]
    monkeypatch.setattr(source, "fingerprint", hashed)
    with pytest.raises(TrainingFailed, match="model was changed while its files were hashed"):
        identify(str(folder), None, tmp_path)
