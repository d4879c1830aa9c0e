"""What Axolotl and LLaMA-Factory call the keys of a job file.

A table for each tool says what becomes of a key: our name for it; our name with our value for each of theirs (None: it
needs no key; `...`: any other value); their values that mean what loractl does anyway; or a rule. A later line
overrules an earlier one. What no table names is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loractl.common.adapter_config import is_module_name


@dataclass
class Draft:
    """A job file in the making, and what became of each key of the other tool's file so far."""

    theirs: dict[str, Any]
    job: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_needed: list[str] = field(default_factory=list)
    filled_in: dict[str, Any] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)  # their names for the entries of dataset.more

    def put(self, theirs: str, ours: str, value: Any) -> None:
        """Carry a value under our name."""
        set_key(self.job, ours, value)
        self.carried[theirs] = ours

    def leave(self, theirs: str, value: Any, why: str | None = None) -> None:
        """Name a key that is not carried although it may change the training."""
        why = _REASONS.get(theirs) or why
        self.left_out[theirs] = f"{short(value)}: {why}" if why else short(value)

    def skip(self, theirs: str) -> None:
        """Name a key that changes nothing here."""
        self.not_needed.append(theirs)


Rule = Callable[[Draft, str, Any], None]
Meaning = str | tuple[str, Mapping[Any, Any]] | set[Any] | Rule


@dataclass(frozen=True, kw_only=True)
class Tool:
    """Another tool's file: what its keys mean here."""

    name: str
    table: Mapping[str, Meaning]
    not_needed: re.Pattern[str]
    """Folders, caches, logs, and other ways to compute the same."""
    refused: Mapping[str, tuple[str, str]]
    """Keys that make a training no job of ours: a pattern of such values, and a hint."""
    defaults: Mapping[str, Any]
    """The tool's defaults that loractl does not share, by our key."""


def carry(draft: Draft, tool: Tool) -> None:
    """Carry all keys but those of the rows."""
    theirs = draft.theirs
    for key in [*(key for key in tool.table if key in theirs), *sorted(theirs.keys() - tool.table.keys())]:
        value, meaning = theirs[key], tool.table.get(key)
        if meaning is None:
            if tool.not_needed.fullmatch(key):
                draft.skip(key)
            else:
                draft.leave(key, value)
        elif isinstance(meaning, str):
            draft.put(key, meaning, value)
        elif isinstance(meaning, tuple):
            _translate(draft, key, *meaning)
        elif not isinstance(meaning, set):
            meaning(draft, key, value)
        elif value in [*meaning]:
            draft.skip(key)
        else:
            draft.leave(key, value)


def fill_in(draft: Draft, tool: Tool) -> None:
    """Write out the tool's defaults where the file says nothing."""
    for key, default in tool.defaults.items():
        if get_key(draft.job, key) is None and not (key == _EPOCHS and get_key(draft.job, "training.max_steps")):
            value = default(draft.job) if callable(default) else default
            set_key(draft.job, key, value)
            draft.filled_in[key] = value


def _translate(draft: Draft, key: str, ours: str, values: Mapping[Any, Any]) -> None:
    value = draft.theirs[key]
    known = value.lower() if isinstance(value, str) else value
    for there, here in values.items():
        if there is ... or there == known:
            if here is None:
                draft.skip(key)
            else:
                draft.put(key, ours, here)
            return
    draft.leave(key, value)


def modules(ours: str) -> Rule:
    """Names of modules, also written with commas; or a regular expression, which is carried as it is."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if isinstance(value, str) and not all(map(is_module_name, names)):
            draft.put(key, ours, value)
        else:
            draft.put(key, ours, "all-linear" if names in (["all"], ["all-linear"]) else names)

    return rule


def _optimizer(draft: Draft, key: str, value: Any) -> None:
    """loractl pages the optimizer's states only for QLoRA; without paging the arithmetic is equal."""
    _translate(draft, key, "training.optim", _OPTIMIZERS)
    optim = get_key(draft.job, "training.optim")
    if optim and draft.job.get("method", "lora") == "lora":
        optim = "adamw_torch" if optim == "paged_adamw_32bit" else optim.removeprefix("paged_")
        set_key(draft.job, "training.optim", optim)


def _max_steps(draft: Draft, key: str, value: Any) -> None:
    if type(value) is int and value <= 0:
        draft.skip(key)
    else:
        draft.put(key, "training.max_steps", value)


def _epochs(draft: Draft, key: str, value: Any) -> None:
    if get_key(draft.job, "training.max_steps") is None:
        draft.put(key, _EPOCHS, value)
    else:
        draft.skip(key)


