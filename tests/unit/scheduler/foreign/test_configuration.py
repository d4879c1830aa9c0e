"""Configurations in Axolotl's and LLaMA-Factory's form become job files; nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loractl.common.errors import LoractlError, SpecError
from loractl.common.job.file import load_spec
from loractl.common.job.method import Method
from loractl.common.job.sections import AS_WRITTEN, DataFormat, PromptTemplate
from loractl.common.job.spec import JobSpec
from loractl.scheduler.cli.main import cli
from loractl.scheduler.foreign.configuration import import_file

from ....conftest import examples

AXOLOTL = """
base_model: org/small-1b
model_type: AutoModelForCausalLM
load_in_4bit: true
strict: false
chat_template: chatml
datasets:
  - path: tickets.jsonl
    ds_type: json
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: who, content: said}
    roles_to_train: [assistant]
    name: part
dataset_prepared_path: cache
val_set_size: 0.05
output_dir: ./outputs/tickets
adapter: qlora
sequence_len: 1536
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.1
lora_target_modules: [q_proj, v_proj]
lora_target_linear: true
peft_use_rslora: true
gradient_accumulation_steps: 8
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: one_cycle
learning_rate: 2e-4
bf16: auto
tf32: true
gradient_checkpointing: unsloth
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
early_stopping_patience: 3
weight_decay: 0.01
wandb_project: tickets
wandb_name: first
special_tokens: {pad_token: "<|end|>"}
unheard_of: 7
"odd\\e[2J\\nkey: 1": 1
"""

FACTORY = """
model_name_or_path: org/small-1b
trust_remote_code: true
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset_dir: sets
dataset: tickets,identity
template: chatml
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
output_dir: saves/tickets
report_to: none
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 2.0
max_steps: 40
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 20
neat_packing: true
flash_attn: fa2
loraplus_lr_ratio: 16.0
"""


AXOLOTL_PAIRS = """
base_model: org/small-1b
adapter: lora
rl: dpo
dpo_loss_type: [robust, sft]
dpo_loss_weights: [1.0, 0.5]
dpo_label_smoothing: 0.1
rl_beta: 0.2
trl: {beta: 0.3}
cpo_alpha: 0.5
simpo_gamma: 1.0
sample_packing: true
datasets:
  - {path: o/d, type: chatml.intel, field_chosen: good}
  - {path: o/e, type: {field_prompt: ask, prompt_format: "{prompt}"}}
