"""What a job takes where it does without recomputing: figures of a published model, and where pieces stop to pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Method
from loractl.common.job.need import Roomy, RoomyForm
from loractl.common.job.spec import JobSpec
from loractl.common.memory.correction import GROWTH, LIKE_IT_SPARE, Measured, learned, learned_roomy
from loractl.common.memory.plan import predict
from loractl.common.memory.roomy import plan_roomy
from loractl.common.memory.step import Lengths, Stack
from loractl.common.units import GIB

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def job(base: Path, *, length: int = 1024, **training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "j", "base_model": str(base), "method": "auto", "lora": {"r": 16},
            "dataset": {"path": "x.jsonl", "max_length": length}, "training": training,
        }
    )  # fmt: skip


def test_8b_has_three_forms_on_a_card_each_planned_as_a_job_that_asks_for_it(base: Path) -> None:
    for method, forms in vars(plan_roomy(job(base))).items():
        assert [form.micro_batch for form in forms] == [4, 2, 1]
        asked = [job(base, gradient_checkpointing=False, per_device_train_batch_size=rows) for rows in (4, 2, 1)]
        assert [form.bytes for form in forms] == [getattr(predict(one), method) for one in asked]
        assert forms[-1].bytes > getattr(predict(job(base)), method)


def test_a_piece_too_small_to_pay_is_no_form(base: Path) -> None:
    assert [form.micro_batch for form in plan_roomy(job(base, length=256)).qlora] == [4, 2]
    assert [form.micro_batch for form in plan_roomy(job(base, length=128)).qlora] == [4]
    short = Lengths(train=128, evaluate=128)
    assert [form.micro_batch for form in plan_roomy(job(base), short).qlora] == [4]
    assert [form.micro_batch for form in plan_roomy(job(base, per_device_train_batch_size=6)).qlora] == [6, 3, 1]
    few = Lengths(train=1024, evaluate=1024, rows=2)
    assert [form.micro_batch for form in plan_roomy(job(base), few).qlora] == [4, 1], "no micro-batch has more than 2"


def test_exact_mode_keeps_its_micro_batches(base: Path) -> None:
    assert [form.micro_batch for form in plan_roomy(job(base, exact=True)).qlora] == [4]


@pytest.mark.parametrize("asked", [True, False])
def test_a_job_that_says_whether_it_recomputes_has_no_other_form(asked: bool, base: Path) -> None:
    assert plan_roomy(job(base, gradient_checkpointing=asked)) == Roomy()


def test_neither_a_processor_nor_an_unknown_base_has_one(base: Path, tmp_path: Path) -> None:
    assert plan_roomy(job(base), stack=Stack(on_gpu=False)) == Roomy()
    assert plan_roomy(job(tmp_path / "none")) == Roomy()


def test_the_row_keeps_the_forms() -> None:
    found = Roomy(qlora=(RoomyForm(micro_batch=2, bytes=7, planned=6),))
    assert Roomy.read(found.as_json()) == found
    assert Roomy().as_json() is None and Roomy.read(None) == Roomy()


def ran(peak: int, planned: int, *, roomy: bool, key: str = "k", out_of_memory: bool = False) -> Measured:
    return Measured(
        device_name="A10", method=Method.QLORA, family="llama", need_key=key, planned=planned * GIB,
        reserved=planned * GIB, peak=peak * GIB, out_of_memory=out_of_memory, roomy=roomy,
    )  # fmt: skip


def test_a_peak_teaches_the_size_that_it_is_a_peak_of_and_no_other(base: Path) -> None:
    planned, forms = predict(job(base)), plan_roomy(job(base))
    roomy, other = ran(20, 10, roomy=True), ran(12, 10, roomy=False)
    assert learned(planned, "k", [roomy]) == planned
    assert learned_roomy(forms, "k", [other]) == forms
    taught = learned_roomy(forms, "k", [roomy, other])
    assert [one.bytes for one in taught.qlora] == [int(one.planned * 2 * LIKE_IT_SPARE) for one in forms.qlora]
    assert taught.lora == forms.lora
    family = learned_roomy(forms, "another", [roomy] * 3)
    assert [one.bytes for one in family.qlora] == [int(one.planned * 1.5) for one in forms.qlora]
    gone = learned_roomy(forms, "k", [ran(0, 10, roomy=True, out_of_memory=True)])
    assert [one.bytes for one in gone.qlora] == [int(one.planned * GROWTH) for one in forms.qlora]