def _each_epoch(draft: Draft, key: str, value: Any) -> None:
    """A number of evaluations in each epoch, as a share of all steps. Axolotl needs held-out rows for them."""
    epochs = get_key(draft.job, _EPOCHS) or 1
    times = 1 if value == "epoch" else value
    holds_out = draft.theirs.get("val_set_size") or draft.theirs.get("test_datasets") or key != "evals_per_epoch"
    known = isinstance(times, (int, float)) and isinstance(epochs, (int, float))
    if value in ("no", "steps", False, 0) or not holds_out or (known and times * epochs == 1):
        draft.skip(key)  # once, at the end, is what loractl does anyway
    elif known and times * epochs > 1:
        draft.put(key, "training.eval_steps", 1 / (times * epochs))
    else:
        draft.leave(key, value)


def _with_answers(draft: Draft, key: str, value: Any) -> None:
    """Add a weighted loss of the chosen answers to the loss of the pairs."""
    loss = get_key(draft.job, "preference.loss_type") or "sigmoid"
    if not value:
        draft.skip(key)
    elif isinstance(loss, str) and loss != "orpo":
        set_key(draft.job, "preference.loss_type", [loss, "sft"])
        draft.put(key, "preference.loss_weights", [1.0, value])
    else:
        draft.leave(key, value)


def _axolotl_pairs(draft: Draft, key: str, value: Any) -> None:
    """TRL's trainer for simpo also trains on the chosen answers, unless cpo_alpha says otherwise."""
    draft.put(key, "task_type", "preference")
    loss = str(value).lower()
    if loss == "simpo" and "cpo_alpha" not in draft.theirs:
        draft.filled_in["preference.loss_type"] = ["simpo", "sft"]
        set_key(draft.job, "preference.loss_type", ["simpo", "sft"])
    elif loss != "dpo":
        set_key(draft.job, "preference.loss_type", loss)


def _losses(draft: Draft, key: str, value: Any) -> None:
    """TRL's label smoothing is for robust alone, and without it robust is sigmoid."""
    names = value if isinstance(value, list) else [value]
    if not draft.theirs.get("dpo_label_smoothing"):
        names = ["sigmoid" if name == "robust" else name for name in names]
    draft.put(key, "preference.loss_type", names[0] if len(names) == 1 else names)


def _stage(draft: Draft, key: str, value: Any) -> None:
    if value == "dpo":
        draft.put(key, "task_type", "preference")
    elif value == "pt":
        draft.put(key, "dataset.format", "text")
        if "packing" not in draft.theirs:
            draft.filled_in["training.packing"] = True
            set_key(draft.job, "training.packing", True)
    else:
        draft.skip(key)


def _dropout(draft: Draft, key: str, value: Any) -> None:
    """Both tools switch dropout off for pairs, whatever the file says."""
    if draft.job.get("task_type") == "preference":
        draft.skip(key)
    else:
        draft.put(key, "lora.lora_dropout", value)


def _warm_up(draft: Draft, key: str, value: Any) -> None:
    """Steps overrule the ratio, but no steps leave it to the ratio, as in transformers."""
    theirs = draft.theirs
    by_ratio = "warmup_ratio" in theirs and not theirs.get("warmup_steps")
    if key == ("warmup_ratio" if by_ratio else "warmup_steps"):
        draft.put(key, "training.warmup_steps", value)
    else:
        draft.skip(key)


def _wandb(draft: Draft, key: str, value: Any) -> None:
    draft.put(key, "training.tracker.project", str(value))
    _report_to(draft, "wandb")


