"""Tokenizers and weights of bases: what submit takes, the worker takes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from loractl.common.errors import UsageError
from loractl.scheduler.plan.answer import JobToPlan, memory_need
from loractl.scheduler.submit.need import check_adapter
from loractl.scheduler.submit.preflight import check_base
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_tokenizer

from ..unit.factories import spec

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 100_000,
}  # fmt: skip


@pytest.mark.parametrize("format", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_base_that_others_have_quantised_is_refused_and_not_planned_as_16_bits(format: str, tmp_path: Path) -> None:
    foreign = {**SMALL, "quantization_config": {"bits": 4, "quant_method": format}}
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    said = f"is quantised with {format}, which can't be trained on"
    job = spec(base_model=str(tmp_path))
    with pytest.raises(UsageError, match=said) as refused:
        check_adapter(job)
    assert "name the model that it was made from" in str(refused.value.hint)
    with pytest.raises(UsageError, match=said):
        memory_need(None, JobToPlan(title="t", spec=job, data={}), None, solve=False)  # type: ignore[arg-type]
    with pytest.raises(TrainingFailed, match=said):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tekken.json", "sentencepiece.bpe.model", "vocab.txt"])
def test_what_submit_takes_for_a_tokenizer_the_worker_does_too(tmp_path: Path, name: str) -> None:
    base = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(UsageError, match="has weights and no tokenizer"):
        check_base(tmp_path)
    with pytest.raises(TrainingFailed, match="has no tokenizer"):
        load_tokenizer(base)
    (tmp_path / name).write_text("{}")
    assert check_base(tmp_path) == ()
    with pytest.raises(TrainingFailed) as refused:
        load_tokenizer(base)  # an empty one
    assert "has no tokenizer" not in refused.value.sentence
