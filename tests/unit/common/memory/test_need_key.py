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


def test_a_base_at_another_revision_and_columns_of_other_names_are_other_jobs() -> None:
    plain = need_key(job({}), {})
    others = [job({"revision": "v1"}), job({"revision": "v2"}), job({"dataset.columns": {"prompt": "question"}})]
    keys = [plain, *(need_key(spec, {}) for spec in others)]
    assert len(set(keys)) == 4


def test_the_key_of_a_job_without_them_is_what_it_was_so_that_its_peaks_still_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loractl.common.memory.need_key.ENGINE", 2)
    assert need_key(job({}), {}) == "1bb3f3fb90012a7127587b8879f15ee290608710a49bf208215155cbcf715f30"
