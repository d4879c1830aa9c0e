"""Axolotl's configuration as a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loractl.common.errors import UsageError

from .translation import (
    ANSWERS,
    BF16,
    BY_LENGTH,
    FP16,
    FRESH,
    IN_ORDER,
    NOT_SUPERVISED,
    ONE_CARD,
    OPTIMIZER,
    REMOTE,
    TEMPLATE,
    TOKENS,
    Draft,
    carry_by_rules,
    carry_same,
    choice,
    evaluate_each,
    fill_in,
    from_here,
    get_key,
    held_out,
    names_of,
    only,
    refuse_pictures,
    set_key,
    short,
    skip_all,
    tell_held_out,
    truth,
    unset_key,
)

_ROLES = {"user": {"human", "user"}, "assistant": {"gpt", "chatgpt", "assistant"}, "system": {"system"},
          "tool": {"tool", "observation", "function_response"}}  # fmt: skip
"""Names of roles that loractl's rows may have, by the role that they mean."""

_AS_HERE = {"split": "train", "roles_to_train": ["assistant"], "train_on_eos": "turn"}  # what loractl does anyway
_PROMPTS = {
    "sharegpt": "sharegpt: Axolotl takes the template that the file names, loractl the model's own",
    "completion": "completion: Axolotl cuts a long text into several rows, loractl keeps its first sequence_len tokens",
}
"""What else a type of rows means there."""

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}


def from_axolotl(theirs: dict[str, Any], file: Path, folder: Path) -> Draft:
    """The job of an Axolotl file. Raises UsageError unless it trains LoRA on rows with answers."""
    draft = Draft("Axolotl")
    for key in ("rl", "reward_model", "process_reward_model"):
        if theirs.get(key):
            raise UsageError(f"{file} has {key}: {NOT_SUPERVISED}, by no other objective")
    adapter = theirs.get("adapter")
    if adapter not in ("lora", "qlora"):
        what = "all weights" if adapter is None else f"a {adapter} adapter"
        raise UsageError(
            f"{file} trains {what}: loractl trains LoRA and QLoRA",
            "set adapter: lora or adapter: qlora, with lora_r and lora_alpha",
        )
    refuse_pictures(theirs, {"processor_type", "image_size", "image_resize_algorithm", "is_multimodal"}, file)
    draft.put("base_model", "base_model", theirs["base_model"])
    four_bit = adapter == "qlora" or theirs.get("load_in_4bit") is True
    draft.put("adapter", "method", "qlora" if four_bit else "lora")
    carry_same(draft, theirs, _SAME)
    skip_all(draft, theirs, _NOT_NEEDED)
    carry_by_rules(draft, theirs, _RULES)
    datasets = theirs.get("datasets") or []
    _data(draft, datasets if isinstance(datasets, list) else [datasets], file, folder)
    tests = theirs.get("test_datasets")
    if isinstance(tests, list) and tests and isinstance(tests[0], dict) and "path" in tests[0]:
        draft.put("test_datasets", "dataset.eval_path", from_here(tests[0]["path"], file.parent, folder))
        unset_key(draft.job, "dataset.test_size")
    tell_held_out(draft, theirs, "val_set_size")
    _evaluations(draft, theirs)
    _number_format(draft, theirs)
    fill_in(draft, _DEFAULTS)
    return draft


def _evaluations(draft: Draft, theirs: dict[str, Any]) -> None:
    """How often the held-out loss is measured on the way. Without held-out rows Axolotl never measures it."""
    strategy = theirs.get("eval_strategy")
    each = 1 if strategy == "epoch" else theirs.get("evals_per_epoch")
    key = "eval_strategy" if strategy == "epoch" else "evals_per_epoch"
    never = strategy in ("no", False) or not (theirs.get("val_set_size") or theirs.get("test_datasets"))
    if never and "training.eval_steps" in draft.carried.values():
        unset_key(draft.job, "training.eval_steps")
        del draft.carried["eval_steps"]
        draft.skip("eval_steps")
    if never or not each:
        for name in ("evals_per_epoch", "eval_strategy"):
            if name in theirs and name not in draft.carried:
                draft.skip(name)
        return
    evaluate_each(draft, key, each)


def _number_format(draft: Draft, theirs: dict[str, Any]) -> None:
    """Axolotl computes in fp32 where bf16 is switched off and fp16 is not switched on."""
    off = [key for key in ("bf16", "bfloat16") if theirs.get(key) is False]
    if off and get_key(draft.job, "training.dtype") is None:
        draft.not_needed.remove(off[0])
        draft.put(off[0], "training.dtype", "float32")


