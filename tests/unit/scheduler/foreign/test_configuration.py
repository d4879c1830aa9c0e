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

from loractl.common.errors import LoractlError, SpecError, UsageError
from loractl.common.job.file import load_spec
from loractl.common.job.method import Method
from loractl.common.job.sections import AS_WRITTEN, DataFormat, PromptTemplate
from loractl.common.job.spec import JobSpec
from loractl.scheduler.cli.main import cli
from loractl.scheduler.foreign.configuration import Imported, import_file

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
    assert training.tracker.project == "tickets"
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
        "dataset: identity", "template", "loraplus_lr_ratio", "tickets: history", "trust_remote_code",
    }  # fmt: skip
    accounted(told, FACTORY)


def test_a_data_set_that_is_named_several_times_is_read_as_often(tmp_path: Path) -> None:
    told, spec = imported(tmp_path, FACTORY.replace("tickets,identity", "tickets, identity, identity, ,identity,"))
    assert [more.path for more in spec.dataset.more] == ["identity"] * 3, "a comma too many names nothing"
    assert {key for key, ours in told["carried"].items() if ours == "dataset.more"} == {
        "dataset: identity", "dataset: identity (3)", "dataset: identity (4)",
    }  # fmt: skip
    told, spec = imported(tmp_path, f"{LISTED}\n".replace("rows", "[rows, {}, {}]".format('"\\0"', '"\\0"')))
    assert spec.dataset.path == "rows" and not spec.dataset.more, "what a job file refuses is left out, each time"


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
        ("eval_strategy: epoch\nnum_epochs: 4", "training.eval_steps", 0.25),
        ("evals_per_epoch: 2\nnum_epochs: 2", "training.eval_steps", 0.25),
        ("evals_per_epoch: 1\nnum_epochs: 1", "training.eval_steps", None),
        ("evals_per_epoch: 4\nval_set_size: 0", "training.eval_steps", None),
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


def test_a_long_text_is_cut_not_dropped(tmp_path: Path) -> None:
    _, spec = imported(tmp_path, SHORT)
    assert spec.dataset.template is PromptTemplate.ALPACA
    _, spec = imported(tmp_path, SHORT.replace("alpaca", "completion"))
    assert spec.dataset.on_overflow.value == "truncate", "a dropped text would be lost whole"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
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
    assert told["left_out"].keys() == {"datasets[1]: template"}
    accounted(told, theirs)