"""

FACTORY_PAIRS = """
model_name_or_path: org/small-1b
stage: dpo
pref_loss: simpo
pref_beta: 2.0
pref_ftx: 0.5
simpo_gamma: 1.0
dpo_label_smoothing: 0.1
dataset: pairs
"""


def test_an_axolotl_file_becomes_a_job_and_every_key_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "tickets.jsonl").write_text("{}\n")
    told, spec = imported(tmp_path, AXOLOTL)
    assert told["tool"] == "Axolotl"
    assert spec.method is Method.QLORA and spec.base_model == "org/small-1b" and spec.name == "theirs"
    assert spec.dataset.path == str(tmp_path / "tickets.jsonl")
    assert spec.dataset.columns == {"messages": "talk", "role": "who", "content": "said"}
    assert (spec.dataset.max_length, spec.dataset.test_size) == (1536, 0.05)
    assert (spec.lora.r, spec.lora.lora_alpha, spec.lora.lora_dropout) == (32, 16, 0.1)
    assert spec.lora.target_modules == "all-linear" and spec.lora.use_rslora
    training = spec.training
    assert (training.num_train_epochs, training.learning_rate, training.weight_decay) == (2, 2e-4, 0.01)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 8)
    assert told["filled_in"] == {"training.per_device_train_batch_size": 1, "dataset.on_overflow": "drop"}, "not ours"
    assert training.packing and training.gradient_checkpointing and training.attn_implementation == "flash_attention_2"
    assert (training.optim, training.report_to, training.warmup_steps) == ("paged_adamw_8bit", ["wandb"], 0.1)
    assert told["left_out"].keys() == {
        "chat_template", "lr_scheduler", "unheard_of", "datasets[0].name",
        "odd\x1b[2J\nkey: 1",
    }  # fmt: skip
    assert (training.eval_steps, training.early_stopping_patience) == (1 / 8, 3), "4 times in each of 2 epochs"
    assert told["otherwise"] == {"wandb_project": '"tickets": the worker needs wandb and an account'}
    assert (training.tracker.project, training.tracker.run_name) == ("tickets", "first")
    accounted(told, AXOLOTL, "resume_from_checkpoint")


def test_a_llama_factory_file_becomes_a_job_with_its_listed_data(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "tickets.json").write_text("[]")
    entry = {"file_name": "tickets.json", "columns": {"prompt": "question", "response": "output", "history": "before"}}
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps({"tickets": entry}))
    told, spec = imported(tmp_path, FACTORY)
    assert told["tool"] == "LLaMA-Factory" and spec.method is Method.QLORA
    assert spec.dataset.path == str(tmp_path / "sets" / "tickets.json")
    assert spec.dataset.columns == {"instruction": "question"} and spec.dataset.split == "train[:1000]"
    (identity,) = spec.dataset.more
    assert (identity.path, identity.split, identity.columns) == ("identity", "train[:1000]", {})
    assert (spec.lora.r, spec.lora.lora_alpha, spec.lora.lora_dropout) == (16, 32, 0)
    assert spec.lora.target_modules == ["q_proj", "v_proj"]
    training = spec.training
    assert (training.max_steps, training.num_train_epochs) == (40, None), "max_steps overrules, as in transformers"
    assert (training.per_device_train_batch_size, training.lr_scheduler_type) == (8, "cosine")
    assert (training.dtype, training.packing, training.eval_steps) == ("bfloat16", True, 20)
    assert told["left_out"].keys() == {
        "dataset: identity", "template", "loraplus_lr_ratio",
        "dataset_info.json: columns.history",
    }  # fmt: skip
    accounted(told, FACTORY)


def test_conversations_of_a_listed_data_set_keep_their_tags(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "human", "assistant_tag": "gpt"}
    entry = {"hf_hub_url": "org/talks", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"talks": entry}))
    _, spec = imported(tmp_path, "model_name_or_path: a/b\nfinetuning_type: lora\ndataset: talks\n")
    assert spec.dataset.path == "org/talks" and spec.method is Method.LORA
    assert spec.dataset.columns == {"conversations": "talk", "from": "who", "value": "said"}
    assert (spec.lora.r, spec.training.learning_rate, spec.dataset.max_length) == (8, 5e-5, 2048)


def test_columns_and_text_of_an_axolotl_data_set_are_named(tmp_path: Path) -> None:
    fields = "{field_instruction: q, field_output: a, format: 'Q: {instruction}'}"
    told, spec = imported(tmp_path, f"base_model: a/b\nadapter: lora\ndatasets: [{{path: o/d, type: {fields}}}]\n")
    assert spec.dataset.columns == {"instruction": "q", "output": "a"}
    assert "format" in told["left_out"]["datasets[0].type"]
    _, spec = imported(
        tmp_path, "base_model: a/b\nadapter: lora\ndatasets: [{path: o/d, type: completion, field: body}]\n"
    )
    assert spec.dataset.format is DataFormat.TEXT and spec.dataset.columns == {"text": "body"}


SHORT = "base_model: a/b\nadapter: lora\nval_set_size: 0.1\ndatasets: [{path: o/d, type: alpaca}]\n"
LISTED = "model_name_or_path: a/b\nval_size: 0.1\nbf16: true\ndataset: rows\n"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("bf16: false", "training.dtype", "float32"),
        ("bf16: false\nfp16: true", "training.dtype", "float16"),
        ("", "training.dtype", "auto"),
        ("", "dataset.on_overflow", "drop"),
        ("excess_length_strategy: truncate", "dataset.on_overflow", "truncate"),
        ("excess_length_strategy: raise", "dataset.on_overflow", "error"),
        ("eval_steps: 20", "training.eval_steps", 20),
        ("eval_strategy: no\neval_steps: 20", "training.eval_steps", None),
        ("eval_strategy: epoch\nnum_epochs: 4", "training.eval_steps", 0.25),
        ("evals_per_epoch: 2\nnum_epochs: 2", "training.eval_steps", 0.25),
        ("evals_per_epoch: 1\nnum_epochs: 1", "training.eval_steps", None),
        ("evals_per_epoch: 4\nval_set_size: 0", "training.eval_steps", None),
        ("eval_steps: 20\nval_set_size: 0", "training.eval_steps", None),
    ],
)
def test_what_axolotl_does_by_a_setting_or_unasked_is_carried(
    tmp_path: Path, line: str, key: str, value: object
) -> None:
    theirs = "".join(SHORT.splitlines(keepends=True)[:2]) if "val_set_size" in line else SHORT
    theirs += SHORT.splitlines()[3] + "\n" if "val_set_size" in line else ""
    told, spec = imported(tmp_path, f"{theirs}{line}\n")
    section, name = key.split(".")
    assert getattr(getattr(spec, section), name) == value
    accounted(told, f"{theirs}{line}\n")


def test_what_axolotl_does_otherwise_is_named(tmp_path: Path) -> None:
    told, _ = imported(tmp_path, SHORT.replace("val_set_size: 0.1\n", "wandb_project: mine\n"))
    assert "a tenth" in told["otherwise"]["val_set_size"] and '"mine"' in told["otherwise"]["wandb_project"]
    assert load_spec(tmp_path / "jobs" / "job.yaml").dataset.template is PromptTemplate.ALPACA
    assert "datasets[0].type" not in told["otherwise"], "the prompt is carried"
    told, spec = imported(tmp_path, SHORT.replace("alpaca", "completion"))
    assert "into several rows" in told["otherwise"]["datasets[0].type"]
    assert spec.dataset.on_overflow.value == "truncate", "a dropped text would be lost whole"
    account = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml")])
    assert (
        "Done differently here:\n  datasets[0].type" in account.stderr and "# Done differently here: " in account.stdout
    )


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ("{user: [human, user], assistant: [gpt, assistant], system: [system]}", "not_needed"),
        ("{user: [caller], assistant: [gpt]}", "left_out"),
        ("{user: [gpt], assistant: [human]}", "left_out"),
    ],
)
def test_names_of_roles_that_are_read_the_same_need_no_setting(tmp_path: Path, roles: str, told: str) -> None:
    kind = f"type: chat_template, field_messages: conversations, roles: {roles}"
    account, _ = imported(tmp_path, SHORT.replace("type: alpaca", kind))
    assert "datasets[0].roles" in account[told]


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("eval_steps: 20", "training.eval_steps", None),
        ("eval_steps: 20\neval_strategy: no", "training.eval_steps", None),
        ("eval_steps: 20\neval_strategy: steps", "training.eval_steps", 20),
        ("eval_strategy: epoch\nnum_train_epochs: 4", "training.eval_steps", 0.25),
        ("stage: pt", "dataset.columns", {"text": "body"}),
        ("stage: pt", "dataset.format", DataFormat.TEXT),
        ("stage: pt", "training.packing", True),
        ("stage: pt\npacking: false", "training.packing", False),
        ("stage: sft", "dataset.columns", {"instruction": "body"}),
    ],
)
def test_what_llama_factory_does_by_a_setting_or_unasked_is_carried(
    tmp_path: Path, line: str, key: str, value: object
) -> None:
    told, spec = imported(tmp_path, listed(tmp_path, {"prompt": "body"}) + line + "\n")
    section, name = key.split(".")
    assert getattr(getattr(spec, section), name) == value
    accounted(told, f"{LISTED}{line}\n")


def test_what_llama_factory_does_otherwise_is_named(tmp_path: Path) -> None:
    told, _ = imported(tmp_path, listed(tmp_path, {"prompt": "body"}) + "template: qwen\npacking: true\n")
    assert told["otherwise"].keys() == {"cutoff_len", "template", "packing", "dataset_info.json: columns.query"}
    assert told["otherwise"]["dataset_info.json: columns.query"].endswith("line, loractl after an empty line")
    told, _ = imported(tmp_path, listed(tmp_path, {"prompt": "body"}) + "template: alpaca\n")
    assert "under ### Input:," in told["otherwise"]["dataset_info.json: columns.query"]
    told, _ = imported(tmp_path, listed(tmp_path, {"prompt": "body"}) + "stage: pt\n")
    assert told["otherwise"].keys() == {"packing", "stage"} and told["filled_in"]["training.packing"] is True
    told, _ = imported(tmp_path, "model_name_or_path: a/b\ndataset: rows\n")
    assert "the base's own number format" in told["otherwise"]["bf16"] and "a tenth" in told["otherwise"]["val_size"]


def listed(folder: Path, columns: dict[str, str]) -> str:
    """A LLaMA-Factory file, and what its dataset_info.json says of its rows."""
    (folder / "data").mkdir(exist_ok=True)
    entry = {"hf_hub_url": "o/d", "columns": columns}
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    return LISTED


def test_a_list_of_axolotl_s_data_sets_is_one_job(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    theirs = """
base_model: a/b
adapter: lora
val_set_size: 0.1
datasets:
  - {path: a.jsonl, type: chat_template, field_messages: talk}
  - {path: json, data_files: [b.jsonl, c.jsonl], type: alpaca, split: 'train[:5%]'}
  - {path: o/d, revision: v1, type: chat_template, field_messages: talk, split: train_sft}