def _data(draft: Draft, datasets: list[Any], file: Path, folder: Path) -> None:
    first = datasets[0] if datasets and isinstance(datasets[0], dict) else {}
    if "path" not in first:
        raise UsageError(f"{file} names no data set", "datasets needs an entry with a path")
    files = first.get("data_files")
    path = files[0] if isinstance(files, list) and files else files or first["path"]
    draft.put("datasets", "dataset.path", from_here(path, file.parent, folder))
    if len(datasets) > 1 or (isinstance(files, list) and len(files) > 1):
        draft.leave("datasets[1:]", "a job trains on one data set: put the rows into one file")
    _format(draft, first)
    known = {"path", "data_files", "ds_type", *_columns(draft, first)}
    for key in sorted(first.keys() - known, key=str):
        if key == "roles" and _known_roles(first[key]):
            draft.skip("datasets[0].roles")
        elif first[key] != _AS_HERE.get(key):
            draft.leave(f"datasets[0].{key}", f"{short(first[key])}: loractl has no such setting")


def _known_roles(roles: Any) -> bool:
    """Whether rows with these names of roles are read here as they are there."""
    return isinstance(roles, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) and name in _ROLES.get(role, ()) for name in names)
        for role, names in roles.items()
    )


def _format(draft: Draft, first: dict[str, Any]) -> None:
    """What kind of rows the data set has: a format by name, or names of columns with a template."""
    kind, key = first.get("type", "chat_template"), "datasets[0].type"
    if isinstance(kind, dict):
        fields = ("instruction", "input", "output", "system")
        draft.put(key, "dataset.columns", {ours: name for ours in fields if (name := kind.get(f"field_{ours}"))})
        rest = sorted(str(name) for name, value in kind.items() if not str(name).startswith("field_") and value)
        if rest:
            draft.leave(key, f"{', '.join(rest)}: prompts are made by the model's own chat template")
    elif isinstance(kind, str) and kind in _FORMATS:
        if _FORMATS[kind]:
            draft.put(key, "dataset.format", _FORMATS[kind])
        if kind == "alpaca":
            set_key(draft.job, "dataset.template", "alpaca")
        if kind == "completion":
            set_key(draft.job, "dataset.on_overflow", "truncate")
        if kind in _PROMPTS:
            draft.differ(key, _PROMPTS[kind])
    else:
        draft.leave(key, f"{short(kind)}: rows are recognised by their columns instead")


def _columns(draft: Draft, first: dict[str, Any]) -> set[str]:
    """Carry the columns' names. Returns the keys that were looked at."""
    renamed = {"field_messages": "messages", "message_field_role": "role", "message_field_content": "content"}
    for theirs, ours in renamed.items():
        if first.get(theirs):
            draft.put(f"datasets[0].{theirs}", f"dataset.columns.{ours}", first[theirs])
    if first.get("type") == "completion" and first.get("field"):
        draft.put("datasets[0].field", "dataset.columns.text", first["field"])
    known = {"type", "field", *renamed}
    mappings = first.get("message_property_mappings")
    if isinstance(mappings, dict):
        known.add("message_property_mappings")
        for ours in ("role", "content"):
            if mappings.get(ours, ours) != ours:
                draft.put(f"datasets[0].message_property_mappings.{ours}", f"dataset.columns.{ours}", mappings[ours])
    return known


def _all_linear(draft: Draft, key: str, value: Any) -> None:
    if value is True:
        draft.put(key, "lora.target_modules", "all-linear")
    else:
        draft.skip(key)


def _tracker(name: str) -> Callable[[Draft, str, Any], None]:
    def rule(draft: Draft, key: str, value: Any) -> None:
        if not value:
            draft.skip(key)
            return
        told = get_key(draft.job, "training.report_to") or []
        set_key(draft.job, "training.report_to", [*told, *([name] if name not in told else [])])
        draft.carried[key] = "training.report_to"
        if key == "wandb_project":
            what = f"{short(value)}: runs go to the project that the worker's own WANDB_PROJECT names"
            draft.differ(key, f"{what}, and the worker needs wandb and an account")

    return rule


def _least_rate(draft: Draft, key: str, value: Any) -> None:
    draft.put(key, "training.lr_scheduler_kwargs", {"min_lr_rate": value})
    set_key(draft.job, "training.lr_scheduler_type", "cosine_with_min_lr")


