"""The memory plan: parts by hand for a published model, what grows with what, and the largest job that fits."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loractl.common.job.method import Method, Need
from loractl.common.job.spec import JobSpec
from loractl.common.memory.activations import CHUNK_BYTES, LOSS_BYTES
from loractl.common.memory.context import CONTEXT_BYTES
from loractl.common.memory.families import shape_of
from loractl.common.memory.fit import largest_fit
from loractl.common.memory.plan import MIB, Plan, plan, predict
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import HEAD_CHUNK, Lengths, Stack
from loractl.common.memory.weights import nf4_bytes, state_bytes
from loractl.common.units import GIB

from ....conftest import examples

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

LINEAR = 106_168_320
METHODS = [Method.LORA, Method.QLORA]


def shape(**changed: Any) -> Shape:
    found = shape_of({**SMOLLM2_135M, **changed})
    assert found is not None
    return found


def job(base_model: str = "org/model", **sections: Any) -> JobSpec:
    dataset = {"path": "org/data", "max_length": 256, **sections.pop("dataset", {})}
    return JobSpec.model_validate({"name": "t", "base_model": base_model, "dataset": dataset, **sections})


@pytest.mark.parametrize(("exact", "rest"), [(False, 2), (True, 4)])
def test_the_weights_of_lora_are_sixteen_bit_and_those_of_qlora_nf4_with_a_rest(exact: bool, rest: int) -> None:
    spec = job(training={"exact": exact})
    assert plan(shape(), spec, Method.LORA).parts["weights"] == 134_515_008 * 2
    four_bit = plan(shape(), spec, Method.QLORA).parts["weights"] - (134_515_008 - LINEAR) * rest
    assert 0.515 < four_bit / LINEAR < 0.520, "4 bit, 0.127 bit of constants, and a kilobyte of tables a layer"


def test_the_bytes_of_an_nf4_layer_are_those_that_bitsandbytes_takes() -> None:
    n = 4096 * 4096
    assert nf4_bytes(n) == n // 2 + n // 64 + n // 64 // 256 * 4 + 1092
    assert nf4_bytes(n, double_quant=False) == n // 2 + n // 64 * 4 + 64
    assert nf4_bytes(3) == 2 + 1 + 4 + 1092


def test_the_adapter_its_gradients_and_its_optimizer_are_parts_of_their_own() -> None:
    parameters = 30 * 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    parts = plan(shape(), job(lora={"r": 8}), Method.LORA).parts
    assert (parts["adapter"], parts["gradients"], parts["optimizer"]) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    assert plan(shape(), job(lora={"r": 8}, training={"optim": "sgd"}), Method.LORA).parts["optimizer"] == 0


def test_eight_bit_state_is_two_bytes_and_scales_but_not_for_small_tensors() -> None:
    assert state_bytes("adamw_8bit", 8192) == 2 * (8192 + 4 * 32)
    assert state_bytes("adamw_8bit", 4095) == state_bytes("adamw_torch", 4095) == 8 * 4095
    by_default = plan(shape(), job(lora={"r": 64}), Method.QLORA).parts["optimizer"]
    assert by_default < plan(shape(), job(lora={"r": 64}), Method.LORA).parts["optimizer"] / 3, "auto is paged 8-bit"


def test_an_embedding_s_state_is_in_32_bit_for_8_bit_optimizers_too() -> None:
    def state(optim: str, *saved: str) -> int:
        spec = job(lora={"modules_to_save": saved}, training={"optim": optim})
        return plan(shape(tie_word_embeddings=False), spec, Method.QLORA).parts["optimizer"]

    n = 49152 * 576
    for optim, moments in (("paged_adamw_8bit", 2), ("lion_8bit", 1), ("ademamix_8bit", 3), ("adamw_torch", 2)):
        assert state(optim, "embed_tokens") - state(optim) == 4 * moments * n
    assert state("adamw_8bit", "lm_head") - state("adamw_8bit") == 2 * (n + 4 * n // 256)


def test_the_loss_takes_twelve_bytes_a_logit() -> None:
    exact = job(training={"exact": True})
    parts = plan(shape(), exact, Method.LORA).parts
    assert parts["logits"] == 4 * 256 * (49152 * LOSS_BYTES + 576 * 4)
    held, freed = (plan(shape(), exact, Method.LORA, stack=Stack(keeps_logits=keeps)) for keeps in (True, False))
    answered = 4 * 256 * 49152 * 2
    assert held.tensor_bytes == freed.tensor_bytes + answered
    assert held.peak_bytes == freed.peak_bytes, "freed 16-bit logits leave a block that fp32 ones can't use"
    full = plan(shape(), job(training={"exact": True, "dtype": "float32"}), Method.LORA)
    assert freed.parts["allocator"] - full.parts["allocator"] > answered / 2, "there is no such block in fp32"


def test_a_cap_keeps_a_logit_in_the_type_that_the_head_answers_in() -> None:
    def beyond(stack: Stack | None = None, **training: Any) -> float:
        sizes = [
            plan(replace(shape(), softcaps=caps), job(training=training), Method.LORA, stack=stack).parts["logits"]
            for caps in (False, True)
        ]
        return (sizes[1] - sizes[0]) / (HEAD_CHUNK * 49152)

    assert beyond(gradient_checkpointing=True) == 2
    assert beyond(gradient_checkpointing=True, dtype="float32") == 4
    assert beyond(Stack(on_gpu=False), gradient_checkpointing=True) == 4, "a processor may make its products in fp32"


def test_a_lean_step_holds_the_logits_of_a_chunk_whatever_the_batch() -> None:
    small, large = (
        plan(shape(), job(training={"per_device_train_batch_size": rows}), Method.LORA).parts["logits"]
        for rows in (1, 4)
    )
    chunk = HEAD_CHUNK * 49152 * CHUNK_BYTES
    assert small == chunk + 256 * 576 * 10 and large == chunk + 4 * 256 * 576 * 10


@pytest.mark.parametrize(
    "keeps", [{"exact": True}, {"engine": "peft"}, {"torch_compile": True}, {"neftune_noise_alpha": 5}]
)
def test_what_keeps_rows_padded_is_planned_with_padding(keeps: dict[str, Any]) -> None:
    lean, padded = (plan(shape(), job(training=asked), Method.LORA) for asked in ({}, keeps))
    assert padded.need_bytes > 1.3 * lean.need_bytes


def test_keys_and_values_count_for_each_head_where_no_fused_kernel_takes_heads_that_share_them() -> None:
    """On cards before Ampere, which the worker tells, and in fp32 on any card; not on a processor."""
    few, each = 3 * 64, 9 * 64  # numbers a token

    def more(stack: Stack, **training: Any) -> int:
        spec = job(training={"gradient_checkpointing": False, **training})
        apart, shared = (plan(shape(), spec, Method.LORA, stack=one) for one in (replace(stack, grouped=False), stack))
        return apart.peak_bytes - shared.peak_bytes

    tokens = 30 * 4 * 256
    assert more(Stack()) == tokens * 2 * 2 * (each - few)
    assert more(Stack(), dtype="float32") == 0, "they are counted so already"
    fp32 = [plan(shape(num_key_value_heads=n), job(training={"dtype": "float32"}), Method.LORA) for n in (3, 9)]
    assert fp32[0].parts["activations"] > 0.97 * fp32[1].parts["activations"]
    assert more(Stack(on_gpu=False), dtype="float32") > 0, "a processor's kernel shares them, whatever the type"


def test_a_device_that_computes_in_fp32_by_itself_is_planned_so_where_the_job_leaves_the_type_to_it() -> None:
    wide = Stack(full=True)
    assert plan(shape(), job(), Method.LORA, stack=wide) == plan(
        shape(), job(training={"dtype": "float32"}), Method.LORA
    )
    asked = job(training={"dtype": "float16"})
    assert plan(shape(), asked, Method.LORA, stack=wide) == plan(shape(), asked, Method.LORA)


def test_an_8b_qlora_with_four_rows_of_1024_needs_half_of_what_it_did() -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    llama = shape(**sizes, intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False)
    lean, exact = (
        plan(llama, job(dataset={"max_length": 1024}, training={"exact": exact}), Method.QLORA).need_bytes / GIB
        for exact in (False, True)
    )
    assert lean <= 10 and exact == pytest.approx(20.2, abs=0.1)


def test_the_parts_and_the_margin_add_up_and_each_has_a_note() -> None:
    found = plan(shape(), job(), Method.QLORA)
    assert found.peak_bytes == sum(found.parts.values())
    assert found.need_bytes == found.peak_bytes + found.margin_bytes > found.peak_bytes
    assert found.notes.keys() == found.parts.keys()
    assert found.parts["context"] == CONTEXT_BYTES
    assert found.notes["weights"] == "134.5 M parameters, nf4, 28.3 M in bf16"
    assert found.notes["logits"].startswith("49 152 words, fp32, 256 tokens at a time")
    exact = plan(shape(), job(training={"exact": True}), Method.QLORA)
    assert exact.notes["weights"] == "134.5 M parameters, nf4, 28.3 M in fp32"
    assert exact.notes["logits"] == "49 152 words, fp32"


def test_the_rows_own_lengths_count_where_they_are_known() -> None:
    long = job(dataset={"max_length": 4096})
    known = plan(shape(), long, Method.LORA, Lengths(train=256, evaluate=256))
    assert known.parts["logits"] == plan(shape(), job(), Method.LORA).parts["logits"]
    few = plan(shape(), long, Method.LORA, Lengths(train=256, evaluate=256, rows=1))
    assert few.peak_bytes < known.peak_bytes, "a micro-batch holds no more rows than there are"
    held_out = plan(shape(), long, Method.LORA, Lengths(train=256, evaluate=32768))
    assert held_out.parts["evaluation"] > 0
    assert held_out.peak_bytes > known.peak_bytes


def test_an_answer_needs_its_cache_where_that_is_more_than_the_training() -> None:
    training = {"per_device_train_batch_size": 1}

    def evaluation(tokens: int) -> int:
        spec = job(training=training, dataset={"max_length": 8}, evaluation={"max_new_tokens": tokens})
        return plan(shape(), spec, Method.LORA).parts["evaluation"]

    assert evaluation(8192) - evaluation(4096) == 4096 * 2 * 192 * 2 * 31, "30 layers, and one as it is copied"


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_needs_less_and_accumulation_nothing(method: Method) -> None:
    def need(**training: Any) -> int:
        return plan(shape(), job(training=training), method).need_bytes

    assert need() < need(gradient_checkpointing=False)
    assert need(gradient_accumulation_steps=1) == need(gradient_accumulation_steps=64)


def test_quantising_is_not_always_smaller() -> None:
    falcon = shape_of(
        {
            "model_type": "falcon",
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "vocab_size": 65024,
        }
    )
    assert falcon is not None
    lora, qlora = (plan(falcon, job(training={"exact": True}), method) for method in METHODS)
    assert qlora.parts["weights"] == 2 * lora.parts["weights"], "bitsandbytes knows none of its layers"
    assert "no nf4" in qlora.notes["weights"]


SPECS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 64),
        "length": st.integers(8, 8192),
        "r": st.integers(1, 256),
        "checkpointing": st.sampled_from([None, False]),
        "optim": st.sampled_from(["auto", "adamw_torch", "adamw_8bit", "sgd", "adafactor"]),
        "dropout": st.sampled_from([0.0, 0.05]),
    }
)


def drawn(values: dict[str, Any]) -> JobSpec:
    return job(
        dataset={"max_length": values["length"]},
        lora={"r": values["r"], "lora_dropout": values["dropout"]},
        training={
            "per_device_train_batch_size": values["batch"],
            "gradient_checkpointing": values["checkpointing"],
            "optim": values["optim"],
        },
    )


@given(values=SPECS, method=st.sampled_from(METHODS), key=st.sampled_from(["batch", "length", "r"]))
def test_a_larger_job_never_needs_less(values: dict[str, Any], method: Method, key: str) -> None:
    # bitsandbytes keeps the state of matrices under 4096 values in 32 bit: there one rank more takes less, truly
    assume(key != "r" or values["optim"] not in ("auto", "adamw_8bit"))
    small, large = (plan(shape(), drawn(v), method).need_bytes for v in (values, {**values, key: values[key] + 1}))
    assert small <= large


@settings(max_examples=examples(30))
@given(values=SPECS, method=st.sampled_from(METHODS), limit=st.integers(GIB // 2, 80 * GIB))
def test_the_largest_fit_fits_and_one_more_does_not(values: dict[str, Any], method: Method, limit: int) -> None:
    def need(**changed: int) -> int:
        return plan(shape(), drawn({**values, **changed}), method).need_bytes

    fit = largest_fit(shape(), drawn(values), method, limit)
    assume((fit.micro_batch or 0) < 2**16 and (fit.max_length or 0) < 2**20)  # the most that a job file takes
    if fit.micro_batch is None:
        assert need(batch=1) > limit
    else:
        assert need(batch=fit.micro_batch) <= limit < need(batch=fit.micro_batch + 1)
    if fit.max_length is None:
        assert need(length=8) > limit
    else:
        assert need(length=fit.max_length) <= limit < need(length=fit.max_length + 1)


def test_lean_rows_are_planned_as_long_as_they_are_and_padded_ones_as_long_as_the_longest() -> None:
    rows, alike = (Lengths(train=256, evaluate=256, rows=9, longest=each) for each in ((256, 128, 64, 64, 8), ()))

    def planned(lengths: Lengths, batch: int = 4, **training: Any) -> Plan:
        spec = job(training={"per_device_train_batch_size": batch, **training})
        return plan(shape(), spec, Method.LORA, lengths)

    apart = planned(rows)
    assert "4 rows with 512 tokens in all, the longest with 256" in apart.notes["activations"]
    half = planned(Lengths(train=256, evaluate=256, rows=9), 2)
    assert apart.parts["activations"] == half.parts["activations"] < planned(alike).parts["activations"]
    assert planned(rows, 1).parts == planned(alike, 1).parts
    assert rows.tokens(9) == 256 + 128 + 64 + 64 + 8 * 5, "those beyond what is counted are as long as the last"
    assert planned(rows, exact=True).parts == planned(alike, exact=True).parts


def test_padded_pairs_are_planned_with_each_answer_as_long_as_the_longest() -> None:
    pairs = {"task_type": "preference", "dataset": {"path": "x.jsonl"}, "lora": {"r": 16}}

    def planned(lengths: Lengths, *, exact: bool) -> int:
        asked = {"name": "t", "base_model": "org/model", "training": {"exact": exact}, **pairs}
        return plan(shape(), JobSpec.model_validate(asked), Method.LORA, lengths).tensor_bytes

    uneven, even = Lengths(train=300, evaluate=9, text=256), Lengths(train=512, evaluate=9, text=256)
    assert planned(uneven, exact=True) == planned(even, exact=True)
    assert planned(uneven, exact=False) < planned(even, exact=False)


def test_the_largest_fit_says_whether_rows_or_memory_end_it() -> None:
    def fit(rows: int | None) -> tuple[int | None, bool]:
        found = largest_fit(shape(), job(), Method.LORA, 8 * GIB, Lengths(train=256, evaluate=256, rows=rows))
        return found.micro_batch, found.all_rows

    most, by_rows = fit(None)
    assert most is not None and most > 8 and not by_rows
    assert fit(8) == (8, True) and fit(most + 1) == (most, False)


def test_a_plan_takes_less_than_a_millisecond() -> None:
    found, spec = shape(), job()
    plan(found, spec, Method.QLORA)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        plan(found, spec, Method.QLORA)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


def test_a_job_on_a_model_in_a_folder_is_planned_for_both_methods(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M))
    need = predict(job(str(tmp_path)))
    assert need == Need(
        lora=plan(shape(), job(), Method.LORA).need_bytes, qlora=plan(shape(), job(), Method.QLORA).need_bytes
    )


def test_a_model_that_is_not_here_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert predict(job("org/model")) == Need(lora=None, qlora=None)


def test_a_classifier_needs_no_logits_of_words_and_its_labels_hardly_show() -> None:
    answers, classifier = job(), job(task_type="SEQ_CLS")
    lengths = Lengths(train=512, evaluate=512, labels=2)
    words, labels = (plan(shape(), spec, Method.LORA, lengths).parts for spec in (answers, classifier))
    assert words["logits"] > 50 * labels["logits"] and labels["evaluation"] == 0
    assert labels["weights"] - words["weights"] == 2 * 2 * shape().hidden, "tied: the head alone is new"
    few, many = (replace(lengths, labels=count) for count in (2, 100))
    grown = [plan(shape(), classifier, Method.LORA, seen).need_bytes for seen in (few, many)]
    assert grown[0] < grown[1] < grown[0] + 2 * MIB
