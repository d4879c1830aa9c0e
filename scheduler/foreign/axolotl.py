"""Axolotl's configuration as a job."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loractl.common.errors import UsageError

from .axolotl_rows import carry_rows
from .preferences import AXOLOTL_RL, axolotl_loss, is_of_pairs
from .translation import (
    ANSWERS,
    ATTENTION,
    BF16,
    BY_LENGTH,
    CARDS,
    FP16,
    FRESH,
    IN_ORDER,
    ONE_CARD,
    OPTIMIZER,
    OWN_OPTIMIZER,
    QUANTISED,
    REMOTE,
    TEMPLATE,
    TOKENS,
    Draft,
    carry_by_rules,
    carry_run_name,
    carry_same,
    choice,
    evaluate_each,
    fill_in,
    get_key,
    held_out,
    leave_all,
    names_of,
    only,
    refuse_objective,
    refuse_pictures,
    set_key,
    short,
    skip_all,
    tell_held_out,
    tell_quantised,
    tell_tf32,
    truth,
    unset_key,
)

BASE_KEYS = ("peft", "model_quantization_config")
"""Keys under which a backend and a number format of the base's weights may be named."""

_FOUR_BIT = ("nf4", "int4")


def names_four_bit(theirs: dict[str, Any]) -> bool:
    """Whether one of BASE_KEYS loads the base in 4 bit: Axolotl then trains QLoRA, whatever `adapter` says."""
    said = [theirs[key] for key in BASE_KEYS if isinstance(theirs.get(key), dict)]
    return any(value.get("weight_dtype") in _FOUR_BIT for value in said)


def base_format(draft: Draft, key: str, value: Any) -> None:
    """The base's number format (here four bits are always NF4), and LoftQ's initialization."""
    known = {"backend", "weight_dtype", "group_size", "loftq_config"}
    if not isinstance(value, dict) or value.keys() - known or value.get("weight_dtype") not in (None, *_FOUR_BIT):
        draft.leave(key, f"{short(value)}: the base is in 16 bit (lora) or NF4 (qlora)")
        return
    if loftq := value.get("loftq_config"):
        draft.put(key, "lora.init_lora_weights", "loftq")
        if loftq != {"loftq_bits": 4}:
            draft.differ(key, f"{short(loftq)}: LoftQ starts from NF4, in 4 bit")
    if "weight_dtype" in value:
        draft.put(key, "method", "qlora")
        if value != {"backend": "bnb", "weight_dtype": "nf4"}:
            draft.differ(key, f"{short(value)}: NF4 of bitsandbytes with double quantization is used")
    elif not loftq:
        draft.skip(key)


def nf4(draft: Draft, key: str, value: Any) -> None:
    """NF4 with its scales quantized again, in both tools."""
    ours = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if isinstance(value, dict) and all(ours.get(name) == there for name, there in value.items()):
        draft.skip(key)
    else:
        draft.leave(key, f"{short(value)}: NF4 with double quantization is used")


_OBJECTIVES = (
    "reward_model", "process_reward_model", "kd_trainer", "gkd_trainer", "block_diffusion", "diffusion", "ebft",
)  # fmt: skip
"""Keys of training by another objective."""

_PLUGINS = {"LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin", "ExpertParallelPlugin", "LMEvalPlugin"}
"""Plug-ins that compute the same with other kernels, or do not affect training."""

_TEACHERS = {"KDPlugin", "GKDPlugin", "DiffusionPlugin", "DiffusionGemmaPlugin"}
"""Plug-ins that train by another objective."""

_PICTURES = {"processor_type", "image_size", "image_resize_algorithm", "is_multimodal"}
"""Keys of training on more than text."""


