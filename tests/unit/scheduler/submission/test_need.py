"""What a job's need is known by, and which adapters are refused before it is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import UsageError
from loractl.common.job.spec import JobSpec
from loractl.common.memory.plan import predict
from loractl.scheduler.submission.need import check_adapter, need_key

from ...factories import spec

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 50_000,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path)


def classifier(base: str, **keys: Any) -> JobSpec:
    return spec(base_model=base, task_type="SEQ_CLS", **keys)


def test_what_is_measured_of_a_classifier_teaches_nothing_of_other_jobs(base: str) -> None:
    data = {"path": {"sha256": "a" * 64}}
    assert need_key(spec(base_model=base), data) != need_key(classifier(base), data)
    assert need_key(classifier(base), data) == need_key(classifier(base, name="other"), data)


def test_a_classifier_needs_less_than_a_job_that_learns_words(base: str) -> None:
    words, labels = predict(spec(base_model=base)), predict(classifier(base))
    assert words.lora is not None and labels.lora is not None and labels.lora < words.lora / 1.2
    assert words.qlora is not None and labels.qlora is not None and labels.qlora < words.qlora / 1.2


def test_an_expression_is_checked_where_the_base_is_at_hand_and_planned(base: str) -> None:
    some = spec(base_model=base, lora={"target_modules": r".*\.1\..*(q|v)_proj"})
    check_adapter(some)
    planned, whole = predict(some).lora, predict(spec(base_model=base)).lora
    assert planned is not None and whole is not None and planned < whole
    with pytest.raises(UsageError, match="c_attn matches no linear layer of") as refused:
        check_adapter(spec(base_model=base, lora={"target_modules": r".*\.c_attn"}))
    assert "like model.layers.0.self_attn.q_proj" in str(refused.value.hint)
    check_adapter(spec(base_model="org/not-here", lora={"target_modules": r".*\.c_attn"}))  # the worker will say


@pytest.mark.parametrize("layer", ["score", "lm_head"])
def test_a_head_gets_no_adapter(base: str, layer: str) -> None:
    with pytest.raises(UsageError, match=f"lora.target_modules: {layer} is not a linear layer"):
        check_adapter(classifier(base, lora={"target_modules": ["q_proj", layer]}))
