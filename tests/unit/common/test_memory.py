"""The memory plan: exact counts for a published model, and None for what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.memory import CONTEXT_BYTES, Shape, plan, predict, read_shape
from loractl.common.policy import Need
from loractl.common.spec import JobSpec, Method

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The sizes in the config.json of HuggingFaceTB/SmolLM2-135M, which has 134,515,008 parameters."""


def model(folder: Path, **changed: Any) -> Path:
    config = {k: v for k, v in {**SMOLLM2_135M, **changed}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shape(folder: Path, **changed: Any) -> Shape:
    found = read_shape(model(folder, **changed))
    assert found is not None
    return found


def job(base_model: str = "org/model", **sections: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "t", "base_model": base_model, "dataset": {"path": "org/data", "max_length": 256}, **sections}
    )


def test_the_parameters_of_a_published_model_are_counted_exactly(tmp_path: Path) -> None:
    found = shape(tmp_path)
    assert found.head_dim == 64
    assert found.linear_parameters == 106_168_320
    assert found.linear_parameters + found.other_parameters == 134_515_008


def test_an_output_head_of_its_own_and_a_wider_head_are_counted(tmp_path: Path) -> None:
    tied, untied = shape(tmp_path), shape(tmp_path, tie_word_embeddings=False)
    assert untied.other_parameters - tied.other_parameters == 49152 * 576
    wide = shape(tmp_path, head_dim=128)
    assert wide.linear_parameters - tied.linear_parameters == 30 * 2 * (576 * 576 + 576 * 192)
    assert shape(tmp_path, num_key_value_heads=...).kv_heads == 9, "without the key every head has its own"


def test_the_weights_of_lora_are_sixteen_bit_and_those_of_qlora_smaller(tmp_path: Path) -> None:
    found = shape(tmp_path)
    lora, qlora = (plan(found, job(), method)["weights"] for method in (Method.LORA, Method.QLORA))
    assert lora == 134_515_008 * 2
    assert qlora < lora
    four_bit = qlora - found.other_parameters * 4
    assert 0.515 < four_bit / found.linear_parameters < 0.517, "4 bit, and 0.127 bit of constants (QLoRA, section 3)"


def test_the_adapter_costs_sixteen_bytes_a_parameter_and_ten_with_an_eight_bit_optimizer(tmp_path: Path) -> None:
    found = shape(tmp_path)
    parameters = 30 * 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    spec = job(lora={"r": 8})
    assert plan(found, spec, Method.LORA)["adapter_and_optimizer"] == parameters * 16
    assert plan(found, spec, Method.QLORA)["adapter_and_optimizer"] == parameters * 10, "auto is paged 8-bit there"
    eight_bit = job(lora={"r": 8}, training={"optim": "adamw_8bit"})
    assert plan(found, eight_bit, Method.LORA)["adapter_and_optimizer"] == parameters * 10


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_more_tokens_a_step_need_more_and_checkpointing_less(tmp_path: Path, method: Method) -> None:
    found = shape(tmp_path)

    def total(**training: Any) -> int:
        return sum(plan(found, job(training=training), method).values())

    small, large = total(per_device_train_batch_size=1), total(per_device_train_batch_size=8)
    assert CONTEXT_BYTES < small < large < total(per_device_train_batch_size=8, gradient_checkpointing=False)
    assert total(gradient_accumulation_steps=1) == total(gradient_accumulation_steps=64)


def test_a_job_on_a_model_in_a_folder_is_planned_for_both_methods(tmp_path: Path) -> None:
    need = predict(job(str(model(tmp_path))))
    assert need.lora is not None
    assert need.qlora is not None
    assert need.lora > 134_515_008 * 2 + CONTEXT_BYTES


def test_a_model_that_is_not_here_is_not_guessed_at(tmp_path: Path) -> None:
    assert predict(job("org/model")) == Need(lora=None, qlora=None)
    assert read_shape(tmp_path) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "mamba"},
        {"model_type": ...},
        {"hidden_size": ...},
        {"num_attention_heads": 0, "head_dim": ...},
        {"num_hidden_layers": "many"},
    ],
)
def test_a_config_of_an_unknown_kind_gives_no_shape(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert read_shape(model(tmp_path, **changed)) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_damaged_config_gives_no_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert read_shape(tmp_path) is None