def from_axolotl(theirs: dict[str, Any], file: Path, folder: Path) -> Draft:
    """The job of an Axolotl file. Raises UsageError unless it trains LoRA on rows with answers, or on pairs of them."""
    draft = Draft("Axolotl")
    _refuse(theirs, file)
    draft.put("base_model", "base_model", theirs["base_model"])
    four_bit = theirs["adapter"] == "qlora" or theirs.get("load_in_4bit") is True or names_four_bit(theirs)
    draft.put("adapter", "method", "qlora" if four_bit else "lora")
    carry_same(draft, theirs, _SAME)
    skip_all(draft, theirs, _NOT_NEEDED, _KERNELS)
    leave_all(draft, theirs, _REASONS)
    carry_by_rules(draft, theirs, _RULES)
    carry_run_name(draft, theirs, "wandb_name")
    if theirs.get("rl"):
        axolotl_loss(draft, theirs)
    _warmup_and_batch(draft, theirs)
    carry_rows(draft, theirs, file, folder)
    tell_held_out(draft, theirs, "val_set_size")
    _evaluations(draft, theirs)
    _number_format(draft, theirs)
    tell_tf32(draft, theirs)
    tell_quantised(draft)
    _own_tokenizer(draft, theirs)
    if not theirs.get("lora_target_modules") and not theirs.get("lora_target_linear"):
        draft.differ(
            "lora_target_linear", "no layers are named: Axolotl lets peft choose, loractl adapts every linear layer"
        )
    defaults = {key: value for key, value in _DEFAULTS.items() if key != "lora.lora_dropout" or not is_of_pairs(draft)}
    fill_in(draft, defaults | ({"training.optim": OWN_OPTIMIZER} if four_bit and "optimizer" not in theirs else {}))
    return draft


def _refuse(theirs: dict[str, Any], file: Path) -> None:
    """Raises UsageError unless it is LoRA training on rows of text with answers."""
    if (rl := theirs.get("rl")) and str(rl).lower() not in AXOLOTL_RL:
        raise refuse_objective(f"{file} has rl: {rl}", "take rl out")
    for key in _OBJECTIVES:
        if theirs.get(key):
            raise refuse_objective(f"{file} has {key}", f"take {key} out")
    if teachers := sorted(_TEACHERS & _plugins(theirs)):
        raise refuse_objective(f"{file} has the plug-in {teachers[0]}", "take the plug-in out")
    kind = str(theirs.get("model_type", ""))
    if "Classification" in kind:
        hint = "write a job file with task_type: SEQ_CLS, on rows with text and label"
        raise UsageError(f"{file} trains {kind}, but import converts only trainings on answers", hint)
    refuse_pictures(theirs, _PICTURES, file)
    adapter = theirs.get("adapter")
    if adapter not in ("lora", "qlora"):
        article = "an" if str(adapter)[:1] in "aeiou" else "a"
        what = "all weights" if adapter is None else f"{article} {adapter} adapter"
        raise UsageError(
            f"{file} trains {what}: loractl trains LoRA and QLoRA",
            "set adapter: lora or adapter: qlora, with lora_r and lora_alpha",
        )


def _plugins(theirs: dict[str, Any]) -> set[str]:
    """The plug-ins' classes."""
    named = theirs.get("plugins", [])
    return {str(name).rpartition(".")[2] for name in (named if isinstance(named, list) else [named])}


def _carry_plugins(draft: Draft, key: str, value: Any) -> None:
    if others := sorted(_plugins({"plugins": value}) - _PLUGINS):
        draft.leave(key, f"{', '.join(others)}: loractl has no such plug-in")
    else:
        draft.skip(key)