def _curves(place: str) -> Rule:
    """Whether this place gets the curves, next to others."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value is True:
            _report_to(draft, place)
            draft.carried[key] = "training.report_to"
        elif value is False:
            draft.skip(key)
        else:
            draft.leave(key, value)

    return rule


def _report_to(draft: Draft, place: str) -> None:
    set_key(draft.job, "training.report_to", [*(get_key(draft.job, "training.report_to") or []), place])


def _plugins(draft: Draft, key: str, value: Any) -> None:
    names = {str(name).rpartition(".")[2] for name in (value if isinstance(value, list) else [value])}
    if others := sorted(names - {"LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin", "ExpertParallelPlugin"}):
        draft.leave(key, others)
    else:
        draft.skip(key)


def _tokens(draft: Draft, key: str, value: Any) -> None:
    """A padding token changes nothing: padding is never learned."""
    if isinstance(value, dict) and value.keys() <= {"pad_token"}:
        draft.skip(key)
    else:
        draft.leave(key, value)


def _twice_the_rank(job: dict[str, Any]) -> Any:
    return 2 * rank if type(rank := get_key(job, "lora.r")) is int else 16


_PICTURES = ("(?!False$).*", "loractl trains only on text: take the key out if the rows have nothing else")
_OBJECTIVE = ("(?!False$).*", "take the key out, and give the job rows with answers")
_EPOCHS = "training.num_train_epochs"
_SWITCH: Meaning = ("training.gradient_checkpointing", {False: False, ...: True})
_ATTENTION: Meaning = (
    "training.attn_implementation",
    {"auto": "auto", "sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash_attention_2", ...: None},
)
"""Another way to compute attention changes no sum, so loractl's usual one takes its place."""
_BF16 = {True: "bfloat16", "full": "bfloat16", "auto": None}
_FP16: Meaning = ("training.dtype", {True: "float16", False: None})
_OPTIMIZERS = {
    **{
        name: name
        for name in (
            "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit",
            "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit", "adafactor", "adagrad",
            "rmsprop", "sgd",
        )
    },
    "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit", "adamw_hf": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
}  # fmt: skip

_ALIKE = {
    key: f"training.{key}"
    for key in (
        "gradient_accumulation_steps", "learning_rate", "lr_scheduler_kwargs", "weight_decay", "max_grad_norm",
        "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha", "torch_compile",
        "logging_steps", "save_steps", "load_best_model_at_end", "seed",
    )
}  # fmt: skip
"""Keys of a job file that both tools have too."""

