"""Jobs with one key need the same memory: what the plan looks at is in the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loractl.common.job.spec import JobSpec
from loractl.common.memory.need_key import need_key
from loractl.common.memory.plan import predict

from ..job.test_identity import OTHERWISE, job

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(OTHERWISE.keys() - {"base_model", "revision"}))
def test_what_changes_the_plan_changes_the_key(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def on_base(spec: JobSpec) -> JobSpec:
        return spec.model_copy(update={"base_model": str(tmp_path)})

    plain, other = on_base(job({})), on_base(job({key: OTHERWISE[key]}))
    assert predict(plain).lora is not None
    if predict(other) != predict(plain):
        assert need_key(other, {}) != need_key(plain, {})