def test_a_training_on_pictures_is_refused(tmp_path: Path) -> None:
    for text, what in (
        (SHORT + "processor_type: AutoProcessor\n", "has processor_type"),
        (LISTED + "image_max_pixels: 262144\nvideo_max_pixels: 16384\n", "has image_max_pixels"),
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
    assert result.stdout.startswith("# From Axolotl's theirs.yaml, by loractl import. Not carried: chat_template, ")
    assert "key" not in job and "\x1b" not in result.stdout + result.stderr, "a key steers neither file nor terminal"
    assert "Not carried, so the training may not be quite the same:" in result.stderr
    assert "  lr_scheduler " in result.stderr and " dataset_prepared_path, " in result.stderr


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


@pytest.mark.parametrize(
    "text",
    [
        "base_model: a/b\nadapter: lora\ndatasets: [{path: o/d, type: [null]}]\n",
        f"base_model: a/b\nadapter: lora\ndatasets: [{{path: {'d' * 300}}}]\n",
    ],
)
def test_a_value_of_another_kind_or_a_name_that_no_file_has_is_carried_or_left_out(tmp_path: Path, text: str) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    assert import_file(file, tmp_path).job["base_model"] == "a/b"


def test_a_folder_with_a_name_that_no_folder_can_have_gets_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(f"model_name_or_path: a/b\ndataset: talks\ndataset_dir: {'d' * 300}\n")
    with pytest.raises(UsageError, match=r"can't be read: .*too long"):
        import_file(file, tmp_path)


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


AXOLOTL_ROWS = """
base_model: a/b
adapter: lora
val_set_size: 0.1
warmup_ratio: 0.1
lora_target_linear: true
optimizer: adamw_torch
datasets: [{path: o/d, type: alpaca}]
"""
FACTORY_ROWS = "model_name_or_path: a/b\nval_size: 0.1\nbf16: true\ndataset: rows\ntemplate: tokenizer_default\n"
RANKED = {"hf_hub_url": "o/d", "ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
DPO = AXOLOTL_ROWS.replace("type: alpaca", "type: chat_template.default") + "rl: dpo\n"


def with_lines(text: str, lines: str) -> str:
    """A file with these lines, in place of its own lines of the same keys."""
    keys = {line.partition(":")[0] for line in lines.splitlines()}
    kept = [line for line in text.splitlines() if line.partition(":")[0] not in keys]
    return "\n".join([*kept, lines]) + "\n"


def import_text(folder: Path, text: str, entry: dict[str, Any] | None = None) -> Imported:
    """What import makes of a file; `entry`: what dataset_info.json says of its rows."""
    if entry is not None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    (folder / "theirs.yaml").write_text(text)
    return import_file(folder / "theirs.yaml", folder)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("attn_implementation: sdpa", "training.attn_implementation", "sdpa"),
        ("flash_attention: true", "training.attn_implementation", "flash_attention_2"),
        ("optimizer: paged_adamw_8bit", "training.optim", "adamw_8bit"),
        ("optimizer: paged_adamw_32bit", "training.optim", "adamw_torch"),
        ("gradient_checkpointing: offload", "training.gradient_checkpointing", True),
        ("datasets: [{path: o/d, revision: v2, type: alpaca}]", "dataset.path", "o/d@v2"),
        ("datasets: [{path: json, data_files: [x/rows.jsonl], type: alpaca}]", "dataset.path", "x/rows.jsonl"),
    ],
)
def test_axolotl_s_setting_is_carried(tmp_path: Path, line: str, key: str, value: object) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL_ROWS, line))
    section, name = key.split(".")
    assert made.job[section][name] == value
    assert not made.left_out


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        (
            AXOLOTL_ROWS + "liger_rms_norm: true\nlora_qkv_kernel: true\ncut_cross_entropy: true\nuse_kernels: true\n",
            None,
        ),
        (
            AXOLOTL_ROWS + "plugins: [axolotl.integrations.liger.LigerPlugin]\nspecial_tokens: {pad_token: '<pad>'}\n",
            None,
        ),
        (AXOLOTL_ROWS + "use_ray: true\nddp_find_unused_parameters: true\notel_metrics_port: 1\ntf32: true\n", None),
        (AXOLOTL_ROWS + "fsdp: []\nplugins: []\ndeepspeed: ''\nattn_implementation: flex_attention\n", None),
        (FACTORY_ROWS + "enable_liger_kernel: true\npredict_with_generate: true\nquantization_method: bnb\n", {}),
        (FACTORY_ROWS + "pissa_init: false\npissa_iter: 16\ndouble_quantization: true\nuse_unsloth: true\n", {}),
    ],
)
def test_what_changes_nothing_that_is_learned_is_not_called_left_out(
    tmp_path: Path, text: str, entry: dict[str, Any] | None
) -> None:
    made = import_text(tmp_path, text, None if entry is None else {"hf_hub_url": "o/d"})
    assert not made.left_out, "kernels, padding, and where it runs"


