"""What a job takes where it does without recomputing: figures of a published model, and where pieces stop to pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Checkpointing, Method, Need, Roomy, RoomyForm
from loractl.common.job.spec import JobSpec
from loractl.common.memory.correction import GROWTH, LIKE_IT_SPARE, Measured, learned, learned_roomy
from loractl.common.memory.fit import plan_roomy
from loractl.common.memory.plan import predict
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


@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 33}, {"model_type": "gemma2", "head_dim": 128}])
@pytest.mark.parametrize("asked", [{}, {"exact": True}, {"per_device_train_batch_size": 1}, {"optim": "adamw_torch"}])
@pytest.mark.parametrize("length", [64, 4096])
def test_with_half_of_the_blocks_recomputed_a_job_takes_no_more_than_the_middle(
    length: int, asked: dict[str, Any], sizes: dict[str, Any], base: Path
) -> None:
    (base / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    spec = job(base, length=length, **asked)
    need, rows = predict(spec), spec.training.per_device_train_batch_size
    last = plan_roomy(spec).with_half(need, need, rows).lora[-1]
    half = predict(
        job(
            base,
            length=length,
            gradient_checkpointing="half",
            **asked | {"per_device_train_batch_size": last.micro_batch},
        )
    )
    assert last.half and last.bytes == last.planned
    assert half.lora is not None and half.lora <= last.bytes
    if last.micro_batch == rows:
        assert half.lora > 0.9 * last.bytes, "the bound is near"


def test_in_nf4_half_of_the_blocks_are_recomputed_in_the_job_s_own_micro_batch_alone(base: Path) -> None:
    """Smaller ones dequantise the base again, which by count costs what they gain."""
    for asked, found in (({}, [4, 2, 1]), ({"per_device_train_batch_size": 1}, [1, 1])):
        spec = job(base, **asked)
        forms = plan_roomy(spec).with_half(predict(spec), predict(spec), spec.training.per_device_train_batch_size)
        assert [form.micro_batch for form in forms.qlora] == found
        assert [form.micro_batch for form in forms.lora][-2:] == [1, 1] and forms.lora[-1].half
    assert plan_roomy(spec).with_half(Need(lora=None, qlora=None), predict(spec), 1) == plan_roomy(spec)


@pytest.mark.parametrize("asked", [True, False, "half"])
def test_a_job_that_says_whether_it_recomputes_has_no_other_form(asked: Checkpointing, base: Path) -> None:
    assert plan_roomy(job(base, gradient_checkpointing=asked)) == Roomy()


def test_neither_a_processor_nor_an_unknown_base_has_one(base: Path, tmp_path: Path) -> None:
    assert plan_roomy(job(base), stack=Stack(on_gpu=False)) == Roomy()
    assert plan_roomy(job(tmp_path / "none")) == Roomy()


def test_the_row_keeps_the_forms() -> None:
    found = Roomy(qlora=(RoomyForm(micro_batch=2, bytes=7, planned=6),))
    assert Roomy.read(found.as_json()) == found
    with_half = found.with_half(need := Need(lora=1, qlora=1), need, 2)
    assert with_half != found and Roomy.read(with_half.as_json()).qlora[0] == found.qlora[0]
    assert with_half.with_half(need, need, 2) == with_half
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
