"""What the tools' own examples hold, in small: each setting is carried, named with what it changes, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loractl.common.errors import LoractlError
from loractl.common.job.method import Method
from loractl.scheduler.cli.main import cli
from loractl.scheduler.foreign.configuration import Imported, import_file

AXOLOTL = """
base_model: a/b
adapter: lora
val_set_size: 0.1
warmup_ratio: 0.1
lora_target_linear: true
optimizer: adamw_torch
datasets: [{path: o/d, type: alpaca}]
"""
QLORA = AXOLOTL.replace("lora\n", "qlora\n", 1)
FACTORY = "model_name_or_path: a/b\nval_size: 0.1\nbf16: true\ndataset: rows\ntemplate: tokenizer_default\n"


def with_lines(text: str, lines: str) -> str:
    """A file with these lines, in place of its own lines of the same keys."""
    keys = {line.partition(":")[0] for line in lines.splitlines()}
    kept = [line for line in text.splitlines() if line.partition(":")[0] not in keys]
    return "\n".join([*kept, lines]) + "\n"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("batch_size: 16\nmicro_batch_size: 4", "training.gradient_accumulation_steps", 4),
        ("batch_size: 16", "training.gradient_accumulation_steps", 16),
        ("batch_size: 16\ngradient_accumulation_steps: 2", "training.gradient_accumulation_steps", 2),
        ("attention: flash", "training.attn_implementation", "flash_attention_2"),
        ("attention: sdpa", "training.attn_implementation", "sdpa"),
        ("optimizer: paged_adamw_8bit", "training.optim", "adamw_8bit"),
        ("optimizer: paged_adamw_32bit", "training.optim", "adamw_torch"),
        ("warmup_steps: 1", "training.warmup_steps", 2),
        ("datasets: [{path: o/d, revision: v2, type: alpaca}]", "dataset.path", "o/d@v2"),
        ("datasets: [{path: json, data_files: [x/rows.jsonl], type: alpaca}]", "dataset.path", "x/rows.jsonl"),
    ],
)  # fmt: skip
def test_axolotl_s_setting_is_carried(tmp_path: Path, line: str, key: str, value: object) -> None:
    theirs = with_lines(AXOLOTL, line)
    made = import_text(tmp_path, theirs)
    section, name = key.split(".")
    assert made.job[section][name] == value
    assert not made.left_out and not made.otherwise


@pytest.mark.parametrize(
    "line",
    [
        "liger_rms_norm: true\nlora_qkv_kernel: true\ncut_cross_entropy: true\nfused_attn_kernel: true",
        "plugins: [axolotl.integrations.liger.LigerPlugin, axolotl.integrations.kernels.KernelsPlugin]",
        "use_ray: true\nray_num_workers: 1\nddp_find_unused_parameters: true\notel_metrics_port: 1",
        "special_tokens: {pad_token: '<pad>'}",
        "special_tokens: {}\nfsdp: []\nplugins: []\ndeepspeed: ''",
        "tokenizer_config: a/b\nbase_model_config: a/b",
        "tf32: true",
        "attn_implementation: flex_attention",
        "save_steps: 0.25",
        "context_parallel_size: 1\nresume_from_checkpoint: false\ntest_value: true\nactivation_offloading: true",
    ],
)  # fmt: skip
def test_what_changes_nothing_that_is_learned_is_not_called_left_out(tmp_path: Path, line: str) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL, line))
    assert not made.left_out and not made.otherwise, "kernels, padding, and where it runs"


@pytest.mark.parametrize(
    ("line", "key", "what"),
    [
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "plugins", "SpectrumPlugin"),
        ("tokenizer_config: other/tokens", "tokenizer_config", "the base model's own"),
        ("resume_from_checkpoint: out/checkpoint-9", "resume_from_checkpoint", "a fresh adapter"),
        ("special_tokens: {eos_token: '<end>', pad_token: '<pad>'}", "special_tokens", "as it is"),
        ("expert_parallel_size: 2", "expert_parallel_size", "one card"),
        ("lora_target_parameters: [experts.up_proj]", "lora_target_parameters", "share one tensor"),
        ("use_dft: true", "use_dft", "cross-entropy"),
        ("eot_tokens: ['<end>']", "eot_tokens", "chat template"),
        ("bnb_config_kwargs: {bnb_4bit_use_double_quant: false}", "bnb_config_kwargs", "double"),
        ("optimizer: muon", "optimizer", "its own default"),
        ("val_set_size: 200", "val_set_size", "a tenth"),
        ("datasets: [{path: o/d, type: alpaca, split: 'train[:5'}]", "datasets[0].split", "is not a split"),
        ("datasets: [{path: o/d, type: alpaca}, {path: o/e, type: completion}]", "datasets[1]", "can't be mixed"),
        ("datasets: [{path: o/d, type: alpaca, name: en}]", "datasets[0].name", "default"),
        ("datasets: [{path: o/d, type: alpaca, data_files: [x/rows.json]}]", "datasets[0].data_files", "whole split"),
        ("test_datasets: [{path: o/d, type: chat_template}]", "test_datasets[0].type", "as the rows to train on"),
        ("test_datasets: [{path: o/d}, {path: o/e}]", "test_datasets[1:]", "one data set"),
    ],
)  # fmt: skip
def test_what_axolotl_does_otherwise_is_named_with_what_it_changes(
    tmp_path: Path, line: str, key: str, what: str
) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL, line))
    assert what in made.left_out[key]


def test_an_entry_that_is_refused_takes_no_other_with_it(tmp_path: Path) -> None:
    entries = ", ".join(f"{{path: {path}, type: alpaca}}" for path in ("o/d", "o/e", "''", "o/f"))
    made = import_text(tmp_path, with_lines(AXOLOTL, f"datasets: [{entries}]"))
    assert [each["path"] for each in made.job["dataset"]["more"]] == ["o/e", "o/f"]
    assert "at least 1 character" in made.left_out["datasets[2]"] and "datasets[2]" not in made.carried
    assert made.carried["datasets[3]"] == "dataset.more"


@pytest.mark.parametrize(
    ("line", "key", "what"),
    [
        ("deepspeed: zero3.json", "deepspeed", "resources.cards"),
        ("fsdp: [full_shard]\nfsdp_config: {x: 1}\nfsdp_version: 2\ndeepspeed: z.json", "deepspeed", "resources.cards"),
        ("loss_watchdog_threshold: 5.0\nloss_watchdog_patience: 3", "loss_watchdog_threshold", "not a number"),
        ("trust_remote_code: true", "trust_remote_code", "LORACTL_TRUSTED_CODE"),
        ("val_set_size: 0", "val_set_size", "holds out no rows, loractl always holds out a tenth"),
        ("optimizer: adamw_torch_8bit", "optimizer", "bitsandbytes' in loractl"),
        ("bf16: false\ntf32: true", "tf32", "to TF32, loractl does not"),
        ("gptq: true", "gptq", "name the original model; method: qlora"),
        ("base_model: o/Small-7B-AWQ", "base_model", "in 4 bit by AWQ"),
    ],
)  # fmt: skip
def test_what_is_another_here_though_it_is_carried_or_changes_nothing_that_is_learned_is_told_apart(
    tmp_path: Path, line: str, key: str, what: str
) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL, line))
    assert list(made.otherwise) == [key] and what in made.otherwise[key] and not made.left_out


def test_a_base_in_4_bit_by_others_becomes_qlora_of_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    assert import_text(tmp_path, with_lines(AXOLOTL, "gptq: true")).job["method"] == Method.QLORA
    assert import_text(tmp_path, with_lines(AXOLOTL, "gptq: false")).job["method"] == Method.LORA


def test_what_axolotl_does_unasked_is_carried_or_named(tmp_path: Path) -> None:
    unset = AXOLOTL.replace("warmup_ratio: 0.1\n", "").replace("lora_target_linear: true\n", "")
    made = import_text(tmp_path, unset)
    assert (
        "at most 100" in made.otherwise["warmup_ratio"] and "every linear layer" in made.otherwise["lora_target_linear"]
    )
    made = import_text(tmp_path, QLORA.replace("optimizer: adamw_torch\n", ""))
    assert made.filled_in["training.optim"] == "adamw_torch_fused", "loractl's own choice for QLoRA is another"
    made = import_text(tmp_path, with_lines(QLORA, "bnb_config_kwargs: {bnb_4bit_use_double_quant: true}"))
    assert made.job["method"] == Method.QLORA and not made.left_out, "as loractl's NF4 is"


@pytest.mark.parametrize(
    ("line", "method", "said"),
    [
        ("peft: {backend: torchao, weight_dtype: int4}", "qlora", "NF4 of bitsandbytes"),
        ("peft: {backend: torchao, weight_dtype: nf4, group_size: 32}", "qlora", "NF4 of bitsandbytes"),
        ("peft: {backend: bnb, weight_dtype: nf4}", "qlora", None),
        ("peft: {backend: bnb, weight_dtype: int8}", "lora", "16 bit (lora) or NF4 (qlora)"),
        ("peft: {loftq_config: {loftq_bits: 4}}", "lora", "it is for method: qlora"),
        ("peft: {loftq_config: {loftq_bits: 2}}\nload_in_4bit: true", "qlora", "LoftQ starts from NF4"),
        ("peft: {shape: odd}", "lora", "16 bit (lora) or NF4 (qlora)"),
        ("model_quantization_config: {backend: torchao, weight_dtype: int4}", "qlora", "NF4 of bitsandbytes"),
        ("model_quantization_config: FineGrainedFP8Config", "lora", "16 bit (lora) or NF4 (qlora)"),
        ("load_in_8bit: true", "lora", "16 bit (lora) or NF4 (qlora)"),
        ("qat: {weight_dtype: int4}", "lora", "not rounded during training"),
    ],
)  # fmt: skip
def test_a_base_in_few_bits_is_nf4_here_or_named(tmp_path: Path, line: str, method: str, said: str | None) -> None:
    made = import_text(tmp_path, with_lines(AXOLOTL, line))
    key = line.partition(":")[0]
    assert made.job["method"] == method
    told = made.left_out.get(key) or made.otherwise.get(key)
    assert told is None if said is None else said in (told or "")


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
    made = import_text(tmp_path, FACTORY + line + "\n", {"hf_hub_url": "o/d"})
    assert made.job["training"]["packing"] is what


@pytest.mark.parametrize(
    ("line", "entry", "key", "what"),
    [
        ("double_quantization: false\nquantization_bit: 4", {}, "double_quantization", "double"),
        ("quantization_type: fp4\nquantization_bit: 4", {}, "quantization_type", "NF4"),
        ("quantization_method: hqq\nquantization_bit: 4", {}, "quantization_method", "bitsandbytes"),
        ("upcast_layernorm: true", {}, "upcast_layernorm", "fp32"),
        ("resume_from_checkpoint: saves/9", {}, "resume_from_checkpoint", "a fresh adapter"),
        ("pure_bf16: true", {}, "pure_bf16", "fp32"),
        ("use_swanlab: true", {}, "use_swanlab", "tensorboard"),
        ("", {"num_samples": 100}, "dataset_info.json: num_samples", "every row"),
        ("max_samples: 10", {"split": "train[:50%]"}, "max_samples", "not a number of rows of the split"),
        ("", {"subset": "en"}, "dataset_info.json: subset", "default"),
        (
            "",
            {"formatting": "sharegpt", "tags": {"user_tag": "caller"}},
            "dataset_info.json: tags.user_tag",
            "caller",
        ),
    ],
)  # fmt: skip
def test_what_llama_factory_does_otherwise_is_named_with_what_it_changes(
    tmp_path: Path, line: str, entry: dict[str, Any], key: str, what: str
) -> None:
    made = import_text(tmp_path, with_lines(FACTORY, line), {"hf_hub_url": "o/d", **entry})
    assert what in {**made.left_out, **made.otherwise}[key]


def test_what_changes_nothing_in_a_llama_factory_file_is_not_called_left_out(tmp_path: Path) -> None:
    lines = "enable_liger_kernel: true\nray_num_workers: 1\npredict_with_generate: true\nquantization_method: bnb\n"
    lines += "push_to_hub: false\npissa_init: false\npissa_iter: 16\ndouble_quantization: true\nuse_unsloth: true\n"
    assert not import_text(tmp_path, FACTORY + lines, {"hf_hub_url": "o/d"}).left_out


def test_a_qlora_file_of_llama_factory_without_an_optimizer_gets_that_tool_s_own(tmp_path: Path) -> None:
    made = import_text(tmp_path, FACTORY + "quantization_bit: 4\n", {"hf_hub_url": "o/d"})
    assert made.filled_in["training.optim"] == "adamw_torch_fused"


def test_plain_text_is_named_to_the_token(tmp_path: Path) -> None:
    """stage: pt, as its processor and transformers' Trainer do it (docs/commands.md, "The same losses")."""
    made = import_text(tmp_path, FACTORY + "stage: pt\npacking: false\n", {"hf_hub_url": "o/d"})
    assert "padding token" in made.otherwise["stage"] and "first token" in made.otherwise["stage"]
    assert "packing" not in made.otherwise and "cutoff_len" not in made.otherwise, "a longer text is cut in both"
    made = import_text(tmp_path, FACTORY + "stage: pt\n", {"hf_hub_url": "o/d"})
    assert "1,000 texts" in made.otherwise["packing"]
    other = FACTORY.replace("tokenizer_default", "llama3") + "stage: pt\npacking: false\n"
    assert "ends a text" in import_text(tmp_path, other, {"hf_hub_url": "o/d"}).left_out["template"]


