"""Every option of the job file does something: no key is accepted and then ignored."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loractl.common.job.method import Method
from loractl.common.job.sections import TrainingSpec
from loractl.common.job.spec import JobSpec, spec_keys
from loractl.common.job.status import Reason
from loractl.common.memory.weights import SMALLEST_8BIT, state_bytes
from loractl.common.store.records import HELD_OUT_LOSS
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed, explain
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base
from loractl.worker.data.prepared import pack
from loractl.worker.data.token_rows import collate, inputs_of
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.protocol.messages import Note, Start, Stepped
from loractl.worker.recipe.arguments import name_project, training_arguments

from .conftest import Recipe

OPTIMIZERS = [name for name in TrainingSpec.model_fields["optim"].annotation.__args__ if name != "auto"]


OTHER_DTYPE = "float32" if choose_precision("cpu").amp else "bfloat16"  # not what auto takes here
PLAIN: list[float] = []
HARDLY = {"samples": 0, "metrics": ["loss"]}
"""Of the evaluation no more than there must be: a test is about the training."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: it is tried once that rows behind each other are right, and no test is about that."""
    return tmp_path_factory.mktemp("cache")


def losses(told: list[Any], name: str = "loss") -> list[float]:
    return [m.metrics[name] for m in told if isinstance(m, Stepped) and name in m.metrics]


def notes(told: list[Any], kind: str) -> list[str]:
    return [m.text for m in told if isinstance(m, Note) and m.kind == kind]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "result" / "adapter" / "adapter_model.safetensors")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result" / "report.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        {"training": {"neftune_noise_alpha": 5}},
        {"training": {"label_smoothing_factor": 0.2}},
        {"training": {"adam_beta1": 0.5}},
        {"training": {"adam_beta2": 0.9}},
        {"training": {"adam_epsilon": 0.01}},
        {"training": {"weight_decay": 0.5}},
        {"training": {"max_grad_norm": 0.01, "optim": "sgd"}},
        {"training": {"warmup_steps": 6}},
        {"training": {"seed": 5}},
        {"training": {"learning_rate": 1e-4}},
        {"training": {"train_sampling_strategy": "sequential"}},
        {"training": {"train_sampling_strategy": "group_by_length"}},
        {"training": {"lr_scheduler_type": "constant"}},
        {"training": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}},
        {"training": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}}},
        {"training": {"lr_scheduler_type": "inverse_sqrt"}},
        {"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}}},
        {"training": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}}},
        {"training": {"gradient_accumulation_steps": 2}},
        {"training": {"per_device_train_batch_size": 2}},
        {"training": {"packing": True}},
        {"training": {"exact": True}},
        {"training": {"dtype": OTHER_DTYPE}},
        {"lora": {"r": 2}},
        {"lora": {"lora_alpha": 2}},
        {"lora": {"lora_dropout": 0.5}},
        {"lora": {"target_modules": ["q_proj"]}},
        {"lora": {"use_rslora": True}},
        {"lora": {"use_dora": True}},
        {"lora": {"modules_to_save": ["lm_head"]}},
        {"lora": {"init_lora_weights": "gaussian"}},
        {"lora": {"init_lora_weights": "orthogonal"}},
        {"dataset": {"max_length": 60}},
        {"dataset": {"test_size": 0.5}},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for section in options.values() for k, v in section.items()),
)
def test_an_option_changes_what_is_learned(recipe: Recipe, tmp_path: Path, options: dict[str, Any]) -> None:
    sections = {name: section for name, section in options.items() if name != "training"}
    few = {"max_steps": 4, "eval_steps": None, **options.get("training", {})}
    if not PLAIN:  # the same for every option
        PLAIN.extend(losses(recipe("plain", max_steps=4, evaluation=HARDLY)[1]))
    ended, changed = recipe("changed", evaluation=HARDLY, **sections, **few)
    assert ended.reason is Reason.OK
    assert losses(changed) != PLAIN
    resolved = json.loads((tmp_path / "changed" / "result" / "job.json").read_text())["spec"]
    for name, section in options.items():
        assert {key: resolved[name][key] for key in section} == section


def test_no_option_changes_nothing_of_it_also_after_all_others(recipe: Recipe) -> None:
    plain, again = (losses(recipe(name, max_steps=4, evaluation=HARDLY)[1]) for name in ("a", "b"))
    assert again == plain == (PLAIN or plain)