test_datasets:
  - {path: o/d, type: chat_template, field_messages: talk, split: 'test[:100]'}
"""
    told, spec = imported(tmp_path, theirs)
    assert (spec.dataset.path, spec.dataset.columns) == (str(tmp_path / "a.jsonl"), {"messages": "talk"})
    assert told["job"]["dataset"]["more"] == [
        {"path": "../b.jsonl", "split": "train[:5%]", "format": "alpaca", "columns": {}},
        {"path": "../c.jsonl", "split": "train[:5%]", "format": "alpaca", "columns": {}},
        {"path": "o/d@v1", "split": "train_sft"},
    ]
    assert (spec.dataset.eval_path, spec.dataset.eval_split) == ("o/d", "test[:100]")
    assert not told["left_out"] and "dataset.template" in told["otherwise"]["datasets[1]"]
    accounted(told, theirs)


def test_names_of_columns_that_a_job_file_does_not_take_are_left_out_together(tmp_path: Path) -> None:
    entry = "- {path: a.jsonl, type: {field_instruction: q}, message_field_role: 5}"
    told, spec = imported(tmp_path, f"base_model: org/m\nadapter: lora\ndatasets:\n  {entry}\n")
    assert spec.dataset.columns == {}
    assert {"datasets[0].type", "datasets[0].message_field_role"} <= told["left_out"].keys()


def test_llama_factory_s_data_sets_are_interleaved_by_shares(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    talks = {"hf_hub_url": "o/talks", "formatting": "sharegpt", "split": "train_sft"}
    sets = {"rows": {"hf_hub_url": "o/d", "columns": {"prompt": "body"}}, "talks": talks}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(sets))
    theirs = LISTED.replace("dataset: rows", "dataset: rows,talks\neval_dataset: talks\nmix_strategy: interleave_under")
    told, spec = imported(tmp_path, theirs + "interleave_probs: 0.7,0.3\n")
    assert told["job"]["dataset"]["more"] == [{"path": "o/talks", "split": "train_sft", "share": 0.3, "columns": {}}]
    assert "loractl takes all rows of dataset.path" in told["otherwise"]["mix_strategy"]
    assert (spec.dataset.eval_path, spec.dataset.eval_split) == ("o/talks", "train_sft")
    told, _ = imported(tmp_path, theirs + "interleave_probs: 0.7\n")
    assert "is not a number above 0 for each data set" in told["left_out"]["interleave_probs"]


def test_a_training_on_pictures_is_refused(tmp_path: Path) -> None:
    for text, what in (
        (SHORT + "processor_type: AutoProcessor\n", "pictures or sound (processor_type)"),
        (LISTED + "image_max_pixels: 262144\nvideo_max_pixels: 16384\n", "(image_max_pixels, video_max_pixels)"),
        (listed(tmp_path, {"prompt": "body", "images": "images"}), "rows has images, but loractl trains only on text"),
    ):
        (tmp_path / "theirs.yaml").write_text(text)
        refused = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml")])
        assert refused.exit_code != 0 and what in str(refused.exception)


def test_an_expression_for_modules_is_carried_as_it_stands(tmp_path: Path) -> None:
    expression = r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj{1,2}"
    theirs = f"base_model: a/b\nadapter: lora\ndatasets: [{{path: o/d}}]\nlora_target_modules: '{expression}'\n"
    told, spec = imported(tmp_path, theirs)
    assert spec.lora.target_modules == expression and "lora_target_modules" in told["carried"]
    told, spec = imported(tmp_path, theirs.replace("model.language", "(?<=model).language"))
    assert spec.lora.target_modules == "all-linear" and "a kind of bracket" in told["left_out"]["lora_target_modules"]


def test_the_job_file_is_printed_and_the_account_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(AXOLOTL)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml")])
    assert result.exit_code == 0
    job = yaml.safe_load(result.stdout)
    assert job["training"]["learning_rate"] == 2e-4
    assert list(job) == ["name", "base_model", "method", "dataset", "lora", "training"]
    assert result.stdout.startswith("# From Axolotl's theirs.yaml, by loractl import. Left out: chat_template, ")
    assert "key" not in job and "\x1b" not in result.stdout + result.stderr, "a key steers neither file nor terminal"
    assert "Left out, so the training is not quite the same:" in result.stderr
    assert "  lr_scheduler " in result.stderr and " dataset_prepared_path, " in result.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base_model: a/b\ndatasets: [{path: o/d}]\n", "trains all weights"),
        ("base_model: a/b\nrl: kto\nadapter: lora\ndatasets: [{path: o/d}]\n", "has rl: kto"),
        ("base_model: a/b\nadapter: lora\ndatasets: []\n", "names no data set"),
        ("model_name_or_path: a/b\nstage: kto\n", "has stage: kto"),
        ("model_name_or_path: a/b\nfinetuning_type: full\ndataset: d\n", "finetuning_type: full"),
        ("model_name_or_path: a/b\n", "names no data set"),
        ("name: job\n", "neither Axolotl's nor LLaMA-Factory's"),
    ],
)
def test_what_is_no_fine_tune_of_an_adapter_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml"), "-o", str(tmp_path / "job.yaml")])
    assert result.exit_code != 0 and sentence in str(result.exception)
    assert not (tmp_path / "job.yaml").exists()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), text=st.sampled_from([AXOLOTL, FACTORY, AXOLOTL_PAIRS, FACTORY_PAIRS]))
def test_whatever_a_setting_holds_it_is_carried_left_out_or_refused(
    tmp_path: Path, data: st.DataObject, text: str
) -> None:
    """A value of any kind at any place: a job file that is valid, or a sentence."""
    theirs = yaml.safe_load(text)
    place: Any = theirs
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(ANYTHING)
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(theirs))
    try:
        made = import_file(file, tmp_path)
    except LoractlError:
        return
    JobSpec.model_validate(made.job, context=AS_WRITTEN)


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=ANYTHING | st.fixed_dictionaries({"file_name": ANYTHING, "columns": ANYTHING, "tags": ANYTHING,
                                               "formatting": ANYTHING | st.just("sharegpt")}))  # fmt: skip
def test_whatever_a_listing_of_data_sets_holds_there_is_a_job_or_a_sentence(tmp_path: Path, entry: object) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"talks": entry}))
    file = tmp_path / "theirs.yaml"
    file.write_text("model_name_or_path: a/b\ndataset: talks\n")
    try:
        made = import_file(file, tmp_path)
    except LoractlError:
        return
    JobSpec.model_validate(made.job, context=AS_WRITTEN)


@pytest.mark.parametrize("text", [None, "- a\n", "a: [b\n", "a" * (256 * 1024 + 1)])
def test_a_file_that_can_not_be_read_is_not_told_of_as_a_job_file(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "theirs.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SpecError) as caught:
        import_file(file, tmp_path)
    for problem in caught.value.problems:
        assert "job file" not in f"{problem} {problem.hint}" and "examples/" not in f"{problem.hint}"


def test_a_job_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(AXOLOTL)
    (tmp_path / "job.yaml").write_text("mine")
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml"), "-o", str(tmp_path / "job.yaml")])
    assert "exists already" in str(result.exception) and (tmp_path / "job.yaml").read_text() == "mine"


def imported(folder: Path, text: str) -> tuple[dict[str, Any], JobSpec]:
    """What the command says of the file, and the job that its job file is."""
    (folder / "theirs.yaml").write_text(text)
    (folder / "jobs").mkdir(exist_ok=True)
    target = folder / "jobs" / "job.yaml"
    target.unlink(missing_ok=True)
    result = CliRunner().invoke(cli, ["import", str(folder / "theirs.yaml"), "-o", str(target), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), load_spec(target)


def accounted(told: dict[str, Any], text: str, *unset: str) -> None:
    """Every key of their file stands in one of the lists."""
    named = {*told["carried"], *told["left_out"], *told["not_needed"], *told["otherwise"]}
    assert yaml.safe_load(text).keys() - named == set(unset)