AXOLOTL = Tool(
    name="Axolotl",
    table={
        **_ALIKE,
        "base_model": "base_model",
        "revision_of_model": "revision",
        "adapter": ("method", {"lora": "lora", "qlora": "qlora"}),
        "load_in_4bit": ("method", {True: "qlora", False: None}),
        "rl": _axolotl_pairs,
        "dpo_beta": "preference.beta",
        "orpo_alpha": "preference.beta",
        "rl_beta": "preference.beta",
        "simpo_gamma": "preference.simpo_gamma",
        "dpo_loss_type": _losses,
        "dpo_loss_weights": "preference.loss_weights",
        "dpo_label_smoothing": "preference.label_smoothing",
        "rpo_alpha": _with_answers,
        "cpo_alpha": _with_answers,
        "sequence_len": "dataset.max_length",
        "excess_length_strategy": (
            "dataset.on_overflow", {"drop": "drop", "truncate": "truncate", "raise": "error"}
        ),
        "lora_r": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": _dropout,
        "lora_target_modules": modules("lora.target_modules"),
        "lora_target_linear": ("lora.target_modules", {True: "all-linear", False: None}),
        "lora_modules_to_save": "lora.modules_to_save",
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        "peft_init_lora_weights": ("lora.init_lora_weights", {True: None, "gaussian": "gaussian", "loftq": "loftq"}),
        "micro_batch_size": "training.per_device_train_batch_size",
        "max_steps": _max_steps,
        "num_epochs": _epochs,
        "lr_scheduler": "training.lr_scheduler_type",
        "warmup_ratio": _warm_up,
        "warmup_steps": _warm_up,
        "noisy_embedding_alpha": "training.neftune_noise_alpha",
        "sample_packing": "training.packing",
        "optimizer": _optimizer,
        "bf16": ("training.dtype", _BF16 | {False: "float32"}),
        "bfloat16": ("training.dtype", _BF16 | {False: "float32"}),
        "fp16": _FP16,
        "float16": _FP16,
        "gradient_checkpointing": _SWITCH,
        "attn_implementation": _ATTENTION,
        "flash_attention": ("training.attn_implementation", {True: "flash_attention_2", False: None}),
        "sdp_attention": ("training.attn_implementation", {True: "sdpa", False: None}),
        "xformers_attention": _ATTENTION,
        "group_by_length": ("training.train_sampling_strategy", {True: "group_by_length", False: None}),
        "curriculum_sampling": ("training.train_sampling_strategy", {True: "sequential", False: None}),
        "eval_steps": "training.eval_steps",
        "evals_per_epoch": _each_epoch,
        "eval_strategy": _each_epoch,
        "val_set_size": "dataset.test_size",
        "eval_batch_size": "evaluation.per_device_eval_batch_size",
        "eval_max_new_tokens": "evaluation.max_new_tokens",
        "early_stopping_patience": "training.early_stopping_patience",
        "wandb_project": _wandb,
        "use_tensorboard": _curves("tensorboard"),
        "use_mlflow": _curves("mlflow"),
        "plugins": _plugins,
        "special_tokens": _tokens,
        "chat_template": {"tokenizer_default"},
        "fsdp": {False},
        "gptq": {False},
        "load_in_8bit": {False},
        "train_on_inputs": {False},
        "trust_remote_code": {False},
        "resume_from_checkpoint": {False},
        "lora_model_dir": {False},
    },
    not_needed=re.compile(
        "(liger|flash_attn|unsloth|otel|ddp|fsdp|hub|gc|profiler|dataloader|torch_compile|eval_table|mlflow|comet|wandb"
        "|save|saves|ray|tokenizer_(type|use_fast|legacy))_?.*|lora_(mlp|qkv|o|embedding)_kernel|.*_kernels?"
        "|(dataset|val)_(prepared_path|processes|num_proc|keep_in_memory|set_seed)|(is_.*_derived|cls|torchdistx)_.*"
        "|output_dir|strict|debug|model_type|pad_to_sequence_len|eval_sample_packing|gradient_checkpointing_kwargs"
        "|local_rank|hf_use_auth_token|push_dataset_to_hub|lora_fan_in_fan_out|auto_resume_from_checkpoints|tf32"
        "|skip_prepare_dataset|remove_unused_columns|include_tokens_per_second|do_eval|test_value|use_wandb"
        "|use_(scatter|sonic)moe|moe_kernels|cut_cross_entropy|experts_implementation|activation_offloading|use_ray"
        "|use_otel_metrics|low_cpu_mem_usage|gptq_disable_exllama|lora_on_cpu|loss_watchdog_.*|device_map"
        "|gemma4_hybrid_attn_impl|qlora_sharded_model_loading|gpu_memory_limit|precompute_ref_log_probs"
        "|dpo_(padding_free|use_(liger_kernel|logits_to_keep)|generate_during_eval)|rl_adapter_ref_model|max_prompt_len|datasets|test_datasets"
    ),
    refused={
        "adapter": ("(?!q?lora$).*", "set adapter: lora or adapter: qlora, with lora_r and lora_alpha"),
        "rl": ("(?!(?i:dpo|ipo|orpo|simpo|false)$).*", "take rl out, or set dpo, ipo, orpo or simpo"),
        "model_type": (".*Classification", "write a job file with task_type: SEQ_CLS, on rows with text and label"),
        "plugins": (".*(KD|Diffusion)[A-Za-z]*Plugin.*", _OBJECTIVE[1]),
        **dict.fromkeys(("processor_type", "image_size", "is_multimodal"), _PICTURES),
        **dict.fromkeys(
            ("reward_model", "process_reward_model", "kd_trainer", "gkd_trainer", "block_diffusion", "diffusion",
             "ebft"), _OBJECTIVE,
        ),
    },
    defaults={
        "dataset.max_length": 512,
        "dataset.on_overflow": "drop",
        "lora.lora_dropout": 0.0,
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 1,
        "training.optim": "adamw_torch_fused",
    },
)  # fmt: skip