def test_rslora_scales_by_the_root_of_r_and_dora_stores_magnitudes(recipe: Recipe, tmp_path: Path) -> None:
    recipe("a", max_steps=1, lora={"r": 4, "use_rslora": True, "use_dora": True}, evaluation=HARDLY)
    config = json.loads((tmp_path / "a" / "result" / "adapter" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (True, True)
    assert any("lora_magnitude_vector" in name for name in adapter(tmp_path / "a"))


@pytest.mark.long
def test_loftq_with_dora_begins_where_loftq_alone_does_whatever_the_rank(tiny_model: Path) -> None:
    """DoRA's magnitudes are those of the corrected layers; a layer that is narrower than r keeps that rank."""
    ids, precision, found = torch.arange(3, 40)[None], choose_precision("cpu", "float32"), []
    for dora in (False, True):
        torch.manual_seed(0)
        base = load_base(str(tiny_model), Method.QLORA, "cpu", precision)
        lora = {"r": 256, "init_lora_weights": "loftq", "use_dora": dora}
        model = add_adapter(base, _spec(tiny_model, lora=lora), Method.QLORA)
        with torch.no_grad():
            found.append(model(ids).logits)
        ranks = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
        ranks |= {p.shape[1] for name, p in model.named_parameters() if "lora_B" in name}
        assert ranks == {256}
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5


def test_modules_to_save_are_trained_in_fp32_and_stored_in_full(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    recipe("a", max_steps=2, lora={"modules_to_save": ["lm_head"]}, evaluation=HARDLY, dtype="bfloat16")
    (stored,) = [tensor for name, tensor in adapter(tmp_path / "a").items() if "lm_head" in name]
    base = load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu", "bfloat16")).lm_head.weight
    assert stored.dtype == torch.float32 and stored.shape == base.shape
    assert not torch.equal(stored, base.float())


@pytest.mark.long
def test_a_finished_training_with_modules_to_save_is_evaluated_again_in_the_base_s_arithmetic(
    recipe: Recipe, tmp_path: Path
) -> None:
    asked = {"lora": {"modules_to_save": ["lm_head"]}, "evaluation": {"samples": 1}, "dtype": "bfloat16"}
    recipe("first", max_steps=2, **asked)
    ended, told = recipe("again", max_steps=2, resume="first", **asked)
    assert ended.reason is Reason.OK and losses(told) == []
    first, again = (report(tmp_path / name)["evaluation"]["metrics"][0]["tuned"] for name in ("first", "again"))
    assert again == pytest.approx(first, abs=1e-3)


def test_loftq_starts_nearer_to_the_base_than_nf4_alone(tiny_model: Path) -> None:
    """The logits of the quantised model with LoftQ's adapter are nearer to the whole model's."""
    ids = torch.arange(3, 40)[None]
    precision = choose_precision("cpu", "float32")
    away = {}
    with torch.no_grad():
        whole = load_base(str(tiny_model), Method.LORA, "cpu", precision)(ids).logits
        for start in ("default", "loftq"):
            base = load_base(str(tiny_model), Method.QLORA, "cpu", precision)
            model = add_adapter(base, _spec(tiny_model, lora={"r": 16, "init_lora_weights": start}), Method.QLORA)
            away[start] = float((model(ids).logits - whole).norm() / whole.norm())
    assert away["loftq"] < 0.8 * away["default"], away


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_and_holds_the_state_that_the_plan_counts(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Measured on the optimizer itself at the end of a run, per trained tensor."""
    from loractl.worker.engine import loop as module

    made: list[Any] = []
    make = module.make_optimizer
    monkeypatch.setattr(module, "make_optimizer", lambda *a: made.append(make(*a)) or made[-1])  # the real one, kept
    ended, told = recipe(max_steps=3, optim=optimizer, lora={"r": 64}, evaluation=HARDLY)
    assert ended.reason is Reason.OK and len(losses(told)) == 3
    held = [(parameter.numel(), _state_bytes(state)) for parameter, state in made[0].state.items()]
    if optimizer in ("sgd", "adafactor"):
        assert all(size <= elements for elements, size in held), "next to nothing"
        return
    assert any(elements >= SMALLEST_8BIT for elements, _ in held)
    for elements, size in held:
        assert size == pytest.approx(state_bytes(optimizer, elements), rel=0.1, abs=2200), (elements, size)


def _state_bytes(state: dict[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t) and t.numel() > 1)


def test_packed_examples_fill_rows_and_none_sees_another(tiny_model: Path) -> None:
    """The logits of every example in a packed row are those that it has alone."""
    rows = [_row(n, length) for n, length in enumerate((11, 30, 7, 25, 18, 3, 60, 14))]
    packs = pack(rows, 64)
    assert sum(len(p.input_ids) for p in packs) == sum(len(r.input_ids) for r in rows)
    assert len(packs) == 3 and max(len(p.input_ids) for p in packs) <= 64
    model = load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu", "float32")).eval()
    batch = collate([inputs_of(p) for p in packs], 0)
    assert "attention_mask" not in batch
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for place, row in enumerate(packs):
            borders = [0, *row.starts, len(row.input_ids)]
            for begin, end in itertools.pairwise(borders):
                alone = model(input_ids=batch["input_ids"][place : place + 1, begin:end]).logits[0]
                torch.testing.assert_close(together[place, begin:end], alone, rtol=1e-4, atol=1e-4)
                assert row.labels[begin] == IGNORED, "nothing of its own precedes an example's first token"


@pytest.mark.long
def test_packing_takes_fewer_steps_for_the_same_tokens(recipe: Recipe, tmp_path: Path) -> None:
    recipe("plain", max_steps=None, num_train_epochs=1, evaluation=HARDLY)
    recipe("packed", max_steps=None, num_train_epochs=1, packing=True, evaluation=HARDLY)
    plain, packed = report(tmp_path / "plain"), report(tmp_path / "packed")
    assert packed["training"]["steps"] < plain["training"]["steps"]
    assert packed["data"]["train_tokens"] == plain["data"]["train_tokens"]


def test_evaluating_in_mid_training_changes_no_bit_of_it(recipe: Recipe, tmp_path: Path) -> None:
    """Dropout of the steps after an evaluation is that of a training without one: a sweep with --early-stop, which
    sets eval_steps, trains as one without."""
    same = {"lora": {"lora_dropout": 0.2}, "evaluation": {"samples": 0}, "neftune_noise_alpha": 5}
    _, plain = recipe("plain", **same)
    _, told = recipe("evaluated", eval_steps=0.25, **same)
    assert len(losses(told, "eval_loss")) == 4 and not losses(plain, "eval_loss")
    assert losses(told) == losses(plain)
    files = [tmp_path / name / "result" / "adapter" / "adapter_model.safetensors" for name in ("plain", "evaluated")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_that_is_asked_for_is_taken(tiny_model: Path, attention: str) -> None:
    model = load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu"), attention=attention)
    assert model.config._attn_implementation == attention


@pytest.mark.long
def test_a_job_computes_with_its_attention_and_learns_the_same_but_for_rounding(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    calls, own = [], modeling_llama.eager_attention_forward

    def eager(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    found = {}
    for attention in ("sdpa", "eager"):
        _, told = recipe(attention, max_steps=3, attn_implementation=attention, evaluation={"samples": 1})
        found[attention] = losses(told)
        assert bool(calls) == (attention == "eager")
    assert len(found["eager"]) == 3 and found["eager"] == pytest.approx(found["sdpa"], rel=1e-3)


def test_what_a_worker_lacks_is_named(recipe: Recipe, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingFailed, match="flash_attention_2 needs a GPU of Ampere or newer"):
        load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu"), attention="flash_attention_2")
    with pytest.raises(TrainingFailed, match="float16 is for GPUs"):
        recipe(dtype="float16")
    with pytest.raises(TrainingFailed, match="the package wandb is not on this worker") as failure:
        recipe(report_to=["wandb"])
    assert failure.value.reason is Reason.BAD_SPEC


@pytest.mark.long
def test_a_compiled_model_learns_the_same(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda model, **how: compiled.append(how) or model
    )  # the compiler takes minutes
    _, told = recipe(torch_compile=True, max_steps=2, evaluation=HARDLY)
    assert len(losses(told)) == 2 and compiled


def test_a_box_without_a_compiler_says_what_it_lacks() -> None:
    """A whole model compiles in minutes; a sum fails in the same way."""
    lacking = {"cpp.cxx": (None, "g++-that-is-nowhere"), "force_disable_caches": True}
    with torch._inductor.config.patch(lacking), pytest.raises(Exception) as raised:
        torch.compile(lambda numbers: (numbers.sin() + 1).sum(), backend="inductor")(torch.ones(7))
    reason, sentence = explain(raised.value, own_limit=False)
    assert reason is Reason.BAD_SPEC, "another attempt would end the same way"
    assert sentence.startswith("training.torch_compile needs a compiler, which this box does not have: "), sentence


@pytest.mark.long
def test_tensorboard_s_files_are_stored_with_the_result(recipe: Recipe, tmp_path: Path) -> None:
    recipe("a", max_steps=2, report_to=["tensorboard"], evaluation=HARDLY)
    assert list((tmp_path / "a" / "result" / "tensorboard").glob("events.*"))


TRACKED: dict[str, Any] = {
    "report_to": ["wandb", "trackio"],
    "tracker": {"project": "tickets", "run_name": "first try"},
}


def test_trackers_are_told_the_job_s_project_and_run(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "the owner's")
    plain, tracked = start("a", report_to=["mlflow"]), start("b", **TRACKED)
    arguments = [training_arguments(one, one.spec, choose_precision("cpu")) for one in (plain, tracked)]
    assert [(one.run_name, one.project) for one in arguments] == [("tiny-1", "huggingface"), ("first try", "tickets")]
    name_project(plain.spec)
    assert os.environ["WANDB_PROJECT"] == "the owner's" and "MLFLOW_EXPERIMENT_NAME" not in os.environ
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    name_project(tracked.spec)
    assert os.environ["WANDB_PROJECT"] == os.environ["MLFLOW_EXPERIMENT_NAME"] == "tickets"


@pytest.mark.long
def test_a_run_of_wandb_and_trackio_has_the_job_s_names_and_losses(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both keep their runs in folders here: wandb offline, trackio as it does by default."""
    wandb = pytest.importorskip("wandb")
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _, told = recipe(max_steps=2, evaluation=HARDLY, **TRACKED)
    wandb.finish()  # as at the end of a trainer's process
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"tickets" in written and b"first try" in written
    assert written.count(b"train/loss") >= len(losses(told)) == 2
    (run,) = trackio.Api().runs("tickets")
    assert run.name == "first try"


def test_the_report_measures_what_was_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    asked = {"metrics": ["loss"], "samples": 1, "max_rows": 1, "max_new_tokens": 2, "per_device_eval_batch_size": 1}
    recipe("a", max_steps=1, evaluation=asked, eval_steps=1)
    recipe("b", max_steps=1, evaluation={"samples": 2, "max_new_tokens": 6})
    few, usual = report(tmp_path / "a"), report(tmp_path / "b")
    assert few["evaluation"]["rows"] == 1 < usual["evaluation"]["rows"]
    assert len(few["evaluation"]["answers"]) == 1 < len(usual["evaluation"]["answers"])
    assert "perplexity" not in {metric["name"] for metric in few["evaluation"]["metrics"]}
    assert "perplexity" in {metric["name"] for metric in usual["evaluation"]["metrics"]}
    assert few["training"]["per_device_eval_batch_size"] == 1
    assert len(few["evaluation"]["answers"][0]["base"]) < len(usual["evaluation"]["answers"][0]["base"])


@pytest.mark.long
def test_losses_checkpoints_and_evaluations_come_as_often_as_asked_for(recipe: Recipe) -> None:
    _, told = recipe(max_steps=6, logging_steps=2, save_steps=3, eval_steps=3, evaluation=HARDLY)
    assert [m.step for m in told if isinstance(m, Stepped) and "loss" in m.metrics] == [1, 2, 4, 6]
    assert [m.step for m in told if isinstance(m, Stepped) and "eval_loss" in m.metrics] == [3, 6]
    assert notes(told, "saved") == ["saved step 3", "saved step 6"]


ELSEWHERE = {
    "training.engine": "tests/integration/test_trial.py",
    "resources.cards": "tests/acceptance/test_gang_losses.py",
    "resources.parallel": "tests/acceptance/test_gang_losses.py",
    "name": "tests/acceptance/test_main_job.py",
    "task_type": "tests/integration/test_classify.py",
    "method": "tests/unit/worker/test_placement.py",
    "base_model": "tests/integration/test_data_check.py",
    "labels": "tests/unit/scheduler/status/test_text.py",
    "revision": "tests/acceptance/test_hub.py",
    "max_retries": "tests/unit/common/store/test_machine.py",
    "notify": "tests/unit/common/store/test_outbox.py",
    "after": "tests/unit/common/store/test_followers.py",
    "after_any": "tests/unit/common/store/test_followers.py",
    "publish": "tests/unit/scheduler/adapters/test_push.py",
    "priority": "tests/unit/worker/test_bad_boxes.py",
    "preemptible": "tests/unit/worker/test_bad_boxes.py",
    "lora_patience": "tests/unit/common/store/test_placing.py",
    "resources.max_vram": "tests/unit/common/store/test_claims.py",
    "resources.node_labels": "tests/unit/common/store/test_placing.py",
    "resources.time_limit": "tests/unit/worker/test_lifecycle.py",
    "dataset.path": "tests/acceptance/test_hub.py",
    "dataset.format": "tests/integration/test_data_check.py",
    "lora.init_from": "tests/integration/test_init_from.py",
    "dataset.template": "tests/integration/test_template.py",
    "dataset.columns": "tests/integration/test_data_check.py",
    "dataset.eval_path": "tests/integration/test_data_check.py",
    "dataset.on_overflow": "tests/integration/test_data_check.py",
    "dataset.on_bad_row": "tests/integration/test_data_check.py",
    "evaluation.regression": "tests/integration/test_evaluation.py",
    "evaluation.lm_eval": "tests/integration/test_harness.py",
    "evaluation.lm_eval_limit": "tests/integration/test_harness.py",
    "evaluation.decide_by": "tests/unit/worker/evaluation/test_own_metrics.py",
    "training.early_stopping_patience": "tests/integration/test_early_stopping.py",
    "training.load_best_model_at_end": "tests/integration/test_early_stopping.py",
    "training.gradient_checkpointing": "tests/integration/test_memory_trace.py",
    "dataset.fields": "tests/integration/test_turns.py",
    "dataset.ignore": "tests/integration/test_turns.py",
    "dataset.split": "tests/integration/test_sources.py",
    "dataset.more": "tests/integration/test_sources.py",
    "dataset.eval_split": "tests/integration/test_sources.py",
    "dataset.final_path": "tests/integration/test_evaluation.py",
    "dataset.final_size": "tests/integration/test_evaluation.py",
    "preference.loss_type": "tests/integration/test_preferences.py",
    "preference.loss_weights": "tests/integration/test_preferences.py",
    "preference.beta": "tests/integration/test_preferences.py",
    "preference.label_smoothing": "tests/integration/test_preferences.py",
    "preference.simpo_gamma": "tests/integration/test_preferences.py",
}
"""Keys whose effect another file's tests show."""


@pytest.mark.parametrize(
    "asked",
    [{}, {"exact": True, "label_smoothing_factor": 0.2}, {"packing": True}],
    ids=["lean", "exact and smoothed", "packed"],
)
def test_a_share_of_the_steps_evaluates_there_and_the_last_one_has_the_report_s_loss(
    recipe: Recipe, tmp_path: Path, asked: dict
) -> None:
    evaluation = {"samples": 0, "max_rows": 7, "per_device_eval_batch_size": 1}  # two rows, of unlike lengths
    _, told = recipe(max_steps=10, eval_steps=0.25, evaluation=evaluation, **asked)
    assert [m.step for m in told if isinstance(m, Stepped) and "eval_loss" in m.metrics] == [3, 6, 9, 10]
    (held_out,) = losses(told, HELD_OUT_LOSS)
    metrics = {metric["name"]: metric for metric in report(tmp_path / "a")["evaluation"]["metrics"]}
    assert held_out == pytest.approx(metrics["loss"]["tuned"])
    assert losses(told, "eval_loss")[-1] == pytest.approx(held_out, rel=2e-4), "the same rows, weighted alike"


def test_no_key_of_the_job_file_is_without_a_test_of_its_effect() -> None:
    """A new key has to be named here with the test that fails when it is ignored."""
    mine = Path(__file__).read_text().partition("ELSEWHERE = {")[0]
    for key in spec_keys():
        last = key.rpartition(".")[2]
        if key in ELSEWHERE:
            assert last in (Path(__file__).parents[2] / ELSEWHERE[key]).read_text(), f"{ELSEWHERE[key]}: {key}"
        else:
            assert re.search(rf'"{last}"|\b{last}=', mine), f"no test shows what {key} does"
    assert not ELSEWHERE.keys() - set(spec_keys())


def _row(number: int, length: int) -> TokenRow:
    ids = [3 + (number * 37 + n * 11) % 250 for n in range(length)]
    return TokenRow(number=number, input_ids=ids, labels=list(ids))


def _spec(model: Path, **sections: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "t", "base_model": str(model), "method": "qlora", "dataset": {"path": "a/b"}, **sections}
    )
