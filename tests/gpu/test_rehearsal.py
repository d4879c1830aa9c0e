"""`make gpu` on a processor, with models of a hand's breadth: nothing of it may break in its first minute on a card."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loractl.common.job.method import Method
from loractl.common.memory.config import read_shape
from loractl.common.memory.plan import plan
from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings

from ..conftest import ROOT
from . import faulty_trainer, trial
from .__main__ import BUDGET_S, run, well
from .attention import compare, weigh
from .experiments import EXPERIMENTS
from .families import FAMILIES, HALF, Workshop
from .ladder import ROWS, SHARE, spec_of
from .page import NEVER, page
from .rig import Figure, Rig, make_rig
from .solo import SIDES, Course, expected, measure
from .speeds import FIRST, NARROW, memory_figure, rows_figure, solo_figures, split_figure
from .split import STEPS, look_at, part_of, split
from .trial import KINDS

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"


@pytest.fixture
def rig(home: Path, warm_start: dict[str, str]) -> Iterator[Rig]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
    made = make_rig(home, {**kept, **warm_start}, device="cpu", small=True, budget_s=1200)
    yield made
    stop_embedded(load_settings(made.cli.environment))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_made_with_its_own_numbers_where_it_is_not_small(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = Workshop(folder=tmp_path, device="cpu", small=True).model(family)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size) == (FAMILIES[family][0], 64)
    assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
    whole = AutoConfig.for_model(FAMILIES[family][0], **FAMILIES[family][1])
    assert whole.vocab_size > 32000, "logits of a real vocabulary"


@pytest.mark.parametrize("how", ["assert", "address"])
def test_a_fault_of_the_card_reads_as_cuda_says_it(how: str) -> None:
    with pytest.raises(RuntimeError, match="CUDA error: "):
        faulty_trainer.fail(how, "cpu")


def test_the_page_says_that_it_was_never_run_until_it_was() -> None:
    never = page({name: [] for name in EXPERIMENTS}, None)
    written = DOCUMENT.read_text()
    assert written == never if written.startswith(NEVER) else written.startswith("# Real cards: run on ")
    figures = {"A": [Figure(what="x|y", value="two\nlines", ok=False)], "B": []}
    text = page(figures, "NVIDIA H100", "today", 12.3, 4.1)
    assert text.splitlines()[0] == "# Real cards: run on NVIDIA H100"
    assert "today, 12 s, 4 of them to make and write models; 1 lines not as they should be." in text
    assert "| A | x\\|y | two lines | no |" in text and "| B | not reached | | no |" in text


def workshop_rig(folder: Path) -> Rig:
    """A rig for what needs no lab."""
    return Rig(cli=None, store=None, workshop=Workshop(folder=folder, device="cpu", small=True), folder=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_are_as_long_as_they_are_said_to_be(mixed: bool, tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    course = Course.of(
        str(rig.workshop.model(HALF)), str(rig.rows(length=1024, mixed=mixed)), "lora", "cpu", 1, 1, 1024
    )
    lengths = sorted(len(row.input_ids) for row in (*course.train, *course.held_out))
    assert 0.95 * 1024 < lengths[-1] <= 1024 and (lengths[0] < 256) == mixed
    assert all(sum(label >= 0 for label in row.labels) > 0.5 * len(row.labels) for row in course.train)


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.long)])
def test_the_engine_and_the_trainer_learn_the_same_rows_alike(method: str, tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    model, rows = str(rig.workshop.model(NARROW)), str(rig.rows(16, 128))
    course = Course.of(model, rows, method, "cpu", 4, 2, 128, FIRST[0].dropout, method == "lora")
    sides = {side: measure(side, course) for side in SIDES}
    assert [sides[side]["pass"] for side in SIDES] == ["LeanPass", "PaddedPass", "padded"]
    assert all(side["seconds"] > 0 for side in sides.values())
    assert sides["exact"]["loss"] == pytest.approx(sides["trainer"]["loss"], rel=1e-3)
    card = expected(course)
    # forwards and backwards, two operations a weight and token
    assert card["needs"] == 4 * (2 * (4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64) * course.tokens
    figures = list(solo_figures({"card": card, **sides}, method, on_card=False))
    assert [f.what for f in figures if not f.ok] == [] and len(figures) == 3
    beyond = {**sides["lean"], "allocated": 2 * card["planned"]}
    assert not all(f.ok for f in solo_figures({"card": card, **sides, "lean": beyond}, method))


def test_a_step_is_split_by_its_kernels_names_and_two_at_once_count_once() -> None:
    kernels = {
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "fmha_cutlassF_f16_aligned_64x128_rf_sm75(...)": "attention",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>": "products",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN": "products",
        "aten::addmm": "products",
        "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": "NF4",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel": "norms",
        "_rms_norm_backward_kernel": "norms",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>": "optimizer",
        "Memcpy HtoD (Pageable -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, MulFunctor>": "elementwise",
        "void at::native::distribution_elementwise_grid_stride_kernel<normal_kernel>": "elementwise",
        "silu_backward_summary": "elementwise",
    }
    assert {name: part_of(name) for name in kernels} == kernels
    found = split([("gemm", 0, 1000), ("silu", 500, 2000), ("gemm", 3000, 5000)], 2)
    assert found == {"parts": {"products": 1.5, "elementwise": 0.5}, "gaps": 0.5, "kernels": 1}
    assert split_figure({**found, "recomputes": True}, "x").value == (
        "2: products 1.5 (60%), elementwise 0.5 (20%), gaps between kernels 0.5 (20%); 1 kernels"
    )
    assert not split_figure({**split([], 2), "recomputes": True}, "x").ok


def test_an_engine_s_step_is_looked_at(tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    model, rows = str(rig.workshop.model(NARROW)), str(rig.rows(16, 128))
    found = look_at(Course.of(model, rows, "lora", "cpu", STEPS + 3, 2, 128, 0.05))
    assert found["parts"]["products"] > 0 and found["kernels"] > 100


def test_one_row_is_weighed_without_flash_attention_beside_its_scores() -> None:
    found = {"shape": "64/float32", **weigh(torch.device("cpu"), 64, "float32")}
    assert found["scores"] == 32 * 64 * 64 * 4 and memory_figure(found, on_card=False).ok
    assert not memory_figure({**found, "taken": found["scores"]}, on_card=True).ok, "it holds them"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_time_in_which_models_are_made_is_not_the_experiments(tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    rig = replace(rig, deadline=time.monotonic() + 5)
    assert rig.left <= 5
    rig.workshop.seconds.append(100.0)
    assert 100 < rig.left <= 105


def test_make_runs_it_once_and_with_what_was_asked() -> None:
    said = subprocess.run(["make", "-n", "gpu", "GPU=long"], cwd=ROOT, capture_output=True, text=True, check=True)
    runs = [line for line in said.stdout.splitlines() if "tests.gpu" in line]
    assert runs == [".venv/bin/python -m tests.gpu docs/gpu.md long"]


def test_what_answers_the_first_questions_takes_three_minutes() -> None:
    first = list(EXPERIMENTS.values())[:5]
    assert all(one.always for one in first) and sum(one.seconds for one in first) <= 180
    assert sum(one.seconds for one in EXPERIMENTS.values() if one.always) <= BUDGET_S


def test_rows_at_once_are_compared_with_row_by_row_and_a_card_without_the_kernel_is_told() -> None:
    found = {"shape": "2x16", **compare(torch.device("cpu"), 2, 16)}
    assert found["by row"] > 0 and "does not take these" in found["why"]
    assert rows_figure(found, on_card=False).ok and not rows_figure(found, on_card=True).ok
    both = {"shape": "2x16", "by row": 3.0, "at once": 1.5, "apart": 0.004}
    assert rows_figure(both, on_card=True).value == "1.50, 3.00 (2.00 of the speed, apart by 0.004)"
    assert not rows_figure({**both, "apart": 0.2}, on_card=True).ok


def test_the_ladder_has_steps_to_go_down_and_one_to_stand_on(tmp_path: Path) -> None:
    """By the plan of the whole family, with its margin for what must not fit and without it for what must."""
    from transformers import AutoConfig

    kind, numbers = FAMILIES[HALF]
    AutoConfig.for_model(kind, **numbers, max_position_embeddings=8192).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path), None)
    assert shape is not None
    plans = {rows: plan(shape, spec_of(tmp_path, tmp_path, 1024, rows), Method.LORA) for rows in (ROWS, 8, 4)}
    limit = SHARE * plans[ROWS].need_bytes
    assert plans[4].peak_bytes < limit < plans[8].peak_bytes


def test_only_what_had_no_time_may_be_missing() -> None:
    done = {name: [Figure(what="x", value="y")] for name in EXPERIMENTS}
    late = next(name for name, experiment in EXPERIMENTS.items() if not experiment.always)
    assert well(done) and well({**done, late: []}) and not well({**done, "Attention": []})
    assert f"| {late} | no time was left | | " in page({**done, late: []}, "a card")
    assert "| Attention | not reached | | no |" in page({**done, "Attention": []}, "a card")
    assert not well({**done, late: [Figure(what="x", value="y", ok=False)]})


@pytest.mark.long
def test_every_experiment_runs_on_a_processor(rig: Rig) -> None:
    figures = run(rig)
    assert {name: [f for f in part if not f.ok] for name, part in figures.items()} == {name: [] for name in EXPERIMENTS}
    assert all(figures.values())
    assert page(figures, "a processor").count("\n| ") > 15


@pytest.mark.parametrize("number_format", ["float32", "nf4"])
def test_the_lean_pass_is_compared_with_peft_s_own(number_format: str, tmp_path: Path) -> None:
    model = str(workshop_rig(tmp_path).workshop.model(NARROW))
    for kind in KINDS:
        found = trial.compare(model, "cpu", number_format, kind)
        assert found["differs"] is None and found["ms"] > 0