FACTORY = Tool(
    name="LLaMA-Factory",
    table={
        **_ALIKE,
        "model_name_or_path": "base_model",
        "model_revision": "revision",
        "finetuning_type": ("method", {"lora": "lora"}),
        "quantization_bit": ("method", {4: "qlora"}),
        "stage": _stage,
        "pref_loss": ("preference.loss_type", {name: name for name in ("sigmoid", "hinge", "ipo", "orpo", "simpo")}),
        "pref_beta": "preference.beta",
        "simpo_gamma": "preference.simpo_gamma",
        "pref_ftx": _with_answers,
        "cutoff_len": "dataset.max_length",
        "template": ("dataset.template", {"alpaca": "alpaca", "tokenizer_default": None}),
        "lora_rank": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": _dropout,
        "lora_target": modules("lora.target_modules"),
        "additional_target": modules("lora.modules_to_save"),
        "use_dora": "lora.use_dora",
        "use_rslora": "lora.use_rslora",
        "per_device_train_batch_size": "training.per_device_train_batch_size",
        "max_steps": _max_steps,
        "num_train_epochs": _epochs,
        "lr_scheduler_type": "training.lr_scheduler_type",
        "warmup_ratio": _warm_up,
        "warmup_steps": _warm_up,
        "packing": "training.packing",
        "neat_packing": ("training.packing", {True: True, False: None}),
        "optim": _optimizer,
        "bf16": ("training.dtype", _BF16 | {False: None}),
        "fp16": _FP16,
        "gradient_checkpointing": _SWITCH,
        "disable_gradient_checkpointing": ("training.gradient_checkpointing", {True: False, False: True}),
        "flash_attn": (
            "training.attn_implementation",
            {"auto": None, "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"},
        ),
        "group_by_length": ("training.train_sampling_strategy", {True: "group_by_length", False: None}),
        "disable_shuffling": ("training.train_sampling_strategy", {True: "sequential", False: None}),
        "eval_steps": "training.eval_steps",
        "eval_strategy": _each_epoch,
        "val_size": "dataset.test_size",
        "per_device_eval_batch_size": "evaluation.per_device_eval_batch_size",
        "max_new_tokens": "evaluation.max_new_tokens",
        "report_to": (
            "training.report_to",
            {"none": None, **{name: [name] for name in ("tensorboard", "wandb", "mlflow", "trackio")}},
        ),
        "add_tokens": _tokens,
        "add_special_tokens": _tokens,
        "train_on_prompt": {False},
        "mask_history": {False},
        "pissa_init": {False},
        "trust_remote_code": {False},
        "resume_from_checkpoint": {False},
        "adapter_name_or_path": {""},
        "quantization_method": {"bnb", "bitsandbytes"},
        "quantization_type": {"nf4"},
        "double_quantization": {True},
        "mix_strategy": {"concat"},
    },
    not_needed=re.compile(
        "(ddp|hub|dataloader|preprocessing|swanlab|ray|save|pissa|use_unsloth|overwrite)_?.*|do_(train|eval|predict)"
        "|output_dir|plot_loss|cache_dir|tokenized_path|logging_dir|report_to_project|use_fast_tokenizer|run_name"
        "|include_num_input_tokens_seen|val_on_each_dataset|enable_liger_kernel|use_reentrant_gc|predict_with_generate"
        "|data_seed|compute_accuracy|push_to_hub|print_param_status|disable_tqdm|eval_accumulation_steps"
        "|offload_folder|use_cache|infer_dtype|create_new_adapter|low_cpu_mem_usage|dataset|eval_dataset|dataset_dir"
        "|max_samples"
    ),
    refused={
        "stage": ("(?!(sft|pt|dpo|False)$).*", "set stage: sft, pt or dpo"),
        "finetuning_type": ("(?!(lora|False)$).*", "set finetuning_type: lora"),
        **dict.fromkeys(("image_max_pixels", "video_max_pixels", "media_dir", "audio_sampling_rate"), _PICTURES),
    },
    defaults={
        "method": "lora",
        "dataset.max_length": 2048,
        "lora.r": 8,
        "lora.lora_alpha": _twice_the_rank,
        "lora.lora_dropout": 0.0,
        "training.learning_rate": 5e-5,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 0,
        "training.optim": "adamw_torch_fused",
    },
)  # fmt: skip

_HELD_OUT = "loractl always holds out a share of the rows, a tenth unless dataset.test_size says otherwise"
_CARDS = "loractl divides a job over cards by itself (resources.cards); a step has as many rows as on one card"
_TEMPLATE = "the tokenizer's own chat template is used"
_FRESH = "the training starts with a fresh adapter; lora.init_from names a stored one"
_REASONS = {
    "val_set_size": _HELD_OUT, "val_size": _HELD_OUT, "deepspeed": _CARDS, "fsdp": _CARDS,
    "chat_template": _TEMPLATE, "template": _TEMPLATE, "eot_tokens": _TEMPLATE, "special_tokens": _TEMPLATE,
    "resume_from_checkpoint": _FRESH, "lora_model_dir": _FRESH, "adapter_name_or_path": _FRESH,
    "load_in_8bit": "the base is in 16 bit (lora) or NF4 (qlora)",
    "gptq": "loractl refuses weights that are already quantised: name the original model, with method: qlora",
    "optimizer": "training.optim stays at loractl's default", "optim": "training.optim stays at loractl's default",
    "trust_remote_code": "a model's own code runs only where the worker's owner allows it: LORACTL_TRUSTED_CODE",
    "train_on_inputs": "only answers count in the loss", "train_on_prompt": "only answers count in the loss",
}  # fmt: skip
"""What loractl does in place of settings that many files have."""


def short(value: Any) -> str:
    """A value in a line of text."""
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."


def get_key(tree: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key, or None."""
    here: Any = tree
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key; None removes the key."""
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    if value is None:
        tree.pop(last, None)
    else:
        tree[last] = value