@pytest.mark.parametrize(
    ("line", "key", "what"),
    [
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "plugins", "SpectrumPlugin"),
        ("resume_from_checkpoint: out/checkpoint-9", "resume_from_checkpoint", "a fresh adapter"),
        ("special_tokens: {eos_token: '<end>', pad_token: '<pad>'}", "special_tokens", "chat template"),
        ("use_dft: true", "use_dft", "true"),
        ("load_in_8bit: true", "load_in_8bit", "16 bit (lora) or NF4 (qlora)"),
        ("gptq: true", "gptq", "name the original model"),
        ("fsdp: [full_shard]", "fsdp", "resources.cards"),
        ("trust_remote_code: true", "trust_remote_code", "LORACTL_TRUSTED_CODE"),
        ("optimizer: muon", "optimizer", "default"),
        ("val_set_size: 0", "val_set_size", "a tenth"),
        ("val_set_size: 200", "val_set_size", "a tenth"),
        ("datasets: [{path: o/d, type: alpaca, split: 'train[:5'}]", "datasets: split", "is not a split"),
        ("datasets: [{path: o/d, type: alpaca, name: en}]", "datasets[0].name", "en"),
        ("datasets: [{path: o/d, type: alpaca, data_files: [x/rows.json]}]", "datasets[0].data_files", "whole split"),
        ("datasets: [{path: o/d, type: odd.kind}]", "datasets[0].type", "by their columns"),
    ],
)
def test_what_is_not_carried_is_named_with_what_it_says(tmp_path: Path, line: str, key: str, what: str) -> None:
    assert what in import_text(tmp_path, with_lines(AXOLOTL_ROWS, line)).left_out[key]


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (
            "datasets: [{path: o/d, type: chat_template}, {path: o/e, type: alpaca}]",
            {"datasets[1]: template": '"alpaca": the job\'s dataset.template, "chat", is for all of its rows'},
        ),
        (
            "datasets: [{path: o/d, type: alpaca}, {path: o/e, type: completion}, {path: o/f, type: alpaca}]",
            {
                "datasets[1]: template": '"chat": the job\'s dataset.template, "alpaca", is for all of its rows',
                "datasets[1]: on_overflow": '"truncate": '
                'the job\'s dataset.on_overflow, "drop", is for all of its rows',
            },
        ),
        (
            "datasets: [{path: o/d, type: completion}, {path: o/e, type: chat_template}]",
            {"datasets[1]: on_overflow": '"drop": the job\'s dataset.on_overflow, "truncate", is for all of its rows'},
        ),
        (
            "datasets: [{path: o/d, type: completion}, {path: o/e, type: chat_template}]\nexcess_length_strategy: drop",
            {"datasets: on_overflow": '"truncate": the job\'s dataset.on_overflow, "drop", is for all of its rows'},
        ),
        (
            "test_datasets: [{path: o/e, type: alpaca}, {path: o/f, type: alpaca}]",
            {"test_datasets[1]": '"o/f": a job has one data set of held-out rows: put all of them into one file'},
        ),
        (
            "test_datasets: [{path: json, data_files: [x/b.jsonl, x/c.jsonl], type: alpaca}]",
            {
                "test_datasets[0].data_files": '["x/c.jsonl"]: '
                "a job has one data set of held-out rows: put all of them into one file"
            },
        ),
        (
            "test_datasets: [{path: o/e, type: chat_template, field_messages: talk, name: en}]",
            {
                "test_datasets[0].name": '"en"',
                "test_datasets: format": '"auto": the job\'s dataset.format, "alpaca", is for all of its rows',
                "test_datasets: columns": '{"messages": "talk"}: '
                "the job's dataset.columns, {}, is for all of its rows",
                "test_datasets: template": '"chat": the job\'s dataset.template, "alpaca", is for all of its rows',
            },
        ),
    ],
)
def test_what_the_first_data_set_decides_for_another_is_named(tmp_path: Path, line: str, left: dict[str, str]) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL_ROWS, line))
    assert made.left_out == left
    assert not made.left_out.keys() & made.carried.keys()