def _warmup_and_batch(draft: Draft, theirs: dict[str, Any]) -> None:
    """What Axolotl derives from several settings: the warm-up steps, and the batch."""
    if theirs.get("warmup_steps") == 1:
        draft.put("warmup_steps", "training.warmup_steps", 2)  # Axolotl never warms up for one step
    elif not theirs.get("warmup_steps") and not theirs.get("warmup_ratio"):
        draft.differ("warmup_ratio", "not set: both warm up for 3 % of the steps, Axolotl for at most 100")
    batch, micro = theirs.get("batch_size"), theirs.get("micro_batch_size", 1)
    if "batch_size" not in theirs:
        return
    if "gradient_accumulation_steps" in theirs:
        draft.skip("batch_size")
    elif type(batch) is int and type(micro) is int and 0 < micro <= batch:
        draft.put("batch_size", "training.gradient_accumulation_steps", batch // micro)
    else:
        draft.leave("batch_size", f"{short(batch)}: is not a number of rows that micro_batch_size divides")


def _own_tokenizer(draft: Draft, theirs: dict[str, Any]) -> None:
    """Tokenizer and architecture are the base model's own."""
    for key in ("tokenizer_config", "base_model_config"):
        if key in theirs and theirs[key] != theirs["base_model"]:
            draft.leave(key, f"{short(theirs[key])}: the base model's own is used")
        elif key in theirs:
            draft.skip(key)


def _evaluations(draft: Draft, theirs: dict[str, Any]) -> None:
    """How often the held-out loss is measured during training. Without held-out rows Axolotl never measures it."""
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
    """Axolotl computes in fp32 if bf16 is off and fp16 is not on."""
    off = [key for key in ("bf16", "bfloat16") if theirs.get(key) is False]
    if off and get_key(draft.job, "training.dtype") is None:
        draft.not_needed.remove(off[0])
        draft.put(off[0], "training.dtype", "float32")


def _gptq(draft: Draft, key: str, value: Any) -> None:
    """A base in 4 bit by GPTQ: QLoRA comes closest."""
    if not value:
        draft.skip(key)
        return
    draft.put(key, "method", "qlora")
    draft.differ(key, f"true: {QUANTISED}; method: qlora loads it in 4 bit, in as little memory")


def _watchdog(draft: Draft, key: str, value: Any) -> None:
    what = "a loss above it ends Axolotl's training; loractl's ends at one that is not a number"
    draft.differ(key, f"{short(value)}: {what}")


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
            draft.put(key, "training.tracker.project", str(value))
            draft.differ(key, f"{short(value)}: the worker needs wandb and an account")

    return rule


def _least_rate(draft: Draft, key: str, value: Any) -> None:
    draft.put(key, "training.lr_scheduler_kwargs", {"min_lr_rate": value})
    set_key(draft.job, "training.lr_scheduler_type", "cosine_with_min_lr")


def _save_steps(draft: Draft, key: str, value: Any) -> None:
    if isinstance(value, float) and 0 < value < 1:
        draft.skip(key)  # a share of all steps; how often a checkpoint is saved does not affect training
    else:
        draft.put(key, "training.save_steps", value)


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
    "logging_steps": "training.logging_steps",
    "eval_steps": "training.eval_steps",
    "early_stopping_patience": "training.early_stopping_patience",
    "load_best_model_at_end": "training.load_best_model_at_end",
    "seed": "training.seed",
    "eval_batch_size": "evaluation.per_device_eval_batch_size",
    "eval_max_new_tokens": "evaluation.max_new_tokens",
}


_NOT_NEEDED = {
    "output_dir", "dataset_prepared_path", "strict", "debug", "model_type", "tokenizer_type", "cls_model_config",
    "is_llama_derived_model", "is_mistral_derived_model", "load_in_4bit", "pad_to_sequence_len", "eval_sample_packing",
    "gradient_checkpointing_kwargs", "local_rank", "saves_per_epoch", "save_total_limit", "save_safetensors",
    "wandb_entity", "wandb_watch", "wandb_run_id", "wandb_log_model", "wandb_mode", "hf_use_auth_token",
    "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "val_set_seed", "push_dataset_to_hub",
    "lora_fan_in_fan_out", "auto_resume_from_checkpoints", "skip_prepare_dataset", "remove_unused_columns",
    "include_tokens_per_second", "shuffle_merged_datasets", "do_eval", "save_strategy", "save_first_step", "test_value",
    "tokenizer_use_fast", "tokenizer_legacy", "is_falcon_derived_model", "is_qwen_derived_model", "torchdistx_path",
    "use_kernels", "use_scattermoe", "use_sonicmoe", "use_dsv4_kernels", "moe_kernels", "cut_cross_entropy",
    "fused_attn_kernel", "experts_implementation", "activation_offloading", "use_ray", "use_otel_metrics",
    "low_cpu_mem_usage", "quantization", "qlora_sharded_model_loading", "gpu_memory_limit", "gptq_disable_exllama",
    "lora_on_cpu", "loss_watchdog_patience", "device_map", "gemma4_hybrid_attn_impl",
}  # fmt: skip


