"""The recipe on tiny models in this process: what is learned, what a run leaves behind, and where it must refuse."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.data.prepared import prepare_data
from loractl.worker.data.token_findings import TokenLook
from loractl.worker.data.tokens import IGNORED, encode
from loractl.worker.engine.loss import learned_in
from loractl.worker.evaluation.row_losses import score_rows
from loractl.worker.protocol.marker import close_checkpoint, newest_checkpoint
from loractl.worker.protocol.messages import Note, Stepped

from ..models import write_helpdesk
from .conftest import Recipe

NOT_EVALUATED = {"samples": 0, "metrics": ["loss"]}
"""Of the evaluation no more than there must be: a test is about the training."""


def _losses(told: list) -> list[float]:
    return [m.metrics["loss"] for m in told if isinstance(m, Stepped) and "loss" in m.metrics]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_lowers_the_loss_and_leaves_adapter_report_and_resolved_job(
    recipe: Recipe, method: str, tmp_path: Path
) -> None:
    ended, told = recipe(method=method)
    assert ended.reason is Reason.OK
    losses = _losses(told)
    assert len(losses) == 8 and losses[-1] < losses[0]
    result = tmp_path / "a" / "result"
    assert {p.name for p in result.iterdir()} >= {"adapter", "report.json", "report.html", "job.json"}
    config = json.loads((result / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert not list(result.rglob("*.bin")), "weights are safetensors only"
    resolved = json.loads((result / "job.json").read_text())
    assert resolved["training_arguments"]["learning_rate"] == 5e-3


def test_the_report_holds_what_is_needed_to_run_it_again(recipe: Recipe, tmp_path: Path, tiny_model: Path) -> None:
    recipe(max_steps=None, num_train_epochs=2, per_device_train_batch_size=16, eval_steps=1)
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    assert JobSpec.model_validate(report["spec"]).base_model == str(tiny_model)
    assert report["base"]["commit"] is None
    weights = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert report["base"]["files"]["model.safetensors"] == weights
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= report["base"]["files"].keys()
    training = report["training"]
    assert training["tokens"] == 2 * report["data"]["train_tokens"]
    assert training["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "peft", "tokenizers", "loractl", "python"} <= report["versions"].keys()
    hashes = report["data"]["train_rows_sha256"], report["data"]["held_out_sha256"]
    assert len(set(hashes)) == 2 and all(len(one) == 64 for one in hashes)


@pytest.mark.long
def test_tokens_seen_count_from_the_first_step_after_a_resume_too(recipe: Recipe, tmp_path: Path) -> None:
    reports = []
    recipe("whole")
    recipe("first", stop_after=5)
    recipe("rest", resume="first")
    recipe("done", resume="whole")
    for where in ("whole", "rest", "done"):
        reports.append(json.loads((tmp_path / where / "result" / "report.json").read_text())["training"])
    assert reports[0]["tokens"] > 0
    assert [r["tokens"] for r in reports] == [reports[0]["tokens"]] * 3
    assert reports[1]["resumed_from_step"] >= 5


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(recipe: Recipe, method: str, tmp_path: Path) -> None:
    keys = {"method": method, "evaluation": NOT_EVALUATED}
    _, whole = recipe("whole", **keys)
    ended, _ = recipe("first", stop_after=5, **keys)
    assert ended.reason is Reason.DRAINED
    _, rest = recipe("rest", resume="first", **keys)
    resumed = next(m.resumed_from_step for m in rest if isinstance(m, Note) and m.kind == "resumed")
    assert 5 <= resumed < 8
    assert _losses(rest) == _losses(whole)[resumed:]
    assert _adapter(tmp_path / "whole") == _adapter(tmp_path / "rest")


def test_a_torn_newest_checkpoint_is_passed_over_for_an_older_whole_one(recipe: Recipe, tmp_path: Path) -> None:
    recipe("first", stop_after=6)
    saved = sorted((tmp_path / "first" / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert len(saved) == 2
    torn = saved[-1] / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    _, told = recipe("rest", resume="first", stop_after=5)
    assert next(m.resumed_from_step for m in told if isinstance(m, Note) and m.kind == "resumed") == 4


def test_a_checkpoint_that_does_not_fit_is_tried_once(recipe: Recipe, tmp_path: Path) -> None:
    """As after an upgrade of peft that names tensors otherwise: the next attempt goes on from the one before it."""
    recipe("first", stop_after=6)
    saved = sorted((tmp_path / "first" / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    path = saved[-1] / "adapter_model.safetensors"
    renamed = {name.replace("lora_A", "lora_Z", 1): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path)  # as many bytes, so that its marker holds
    with pytest.raises(TrainingFailed, match="the checkpoint's adapter is not that of this training"):
        recipe("second", resume="first")
    _, told = recipe("third", resume="first", stop_after=5)
    assert next(m.resumed_from_step for m in told if isinstance(m, Note) and m.kind == "resumed") == 4


@pytest.mark.long
def test_a_run_that_had_trained_to_its_end_is_evaluated_again_without_another_step(
    recipe: Recipe, tmp_path: Path
) -> None:
    """What follows a full artifact store: the training is done, and a step more would change the adapter."""
    _, whole = recipe("whole", max_steps=8)
    ended, again = recipe("again", max_steps=8, resume="whole")
    assert ended.reason is Reason.OK
    assert not _losses(again)
    assert _adapter(tmp_path / "again") == _adapter(tmp_path / "whole")
    report = json.loads((tmp_path / "again" / "result" / "report.json").read_text())
    assert report["training"]["steps"] == 8
    assert [loss for _, loss in report["training"]["losses"]] == pytest.approx(_losses(whole))


def test_tokens_per_second_count_real_tokens_of_short_last_batches_too(recipe: Recipe, tmp_path: Path) -> None:
    recipe(max_steps=None, num_train_epochs=2, per_device_train_batch_size=16, evaluation=NOT_EVALUATED)
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    training, tokens = report["training"], report["data"]["train_tokens"]
    assert training["tokens_per_second"] * training["seconds"] == pytest.approx(2 * tokens, rel=0.02)


def test_a_model_with_its_own_code_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    folder.mkdir()
    mark = tmp_path / "it-ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    (folder / "modeling.py").write_text(code)
    auto = {
        "AutoConfig": "modeling.Config",
        "AutoModelForCausalLM": "modeling.Model",
        "AutoTokenizer": ["modeling.T", None],
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "own-kind", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling.T", None]}}))
    with pytest.raises(TrainingFailed) as failure:
        load_tokenizer(str(folder))
    assert failure.value.reason is Reason.MODEL_NOT_FOUND
    with pytest.raises(TrainingFailed):
        load_base(str(folder), Method.LORA, "cpu", choose_precision("cpu"))
    assert not mark.exists()


def test_a_base_that_this_box_lacks_is_told_from_a_base_that_is_none(tmp_path: Path) -> None:
    """Another box may have it: the job is tried there."""
    (empty := tmp_path / "share").mkdir()
    (other := tmp_path / "other").mkdir()
    (other / "README.md").write_text("no model\n")
    said = {
        tmp_path / "gone": (Reason.BASE_MISSING, "there is no such folder on this box"),
        empty: (Reason.BASE_MISSING, "its folder is empty on this box"),
        other: (Reason.MODEL_NOT_FOUND, "is a folder without a model"),
    }
    for folder, (reason, sentence) in said.items():
        with pytest.raises(TrainingFailed, match=sentence) as failure:
            load_tokenizer(str(folder))
        assert failure.value.reason is reason


@pytest.mark.parametrize("name", ["tool\nuse", "../up", "t" * 233])
def test_a_chat_template_whose_name_no_store_takes_is_refused_before_the_first_step(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """Its file would be the adapter's, and could not be stored at the training's end."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    settings["chat_template"] = [{"name": "default", "template": "d"}, {"name": name, "template": "t"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainingFailed, match="has a chat template of the name") as failure:
        load_tokenizer(str(folder))
    assert failure.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.long