def test_further_held_out_rows_of_llama_factory_are_named_and_so_are_columns_that_are_not_the_first_s(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    listing = {"rows": {"hf_hub_url": "o/d"}, "b": {"hf_hub_url": "o/e", "columns": {"prompt": "question"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({**listing, "a": {"hf_hub_url": "o/f"}}))
    made = import_text(tmp_path, with_lines(FACTORY_ROWS, "eval_dataset: b,a"))
    assert made.job["dataset"]["eval_path"] == "o/e"
    assert made.left_out == {
        "eval_dataset: a": '"a": a job has one data set of held-out rows: put all of them into one file',
        "eval_dataset: columns": '{"instruction": "question"}: the job\'s dataset.columns, {}, is for all of its rows',
    }
    for said in ("template: alpaca", "stage: pt\npacking: false"):
        alike = import_text(tmp_path, with_lines(FACTORY_ROWS, f"{said}\ndataset: rows,a\neval_dataset: a"))
        assert not alike.left_out, "it is said for all of them"


@pytest.mark.parametrize(
    ("lines", "steps", "unneeded"),
    [
        ("warmup_ratio: 0.1\nwarmup_steps: 0", 0.1, "warmup_steps"),
        ("warmup_steps: 0\nwarmup_ratio: 0.1", 0.1, "warmup_steps"),
        ("warmup_ratio: 0.1\nwarmup_steps: 20", 20, "warmup_ratio"),
        ("warmup_steps: 0", 0, None),
    ],
)
@pytest.mark.parametrize("text", [AXOLOTL_ROWS.replace("warmup_ratio: 0.1\n", ""), FACTORY_ROWS])
def test_a_warm_up_of_no_steps_leaves_it_to_the_ratio_and_one_of_some_overrules_it(
    tmp_path: Path, text: str, lines: str, steps: float, unneeded: str | None
) -> None:
    made = import_text(tmp_path, with_lines(text, lines), {"hf_hub_url": "o/d"})
    assert made.job["training"]["warmup_steps"] == steps
    assert unneeded not in made.carried and (unneeded is None or unneeded in made.not_needed)


def test_a_llama_factory_file_without_its_finetuning_type_has_an_optimizer(tmp_path: Path) -> None:
    made = import_text(tmp_path, FACTORY_ROWS + "optim: paged_adamw_8bit\n", {"hf_hub_url": "o/d"})
    assert (made.job["method"], made.job["training"]["optim"]) == ("lora", "adamw_8bit")


@pytest.mark.parametrize(
    "lines", ["wandb_project: foo\nuse_tensorboard: true", "use_tensorboard: true\nwandb_project: foo"]
)
def test_every_place_for_the_curves_is_carried(tmp_path: Path, lines: str) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL_ROWS, lines + "\nuse_mlflow: true"))
    assert made.job["training"]["report_to"] == ["wandb", "tensorboard", "mlflow"]
    assert made.job["training"]["tracker"] == {"project": "foo"}
    assert made.carried["use_tensorboard"] == "training.report_to" and not made.left_out


def test_a_section_that_is_refused_is_left_out_with_each_of_its_keys(tmp_path: Path) -> None:
    lines = "rl: dpo\ndpo_loss_type: [sigmoid, hinge]\ndpo_loss_weights: [1.0]\ndpo_beta: 0.2"
    made = import_text(tmp_path, with_lines(DPO, lines))
    assert {"dpo_loss_type", "dpo_loss_weights"} <= made.left_out.keys()
    assert "loss_weights has 1 for 2 of loss_type" in made.left_out["dpo_loss_weights"]


def test_an_entry_that_is_refused_takes_no_other_with_it(tmp_path: Path) -> None:
    entries = ", ".join(f"{{path: {path}, type: alpaca}}" for path in ("o/d", "o/e", "''", "o/f"))
    made = import_text(tmp_path, with_lines(AXOLOTL_ROWS, f"datasets: [{entries}]"))
    assert [each["path"] for each in made.job["dataset"]["more"]] == ["o/e", "o/f"]
    assert "at least 1 character" in made.left_out["datasets[2]"] and "datasets[2]" not in made.carried
    assert made.carried["datasets[3]"] == "dataset.more"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("packing: true\nneat_packing: false", True),
        ("neat_packing: true", True),
        ("packing: false", False),
        ("packing: false\nneat_packing: true", True),
    ],
)  # fmt: skip
def test_llama_factory_s_two_kinds_of_packing_are_one_setting(tmp_path: Path, line: str, what: bool) -> None:
    made = import_text(tmp_path, FACTORY_ROWS + line + "\n", {"hf_hub_url": "o/d"})
    assert made.job["training"]["packing"] is what


def test_a_qlora_file_of_llama_factory_without_an_optimizer_gets_that_tool_s_own(tmp_path: Path) -> None:
    made = import_text(tmp_path, FACTORY_ROWS + "quantization_bit: 4\n", {"hf_hub_url": "o/d"})
    assert made.filled_in["training.optim"] == "adamw_torch_fused"