_KERNELS = re.compile(
    "(liger|flash_attn|unsloth|otel|ddp|hub|gc|profiler|dataloader|torch_compile|eval_table|mlflow|comet)_.*"
    "|lora_(mlp|qkv|o|embedding)_kernel"
)
"""Settings that compute the same in another way, or say where a run takes place and is logged."""


_REASONS = {
    "lora_target_parameters": "experts that share one tensor are not adapted",
    "unfrozen_parameters": "the base is frozen, and adapters are trained",
    "eot_tokens": "the chat template writes the end of a turn, which is learned",
    "use_dft": "the loss is plain cross-entropy",
    "use_eaft": "the loss is plain cross-entropy",
    "tokenizer_use_mistral_common": "the tokenizer's own files and chat template are used",
    **dict.fromkeys(
        ("exact_deduplication", "dataset_exact_deduplication"),
        "duplicate rows are all learned; loractl data check names them",
    ),
    "sample_packing_sequentially": "loractl packs rows together by length",
    "resize_token_embeddings_to_32x": "the embeddings keep their size",
    "quantize_moe_experts": "only linear layers are in NF4",
    "qat": "the weights are not rounded during training",
    "use_onebitllms": "loractl does not train one-bit weights",
    "use_comet": "loractl reports to tensorboard, wandb, mlflow and trackio",
}
"""Why there is no counterpart."""


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
    "gptq": _gptq,
    "loss_watchdog_threshold": _watchdog,
    "attn_implementation": ATTENTION,
    "gradient_checkpointing": truth("training.gradient_checkpointing"),
    "flash_attention": choice("training.attn_implementation", {True: "flash_attention_2", False: None}, "unknown"),
    "sdp_attention": choice("training.attn_implementation", {True: "sdpa", False: None}, "unknown"),
    "eager_attention": choice("training.attn_implementation", {True: "eager", False: None}, "unknown"),
    "attention": choice(
        "training.attn_implementation",
        {"flash": "flash_attention_2", "flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"},
        "loractl uses transformers' attention",
    ),
    "xformers_attention": ATTENTION,
    "group_by_length": BY_LENGTH,
    "curriculum_sampling": IN_ORDER,
    "peft_init_lora_weights": choice(
        "lora.init_lora_weights",
        {True: None, "gaussian": "gaussian", "orthogonal": "orthogonal", "loftq": "loftq"},
        "the adapter starts with peft's default weights",
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
    "resume_from_checkpoint": FRESH,
    "plugins": _carry_plugins,
    "bnb_config_kwargs": nf4,
    **dict.fromkeys(BASE_KEYS, base_format),
    "save_steps": _save_steps,
    "deepspeed": ONE_CARD,
    "fsdp": ONE_CARD,
    "fsdp_config": ONE_CARD,
    "fsdp_version": ONE_CARD,
    **dict.fromkeys(
        (
            "expert_parallel_size",
            "context_parallel_size",
            "tensor_parallel_size",
            "sequence_parallel_degree",
            "dp_shard_size",
            "dp_replicate_size",
            "ray_num_workers",
        ),
        CARDS,
    ),
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