_SAME = {
    "revision_of_model": "revision",
    "sequence_len": "dataset.max_length",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "peft_use_dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "micro_batch_size": "training.per_device_train_batch_size",
    "num_epochs": "training.num_train_epochs",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "lr_scheduler_kwargs": "training.lr_scheduler_kwargs",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "adam_beta1": "training.adam_beta1",
    "adam_beta2": "training.adam_beta2",
    "adam_epsilon": "training.adam_epsilon",
    "warmup_ratio": "training.warmup_steps",
    "warmup_steps": "training.warmup_steps",
    "label_smoothing_factor": "training.label_smoothing_factor",
    "neftune_noise_alpha": "training.neftune_noise_alpha",
    "noisy_embedding_alpha": "training.neftune_noise_alpha",
    "sample_packing": "training.packing",
    "torch_compile": "training.torch_compile",
    "attn_implementation": "training.attn_implementation",
    "logging_steps": "training.logging_steps",
    "save_steps": "training.save_steps",
    "eval_steps": "training.eval_steps",
    "early_stopping_patience": "training.early_stopping_patience",
    "load_best_model_at_end": "training.load_best_model_at_end",
    "seed": "training.seed",
    "eval_batch_size": "evaluation.per_device_eval_batch_size",
    "eval_max_new_tokens": "evaluation.max_new_tokens",
}


_NOT_NEEDED = {
    "output_dir", "dataset_prepared_path", "strict", "debug", "model_type", "tokenizer_type", "tokenizer_config",
    "is_llama_derived_model", "is_mistral_derived_model", "load_in_4bit", "pad_to_sequence_len", "eval_sample_packing",
    "gradient_checkpointing_kwargs", "local_rank", "saves_per_epoch", "save_total_limit", "save_safetensors",
    "eval_table_size", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model", "wandb_mode",
    "dataset_processes", "dataloader_num_workers", "dataloader_pin_memory", "hub_model_id", "val_set_seed",
    "lora_fan_in_fan_out", "resume_from_checkpoint", "auto_resume_from_checkpoints", "plugins",
    "include_tokens_per_second", "shuffle_merged_datasets", "do_eval", "save_strategy",
}  # fmt: skip


_RULES: dict[str, Callable[[Draft, str, Any], None]] = {
    "val_set_size": held_out,
    "lora_target_modules": names_of("lora.target_modules"),
    "lora_target_linear": _all_linear,
    "optimizer": OPTIMIZER,
    "cosine_min_lr_ratio": _least_rate,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "float16": FP16,
    "tf32": only(False, "matrix products keep torch's default precision"),
    "gradient_checkpointing": truth("training.gradient_checkpointing"),
    "flash_attention": choice("training.attn_implementation", {True: "flash_attention_2", False: None}, "unknown"),
    "sdp_attention": choice("training.attn_implementation", {True: "sdpa", False: None}, "unknown"),
    "eager_attention": choice("training.attn_implementation", {True: "eager", False: None}, "unknown"),
    "xformers_attention": only(False, "attention is transformers' own"),
    "group_by_length": BY_LENGTH,
    "curriculum_sampling": IN_ORDER,
    "peft_init_lora_weights": choice(
        "lora.init_lora_weights",
        {True: None, "gaussian": "gaussian", "orthogonal": "orthogonal", "loftq": "loftq"},
        "the adapter begins as peft's default",
    ),
    "wandb_project": _tracker("wandb"),
    "use_wandb": _tracker("wandb"),
    "use_tensorboard": _tracker("tensorboard"),
    "use_mlflow": _tracker("mlflow"),
    "load_in_8bit": only(False, "true: the base is in 16 bit (lora) or NF4 (qlora)"),
    "train_on_inputs": ANSWERS,
    "chat_template": TEMPLATE,
    "special_tokens": TOKENS,
    "tokens": TOKENS,
    "lora_model_dir": FRESH,
    "deepspeed": ONE_CARD,
    "fsdp": ONE_CARD,
    "fsdp_config": ONE_CARD,
    "trust_remote_code": REMOTE,
    "excess_length_strategy": choice(
        "dataset.on_overflow",
        {"drop": "drop", "truncate": "truncate", "raise": "error"},
        "long rows are dropped, cut, or refused",
    ),
}


_DEFAULTS = {
    "dataset.max_length": 512,
    "dataset.on_overflow": "drop",
    "lora.lora_dropout": 0.0,
    "training.num_train_epochs": 1,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
}