def test_a_cache_of_the_same_rows_in_another_file_does_not_mix_up_their_numbers(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    first = write_helpdesk(tmp_path / "d.jsonl")
    shifted = tmp_path / "shifted.jsonl"
    shifted.write_text("\n" + first.read_text())
    spec = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": {"path": "x.jsonl"}})
    for path in (first, shifted):
        data = prepare_data(spec.dataset, str(path), None, None, tokenizer, tmp_path / "cache")
        assert [r.number for r in data.held_out.rows] == [e.number for e in data.held_out.examples]


@pytest.mark.long
def test_rows_in_both_files_are_not_held_out(tiny_model: Path, tmp_path: Path) -> None:
    train_file, eval_file = write_helpdesk(tmp_path / "train.jsonl", 24), write_helpdesk(tmp_path / "eval.jsonl", 30)
    dataset = {"path": str(train_file), "eval_path": str(eval_file)}
    spec = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": dataset})
    tokenizer = load_tokenizer(str(tiny_model))
    data = prepare_data(spec.dataset, str(train_file), str(eval_file), None, tokenizer, None)
    assert len(data.held_out.rows) == 6
    assert data.facts()["overlap_rows_dropped"] == 24


def test_a_checkpoint_of_another_batch_size_is_not_resumed(recipe: Recipe) -> None:
    recipe("first", stop_after=5)
    _, told = recipe("rest", resume="first", per_device_train_batch_size=2, stop_after=1)
    assert not [m for m in told if isinstance(m, Note) and m.kind == "resumed"]


def test_a_checkpoint_without_its_marker_does_not_exist(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    assert newest_checkpoint([tmp_path], {"data": "x"}) is None
    close_checkpoint(folder, step=3, finished=False, belongs_to={"data": "x"})
    found = newest_checkpoint([tmp_path], {"data": "x"})
    assert found is not None and found.step == 3
    assert newest_checkpoint([tmp_path], {"data": "another"}) is None


def test_an_exploding_learning_rate_ends_as_diverged(recipe: Recipe) -> None:
    with pytest.raises(TrainingFailed) as failure:
        recipe(
            learning_rate=0.99,
            max_grad_norm=1e30,
            max_steps=60,
            optim="sgd",
            weight_decay=0.0,
            lora={"lora_alpha": 1e30},
        )
    assert failure.value.reason is Reason.DIVERGED


def test_the_default_warm_up_leaves_one_step_to_learn_in(recipe: Recipe, tmp_path: Path) -> None:
    ended, _ = recipe(max_steps=1, evaluation=NOT_EVALUATED)
    assert ended.reason is Reason.OK
    saved = load_file(tmp_path / "a" / "result" / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_training_that_changed_no_weight_is_not_trained(recipe: Recipe, tmp_path: Path, resumed: bool) -> None:
    """A warm-up as long as the training: the rate of its only step is 0. No submit takes such a job file."""
    keys = {"max_steps": 1, "warmup_steps": 1, "evaluation": NOT_EVALUATED}
    for where in ("first", "again")[: 1 + resumed]:
        with pytest.raises(TrainingFailed, match="the training has changed no weight") as failed:
            recipe(where, resume="first" if where == "again" else None, **keys)
        assert failed.value.reason is Reason.NOT_TRAINED
        assert not (tmp_path / where / "result" / "adapter").exists()


def test_unknown_target_modules_name_the_right_ones(recipe: Recipe) -> None:
    with pytest.raises(
        TrainingFailed, match="c_attn is not a linear layer of this model; it has down_proj, gate_proj"
    ) as failure:
        recipe(lora={"target_modules": ["q_proj", "c_attn"]})
    assert failure.value.reason is Reason.BAD_SPEC


def test_named_target_modules_are_the_only_ones_adapted(recipe: Recipe, tmp_path: Path) -> None:
    recipe(lora={"target_modules": ["q_proj", "v_proj"]}, max_steps=1, evaluation=NOT_EVALUATED)
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    assert report["adapter"]["modules"] == ["q_proj", "v_proj"]


def test_accumulated_batches_learn_like_one_large_batch(recipe: Recipe) -> None:
    keys = {"max_steps": 4, "lora": {"lora_dropout": 0.0}, "evaluation": NOT_EVALUATED}
    _, whole = recipe("whole", per_device_train_batch_size=4, **keys)
    _, parts = recipe("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **keys)
    # bf16 rounds sums in another order; answers of different lengths must still weigh by tokens
    assert _losses(parts) == pytest.approx(_losses(whole), rel=5e-3)


def test_loss_falls_on_answers_alone_and_the_end_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    spec = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": {"path": "x.jsonl"}})
    data = prepare_data(spec.dataset, str(write_helpdesk(tmp_path / "d.jsonl")), None, None, tokenizer, None)
    row, examples = data.held_out.rows[0], data.held_out.examples
    learned = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(learned) == f"{examples[0].turns[1].content}<|im_end|>"
    assert row.input_ids.count(tokenizer.bos_token_id) == 2, "one <|im_start|> a message, none doubled"
    assert encode(examples[0], tokenizer, data.format) == [row]


def test_a_text_s_first_token_is_never_counted_as_learned(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing precedes it, and this tokenizer puts no BOS there: ten texts of 181 tokens teach 171."""
    tokenizer, file = load_tokenizer(str(tiny_model)), tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"A text of its own, number {n}"}) + "\n" for n in range(20)), "utf-8")
    spec = JobSpec.model_validate({"name": "t", "base_model": str(tiny_model), "dataset": {"path": str(file)}})
    data, look = prepare_data(spec.dataset, str(file), None, None, tokenizer, None), TokenLook(spec, tokenizer)
    rows = data.train.rows
    for row in rows:
        look.see([row])
    assert learned_in(rows) == data.train.tokens - len(rows)
    assert data.facts()["supervised_tokens"] == sum(look.learned) == learned_in(rows)


def test_the_loss_of_a_row_is_the_mean_over_its_learned_tokens(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    spec = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": {"path": "x.jsonl"}})
    data = prepare_data(spec.dataset, str(write_helpdesk(tmp_path / "d.jsonl")), None, None, tokenizer, None)
    model = load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu")).float()
    rows = data.train.rows[:5]
    with torch.no_grad():
        scores = score_rows(model, tokenizer, rows, batch=5)
        for n, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            assert math.isclose(scores.loss[n] / scores.tokens[n], float(alone), rel_tol=1e-4)


def _adapter(folder: Path) -> dict[str, bytes]:
    weights = load_file(folder / "result" / "adapter" / "adapter_model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in weights.items()}


def test_the_log_is_for_people(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    """Each line has the time and the stage; steps with loss, rate and what is left; long phases say what they do."""
    _, told = recipe(max_steps=3, eval_steps=2)
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if "{'" in line], "no raw dicts"
    form = re.compile(r"\d\d:\d\d:\d\d (preparing|training|evaluating) +\S")
    ours = [line for line in lines if form.match(line)]
    text = "\n".join(ours)
    step = r"training +step 2 of 3  loss \d+\.\d{4}  \d+ tok/s  \S.* left"
    assert re.search(step, text), text
    assert text.index("step 2 of 3  evaluates the held-out rows") < text.index("step 2 of 3  held-out loss")
    assert re.search(r"training +step 2 of 3  held-out loss \d+\.\d{4}", text), text
    phases = [m.text for m in told if isinstance(m, Note) and m.kind == "phase"]
    assert [text.split(" ")[0] for text in phases] == ["loads", "trains:", "evaluates", "evaluates"], phases
    assert "the base" in phases[2] and "the tuned model" in phases[3]
    assert all(phase in text for phase in phases), "the log has what the history has"


def test_a_warning_of_a_library_stands_in_the_log_once_and_on_one_line() -> None:
    say = "import logging, warnings; from loractl.worker.base.quiet import quieten, tell_once; quieten(); tell_once();"
    say += "log = logging.getLogger('transformers.trainer');"
    say += "[(log.warning('cut\\nin two'), warnings.warn('old name', UserWarning)) for _ in range(3)]"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, timeout=120, check=True)
    told = [re.sub(r"^\d\d:\d\d:\d\d", "TIME", line) for line in done.stderr.splitlines()]
    assert told == ["TIME warning    transformers: cut in two", "TIME warning    python: old name (UserWarning)"]