def test_a_listing_is_found_where_the_tool_is_started(tmp_path: Path) -> None:
    """Their examples stand two folders below the data, and are started from above."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"rows": {"hf_hub_url": "o/d"}}))
    below = tmp_path / "examples" / "train_lora"
    below.mkdir(parents=True)
    (below / "theirs.yaml").write_text(FACTORY_ROWS)
    assert import_file(below / "theirs.yaml", tmp_path).job["dataset"]["path"] == "o/d"


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        (with_lines(AXOLOTL_ROWS, "datasets: [{path: o/d}, {type: alpaca}]"), "without its path", "needs a path"),
        (AXOLOTL_ROWS + "rl: kto\n", "has rl: kto", "take rl out"),
        (AXOLOTL_ROWS + "gkd_trainer: true\n", "has gkd_trainer", "rows with answers"),
        (AXOLOTL_ROWS + "plugins: [axolotl.integrations.kd.KDPlugin]\n", "KDPlugin", "rows with answers"),
        (AXOLOTL_ROWS + "model_type: AutoModelForTokenClassification\n", "TokenClassification", "SEQ_CLS"),
        (AXOLOTL_ROWS.replace("lora\n", "ia3\n", 1), "has adapter: ia3", "adapter: lora"),
        (AXOLOTL_ROWS.replace("adapter: lora\n", ""), "trains all weights", "adapter: lora"),
        (AXOLOTL_ROWS + "processor_type: AutoProcessor\n", "has processor_type", "only on text"),
        ("base_model: a/b\nadapter: lora\ndatasets: []\n", "names no data set", "streamed rows"),
        ("model: a/b\ntrain_dataset: rows.yaml\n", "neither Axolotl's nor", "model_name_or_path"),
        ("model_name_or_path: a/b\nexport_dir: d\n", "names no data set", "dataset_info.json"),
        ("model_name_or_path: a/b\nstage: kto\ndataset: d\n", "stage: kto", "stage: sft"),
        (FACTORY_ROWS + "finetuning_type: full\n", "finetuning_type: full", "finetuning_type: lora"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why_and_what_to_do(tmp_path: Path, text: str, sentence: str, hint: str) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(LoractlError) as refused:
        import_file(tmp_path / "theirs.yaml", tmp_path)
    assert sentence in str(refused.value) and hint in str(refused.value.hint)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml")])
    assert result.exit_code != 0 and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("lines", "preference", "left"),
    [
        ("", {}, []),
        ("rl: IPO\nrl_beta: 0.2", {"loss_type": "ipo", "beta": 0.2}, []),
        ("rl: orpo\norpo_alpha: 0.3", {"loss_type": "orpo", "beta": 0.3}, []),
        ("rl: orpo\norpo_alpha: 0.3\nrl_beta: 0.4", {"loss_type": "orpo", "beta": 0.4}, []),
        ("trl: {beta: 0.5}\nrl_beta: 0.4", {"beta": 0.4}, ["trl"]),
        ("dpo_beta: 0.2", {"beta": 0.2}, []),
        ("rl: simpo\ncpo_alpha: 0\nsimpo_gamma: 1.0", {"loss_type": "simpo", "simpo_gamma": 1.0}, []),
        ("rl: simpo\ncpo_alpha: 0.5", {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5]}, []),
        ("rl: simpo", {"loss_type": ["simpo", "sft"]}, []),
        ("dpo_loss_type: [hinge]\nsimpo_gamma: 1.0", {"loss_type": "hinge"}, ["simpo_gamma"]),
        ("dpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1.0, 0.2]",
         {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, []),
        ("dpo_loss_type: [robust]\ndpo_label_smoothing: 0.1", {"loss_type": "robust", "label_smoothing": 0.1}, []),
        ("dpo_loss_type: [robust]", {"loss_type": "sigmoid"}, []),
        ("dpo_label_smoothing: 0.1", {}, ["dpo_label_smoothing"]),
        ("rpo_alpha: 0.2", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, []),
        ("dpo_loss_type: [apo_zero]", {}, ["dpo_loss_type"]),
        ("dpo_use_weighting: true", {}, ["dpo_use_weighting"]),
        ("precompute_ref_log_probs: true\ndpo_padding_free: true\nmax_prompt_len: 512\nlora_dropout: 0.1", {}, []),
    ],
)  # fmt: skip
def test_axolotl_s_losses_of_pairs_are_carried(
    tmp_path: Path, lines: str, preference: dict[str, Any], left: list[str]
) -> None:
    made = import_text(tmp_path, with_lines(DPO, lines))
    assert made.job["task_type"] == "preference" and made.job.get("preference", {}) == preference
    assert sorted(made.left_out) == left
    assert made.job["lora"]["lora_dropout"] == 0, "TRL switches dropout off"


@pytest.mark.parametrize(
    ("entry", "columns"),
    [
        ("type: chat_template.default, field_messages: talk, field_chosen: good, field_rejected: bad",
         {"messages": "talk", "chosen": "good", "rejected": "bad"}),
        ("type: chat_template.argilla", {}),
        ("type: chat_template.default, message_property_mappings: {role: from, content: value}",
         {"role": "from", "content": "value"}),
        ("type: chatml.intel", {"instruction": "question"}),
        ("type: llama3.icr", {"instruction": "input"}),
        ("type: chatml.prompt_pairs", {"instruction": "prompt"}),
        ("type: chatml.argilla", {"chosen": "chosen_response", "rejected": "rejected_response"}),
        ("type: chatml.argilla_chat", {}),
        ("type: llama3.ultra", {}),
        ("type: chatml.default", {"instruction": "prompt"}),
        ("type: passthrough", {}),
        ("type: {field_prompt: ask, field_chosen: good, field_rejected: bad}",
         {"prompt": "ask", "chosen": "good", "rejected": "bad"}),
    ],
)  # fmt: skip
def test_axolotl_s_types_of_pairs_are_carried(tmp_path: Path, entry: str, columns: dict[str, str]) -> None:
    made = import_text(tmp_path, with_lines(DPO, f"datasets: [{{path: o/d, {entry}}}]"))
    assert made.job["dataset"].get("columns", {}) == columns and not made.left_out
    assert made.job["dataset"].get("format") == ("preference_text" if "field_prompt" in entry else None)


@pytest.mark.parametrize(
    ("lines", "preference", "left"),
    [
        ("", {}, []),
        ("pref_loss: sigmoid\npref_beta: 0.2", {"loss_type": "sigmoid", "beta": 0.2}, []),
        ("pref_loss: hinge\nlora_dropout: 0.1\npacking: true", {"loss_type": "hinge"}, ["packing"]),
        ("pref_loss: ipo\nsimpo_gamma: 1.0", {"loss_type": "ipo"}, ["simpo_gamma"]),
        ("pref_loss: simpo\nsimpo_gamma: 1.0", {"loss_type": "simpo", "simpo_gamma": 1.0}, []),
        ("pref_loss: orpo", {"loss_type": "orpo"}, []),
        ("pref_loss: orpo\npref_ftx: 0.2", {"loss_type": "orpo"}, ["pref_ftx"]),
        ("pref_ftx: 0.2", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, []),
        ("pref_ftx: 0.0", {}, []),
        ("pref_loss: kto_pair", {}, ["pref_loss"]),
        ("dpo_label_smoothing: 0.1", {}, ["dpo_label_smoothing"]),
        ("ref_model: a/c\nld_alpha: 0.5\npref_bco_weight: 0.1", {}, ["ld_alpha", "pref_bco_weight", "ref_model"]),
    ],
)  # fmt: skip
def test_llama_factory_s_losses_of_pairs_are_carried(
    tmp_path: Path, lines: str, preference: dict[str, Any], left: list[str]
) -> None:
    made = import_text(tmp_path, with_lines(FACTORY_ROWS, f"stage: dpo\n{lines}"), RANKED)
    assert made.job["task_type"] == "preference" and made.job.get("preference", {}) == preference
    assert sorted(made.left_out) == left
    assert made.job["lora"]["lora_dropout"] == 0 and "packing" not in made.job["training"]
    assert made.job["training"]["learning_rate"] == 5e-5, "its default, not the kind's"


@pytest.mark.parametrize(
    ("entry", "columns"),
    [
        (RANKED, {}),
        ({**RANKED, "columns": {"prompt": "ask", "query": "", "chosen": "good", "rejected": "bad"}},
         {"instruction": "ask", "chosen": "good", "rejected": "bad"}),
        ({**RANKED, "formatting": "sharegpt"}, {}),
        ({**RANKED, "formatting": "sharegpt", "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
          "tags": {"role_tag": "role", "content_tag": "content"}},
         {"messages": "talk", "chosen": "good", "rejected": "bad"}),
    ],
)  # fmt: skip
def test_a_listing_s_pairs_are_read_by_their_names(
    tmp_path: Path, entry: dict[str, Any], columns: dict[str, str]
) -> None:
    made = import_text(tmp_path, with_lines(FACTORY_ROWS, "stage: dpo"), entry)
    assert made.job["dataset"].get("columns", {}) == columns and not made.left_out


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
    named = {*told["carried"], *told["left_out"], *told["not_needed"]}
    assert yaml.safe_load(text).keys() - named == set(unset)
