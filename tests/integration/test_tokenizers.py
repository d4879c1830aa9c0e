"""Tokenizers and weights of bases: what submit takes, the worker takes."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from loractl.common.data.examples import Example, Turn
from loractl.common.errors import UsageError
from loractl.common.job.sections import DataFormat
from loractl.scheduler.plan.answer import JobToPlan, memory_need
from loractl.scheduler.submit.need import check_adapter
from loractl.scheduler.submit.preflight import check_base
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.tokens import IGNORED, encode

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


TRIMMED = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BEGUN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}
ENDS = {"sep": ["<|endoftext|>", 0], "cls": ["<|im_start|>", 1], "add_prefix_space": False}


@pytest.mark.parametrize(
    "processor",
    [
        TRIMMED,
        {"type": "Sequence", "processors": [TRIMMED, BEGUN]},
        {"type": "RobertaProcessing", "trim_offsets": True, **ENDS},
    ],
    ids=lambda processor: processor["type"],
)
def test_indentation_is_learned_though_a_tokenizer_trims_its_offsets(
    tiny_model: Path, tmp_path: Path, processor: dict[str, Any]
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_model, tmp_path / "base")
    file = base / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "post_processor": processor}), "utf-8")
    tokenizer = load_tokenizer(str(base))
    code = "def f(x):\n    if x:\n        return  1\n    \n"
    turns = (Turn(role="user", content="next line"), Turn(role="assistant", content=code))
    for example, format in (
        (Example(number=1, turns=turns), DataFormat.MESSAGES),
        (Example(number=1, prompt="next line:\n", text=f"next line:\n{code}"), DataFormat.PROMPT_COMPLETION),
        (Example(number=1, text=f"_{code}"), DataFormat.TEXT),  # nothing precedes a first token: it is not learned
    ):
        (row,) = encode(example, tokenizer, format)
        learned = tokenizer.decode([label for label in row.labels if label != IGNORED])
        assert learned.removeprefix("_") == f"{code}<|im_end|>", format
    as_published = Tokenizer.from_file(str(file)).encode(code).ids
    assert tokenizer(code).input_ids == as_published
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")(code).input_ids == as_published
