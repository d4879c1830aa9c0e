"""An adapter is loaded once before its job can succeed: what does not load, or is another one, is no result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loractl.common.adapter_config import CONFIG
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.worker.base.adapter import WEIGHTS, check_adapter, save_adapter
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base, load_tokenizer


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, bytes]]:
    """A model with a fresh adapter, and the files that were written of it."""
    spec = JobSpec.model_validate(
        {"name": "t", "base_model": str(tiny_model), "dataset": {"path": "x.jsonl"}, "lora": {"r": 4}}
    )
    model = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu")), spec, Method.LORA)
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(model, load_tokenizer(str(tiny_model)), spec, folder)
    return model, {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def _one_bit(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = min(name for name in weights if "lora_B" in name)
    weights[name].view(-1)[0] = 1e-30
    save_file(weights, folder / WEIGHTS)


def _one_tensor_less(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(min(weights))
    save_file(weights, folder / WEIGHTS)


def _torn(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def _an_expression(folder: Path) -> None:
    """peft would look for it in each module's name, for hours."""
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, "target_modules": r"(\w+\.?)*!"}))


def _no_settings(folder: Path) -> None:
    (folder / CONFIG).write_text("{}")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_one_bit, "is not what was trained: base_model"),
        (_one_tensor_less, "is not what was trained: base_model"),
        (_torn, "does not load"),
        (_an_expression, "target_modules is not a list of at most 20000 names of modules"),
        (_no_settings, "is not what was trained: peft_type"),
        (lambda folder: (folder / WEIGHTS).unlink(), "does not load"),
    ],
)
def test_a_harmed_adapter_is_no_result(
    saved: tuple[Any, dict[str, bytes]], tmp_path: Path, harm: Any, says: str
) -> None:
    model, files = saved
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    check_adapter(model, tmp_path)
    harm(tmp_path)
    with pytest.raises(TrainingFailed, match=says):
        check_adapter(model, tmp_path)