def test_a_listing_is_found_where_the_tool_is_started(tmp_path: Path) -> None:
    """Their examples stand two folders below the data, and are started from above."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"rows": {"hf_hub_url": "o/d"}}))
    below = tmp_path / "examples" / "train_lora"
    below.mkdir(parents=True)
    (below / "theirs.yaml").write_text(FACTORY)
    assert import_file(below / "theirs.yaml", tmp_path).job["dataset"]["path"] == "o/d"


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        (with_lines(AXOLOTL, "datasets: [{path: o/d}, {type: alpaca}]"), "without its path", "needs a path"),
        (AXOLOTL + "rl: kto\n", "has rl: kto", "rows with answers"),
        (AXOLOTL + "rl: grpo\n", "has rl: grpo", "rows with answers"),
        (AXOLOTL + "gkd_trainer: true\n", "has gkd_trainer", "rows with answers"),
        (AXOLOTL + "block_diffusion: {canvas_length: 8}\n", "has block_diffusion", "rows with answers"),
        (AXOLOTL + "plugins: [axolotl.integrations.kd.KDPlugin]\n", "KDPlugin", "rows with answers"),
        (AXOLOTL + "model_type: AutoModelForTokenClassification\n", "TokenClassification", "SEQ_CLS"),
        (AXOLOTL.replace("lora\n", "ia3\n", 1), "trains an ia3 adapter", "adapter: lora"),
        (AXOLOTL + "processor_type: AutoProcessor\n", "pictures or sound", "only text"),
        ("base_model: a/b\nadapter: lora\npretraining_dataset: [{path: o/d}]\nmicro_batch_size: 1\n",
         "streams", "datasets with type: completion"),
        ("model: a/b\ntrain_dataset: rows.yaml\npeft_config: {name: lora}\n", "v1 form", "model_name_or_path"),
        ("name: a\nbase_model: a/b\ndataset: {path: rows.jsonl}\n", "is a job file already", "loractl submit"),
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "accelerate's", "resources.cards"),
        ("model_name_or_path: a/b\nadapter_name_or_path: c\nexport_dir: d\n", "does not train", "adapters merge"),
        ("model_name_or_path: a/b\ntemplate: qwen\ninfer_backend: vllm\n", "does not train", "loractl generate"),
        (FACTORY + "do_predict: true\n", "does not train", "loractl predict"),
        ("model_name_or_path: a/b\nstage: kto\ndataset: d\n", "stage: kto", "stage: sft"),
        ("model_name_or_path: a/b\nstage: ppo\ndataset: d\n", "stage: ppo", "stage: sft"),
        ("model_name_or_path: a/b\nstage: rm\ndataset: d\n", "stage: rm", "stage: sft"),
        (FACTORY + "finetuning_type: oft\n", "finetuning_type: oft", "finetuning_type: lora"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why_and_what_to_do(tmp_path: Path, text: str, sentence: str, hint: str) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(LoractlError) as refused:
        import_file(tmp_path / "theirs.yaml", tmp_path)
    assert sentence in str(refused.value) and hint in str(refused.value.hint)
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "theirs.yaml")])
    assert result.exit_code != 0 and "Traceback" not in result.output


def test_a_stage_that_does_not_learn_from_such_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoractlError, match=r"has pairs \(ranking\), but this stage learns from answers") as refused:
        import_text(tmp_path, FACTORY, {"hf_hub_url": "o/d", "ranking": True})
    assert refused.value.hint == "set stage: dpo, or choose another data set"
    with pytest.raises(LoractlError, match=r"has no pairs \(ranking\), but this stage learns from pairs"):
        import_text(tmp_path, FACTORY + "stage: dpo\n", {"hf_hub_url": "o/d"})


RANKED = {"hf_hub_url": "o/d", "ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
DPO = AXOLOTL.replace("type: alpaca", "type: chat_template.default") + "rl: dpo\n"


@pytest.mark.parametrize(
    ("lines", "preference", "left"),
    [
        ("", {}, []),
        ("rl: IPO\nrl_beta: 0.2", {"loss_type": "ipo", "beta": 0.2}, []),
        ("rl: orpo\norpo_alpha: 0.3", {"loss_type": "orpo", "beta": 0.3}, []),
        ("rl: orpo\norpo_alpha: 0.3\nrl_beta: 0.4", {"loss_type": "orpo", "beta": 0.4}, []),
        ("trl: {beta: 0.5}\nrl_beta: 0.4", {"beta": 0.5}, []),
        ("trl: {beta: 0.5, num_generations: 4}", {"beta": 0.5}, ["trl"]),
        ("dpo_beta: 0.2", {"beta": 0.2}, []),
        ("rl: simpo\ncpo_alpha: 0\nsimpo_gamma: 1.0", {"loss_type": "simpo", "simpo_gamma": 1.0}, []),
        ("rl: simpo\ncpo_alpha: 0.5", {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5]}, []),
        ("rl: simpo", {"loss_type": ["simpo", "sft"]}, []),
        ("dpo_loss_type: [hinge]\nsimpo_gamma: 1.0", {"loss_type": "hinge"}, []),
        ("dpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1.0, 0.2]",
         {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, []),
        ("dpo_loss_type: [robust]\ndpo_label_smoothing: 0.1", {"loss_type": "robust", "label_smoothing": 0.1}, []),
        ("dpo_loss_type: [robust]", {"loss_type": "sigmoid"}, []),
        ("dpo_label_smoothing: 0.1", {}, []),
        ("rpo_alpha: 0.2", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, []),
        ("dpo_loss_type: [apo_zero]\ndpo_loss_weights: [2.0]", {}, ["dpo_loss_type", "dpo_loss_weights"]),
        ("dpo_loss_type: [sigmoid]\ndpo_loss_weights: [1, 2]", {"loss_type": "sigmoid"}, ["dpo_loss_weights"]),
        ("dpo_use_weighting: true", {}, ["dpo_use_weighting"]),
        ("precompute_ref_log_probs: true\ndpo_padding_free: true\nmax_prompt_len: 512\nlora_dropout: 0.1", {}, []),
    ],
)  # fmt: skip
def test_axolotl_s_losses_of_pairs_are_carried(
    tmp_path: Path, lines: str, preference: dict[str, Any], left: list[str]
) -> None:
    made = import_text(tmp_path, with_lines(DPO, lines))
    assert made.job["task_type"] == "preference" and made.job.get("preference", {}) == preference
    assert sorted(made.left_out) == left and not made.otherwise
    assert "lora_dropout" not in made.job.get("lora", {}), "TRL switches dropout off"


@pytest.mark.parametrize(
    ("entry", "columns", "said"),
    [
        ("type: chat_template.default, field_messages: talk, field_chosen: good, field_rejected: bad",
         {"messages": "talk", "chosen": "good", "rejected": "bad"}, ""),
        ("type: chat_template.argilla", {}, ""),
        ("type: chat_template.default, message_property_mappings: {role: from, content: value}",
         {"role": "from", "content": "value"}, ""),
        ("type: chatml.intel", {"instruction": "question"}, "chatml's marks"),
        ("type: llama3.icr", {"instruction": "input"}, "llama3's marks"),
        ("type: chatml.prompt_pairs", {"instruction": "prompt"}, "chatml's marks"),
        ("type: chatml.argilla", {"chosen": "chosen_response", "rejected": "rejected_response"}, "chatml's marks"),
        ("type: chatml.argilla_chat", {}, "chatml's marks"),
        ("type: llama3.ultra", {}, "llama3's marks"),
        ("type: chatml.default", {"instruction": "prompt"}, "the first of prompt, input"),
        ("type: passthrough", {}, ""),
        ("type: {field_prompt: ask, field_chosen: good, field_rejected: bad}",
         {"prompt": "ask", "chosen": "good", "rejected": "bad"}, ""),
    ],
)  # fmt: skip
def test_axolotl_s_types_of_pairs_are_carried(tmp_path: Path, entry: str, columns: dict[str, str], said: str) -> None:
    made = import_text(tmp_path, with_lines(DPO, f"datasets: [{{path: o/d, {entry}}}]"))
    assert made.job["dataset"].get("columns", {}) == columns and not made.left_out
    assert [said in how for how in made.otherwise.values()] == [True] * bool(said)
    assert made.job["dataset"].get("format") == ("preference_text" if "field_prompt" in entry else None)


def test_what_axolotl_writes_around_a_pair_is_named(tmp_path: Path) -> None:
    kind = (
        "{field_prompt: ask, field_system: role, prompt_format: '[INST] {prompt} [/INST]', chosen_format: '{chosen}'}"
    )
    made = import_text(tmp_path, with_lines(DPO, f"datasets: [{{path: o/d, type: {kind}}}]"))
    assert made.job["dataset"]["columns"] == {"instruction": "ask", "system": "role"}
    assert "chat template" in made.left_out["datasets[0].type"]
    ranked = import_text(tmp_path, with_lines(DPO, "datasets: [{path: o/d, type: zephyr.nectar}]"))
    assert "chosen and rejected" in ranked.left_out["datasets[0].type"]


@pytest.mark.parametrize(
    ("lines", "preference", "left", "otherwise"),
    [
        ("", {}, [], []),
        ("pref_loss: sigmoid\npref_beta: 0.2", {"loss_type": "sigmoid", "beta": 0.2}, [], []),
        ("pref_loss: hinge\nlora_dropout: 0.1\npacking: true", {"loss_type": "hinge"}, [], []),
        ("pref_loss: ipo\nsimpo_gamma: 1.0", {"loss_type": "ipo"}, [], []),
        ("pref_loss: simpo\nsimpo_gamma: 1.0", {"loss_type": "simpo", "simpo_gamma": 1.0}, [], []),
        ("pref_loss: orpo", {"loss_type": "orpo"}, [], ["pref_loss"]),
        ("pref_loss: orpo\npref_ftx: 0.2", {"loss_type": "orpo"}, ["pref_ftx"], ["pref_loss"]),
        ("pref_ftx: 0.2", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, [], ["pref_ftx"]),
        ("pref_ftx: 0.0", {}, [], []),
        ("pref_loss: kto_pair", {}, ["pref_loss"], []),
        ("dpo_label_smoothing: 0.1", {}, ["dpo_label_smoothing"], []),
        ("ref_model: a/c\nld_alpha: 0.5\npref_bco_weight: 0.1", {}, ["ld_alpha", "pref_bco_weight", "ref_model"], []),
    ],
)  # fmt: skip
def test_llama_factory_s_losses_of_pairs_are_carried(
    tmp_path: Path, lines: str, preference: dict[str, Any], left: list[str], otherwise: list[str]
) -> None:
    made = import_text(tmp_path, with_lines(FACTORY, f"stage: dpo\n{lines}"), RANKED)
    assert made.job["task_type"] == "preference" and made.job.get("preference", {}) == preference
    assert sorted(made.left_out) == left
    assert sorted(made.otherwise.keys() & {"pref_loss", "pref_ftx"}) == otherwise
    assert "lora_dropout" not in made.job["lora"] and "packing" not in made.job["training"]
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
    made = import_text(tmp_path, with_lines(FACTORY, "stage: dpo"), entry)
    assert made.job["dataset"].get("columns", {}) == columns and not made.left_out


def import_text(folder: Path, text: str, entry: dict[str, Any] | None = None) -> Imported:
    """What import makes of a file; `entry`: what dataset_info.json says of its rows."""
    if entry is not None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    (folder / "theirs.yaml").write_text(text)
    return import_file(folder / "theirs.yaml", folder)
