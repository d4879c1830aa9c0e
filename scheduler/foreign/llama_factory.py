"""LLaMA-Factory's configuration as a job."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loractl.common.errors import UsageError

from .llama_factory_rows import carry_rows
from .preferences import factory_loss, is_of_pairs
from .translation import (
    ANSWERS,
    BF16,
    BY_LENGTH,
    CARDS,
    FP16,
    FRESH,
    IN_ORDER,
    ONE_CARD,
    OPTIMIZER,
    OWN_OPTIMIZER,
    REMOTE,
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
    only_of,
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


def from_llama_factory(theirs: dict[str, Any], file: Path, folder: Path) -> Draft:
    """The job of a LLaMA-Factory file. Raises UsageError unless it trains LoRA on rows with answers."""
    draft = Draft("LLaMA-Factory")
    _refuse(theirs, file)
    draft.put("model_name_or_path", "base_model", theirs["model_name_or_path"])
    bits = theirs.get("quantization_bit")
    draft.put("quantization_bit" if bits == 4 else "finetuning_type", "method", "qlora" if bits == 4 else "lora")
    for key in ("stage", "finetuning_type"):
        if key in theirs and key not in draft.carried:
            draft.skip(key)
    if bits not in (None, 4):
        draft.leave("quantization_bit", f"{short(bits)}: the base is in 16 bit (lora) or NF4 (qlora)")
    carry_same(draft, theirs, _SAME)
    skip_all(draft, theirs, _NOT_NEEDED, _KERNELS)
    leave_all(draft, theirs, _REASONS)
    carry_by_rules(draft, theirs, _RULES)
    carry_run_name(draft, theirs, "run_name")
    if theirs.get("stage") == "dpo":
        factory_loss(draft, theirs)
    elif theirs.get("packing") or theirs.get("neat_packing"):
        set_key(draft.job, "training.packing", True)  # either one switches it on
    carry_rows(draft, theirs, file, folder)
    tell_held_out(draft, theirs, "val_size")
    tell_tf32(draft, theirs)
    tell_quantised(draft)
    _tokens(draft, theirs)
    _evaluations(draft, theirs)
    if not any(theirs.get(key) for key in ("bf16", "pure_bf16", "fp16")):
        draft.differ("bf16", "off, like fp16: LLaMA-Factory uses the base's own number format, loractl the device's")
    if theirs.get("pure_bf16"):
        draft.differ("pure_bf16", "LLaMA-Factory keeps the adapter's own weights in bf16, loractl in fp32")
    own = {"training.optim": OWN_OPTIMIZER} if bits == 4 and "optim" not in theirs else {}
    rank = get_key(draft.job, "lora.r")
    rank = rank if isinstance(rank, int) else _DEFAULTS["lora.r"]
    defaults = {key: value for key, value in _DEFAULTS.items() if key != "lora.lora_dropout" or not is_of_pairs(draft)}
    fill_in(draft, {**defaults, **own, "lora.lora_alpha": 2 * rank})
    return draft


def _refuse(theirs: dict[str, Any], file: Path) -> None:
    """Raises UsageError unless it is LoRA training on rows of text."""
    stage, kind = theirs.get("stage", "sft"), theirs.get("finetuning_type", "lora")
    if not theirs.get("do_train") and (other := next((key for key in _NO_TRAINING if theirs.get(key)), None)):
        raise UsageError(f"{file} does not train ({other} without do_train), but a job does", _NO_TRAINING[other])
    if stage not in ("sft", "pt", "dpo"):
        raise refuse_objective(f"{file} has stage: {stage}", "set stage: sft")
    if kind != "lora":
        raise UsageError(
            f"{file} has finetuning_type: {kind}: loractl trains LoRA and QLoRA", "set finetuning_type: lora"
        )
    refuse_pictures(theirs, _PICTURES, file)


def _tokens(draft: Draft, theirs: dict[str, Any]) -> None:
    """Report how LLaMA-Factory makes tokens of rows, if loractl does it differently."""
    packs = get_key(draft.job, "training.packing")
    if theirs.get("stage") == "pt":
        draft.put("stage", "dataset.format", "text")
        draft.not_needed.remove("stage")
        if packs is None:
            packs = True
            set_key(draft.job, "training.packing", True)
            draft.filled_in["training.packing"] = True
        _texts(draft, theirs, packs=bool(packs))
        return
    if packs and not theirs.get("neat_packing"):
        draft.differ("packing", "examples that share a row see each other in LLaMA-Factory; in loractl they don't")
    what = "LLaMA-Factory cuts question and answer of a longer row in proportion, loractl cuts off the row's end"
    draft.differ("cutoff_len", what)
    if theirs.get("template", "tokenizer_default") != "tokenizer_default":
        what = "LLaMA-Factory also learns what its template writes after an answer's end, often a newline"
        draft.differ("template", f"{what}; loractl does not")


def _texts(draft: Draft, theirs: dict[str, Any], *, packs: bool) -> None:
    """Report the differences for plain text: the tokens are the same unless rows are packed, but other tokens are
    learned, and the loss is averaged in another way.

    LLaMA-Factory's processor/pretrain.py and transformers' DataCollatorForLanguageModeling and get_batch_samples.
    """
    ends = "LLaMA-Factory learns a text's end only if the padding token is another token, loractl always does"
    averaged = "LLaMA-Factory divides a step's loss by all tokens, loractl by all but each row's first token"
    draft.differ("stage", f"pt: {ends}; {averaged}")
    if packs:
        there = "LLaMA-Factory joins 1,000 texts at a time, cuts them every cutoff_len tokens, and drops the rest"
        draft.differ("packing", f"{there}; loractl cuts off the end of a longer text, and texts can't see each other")
    if "template" not in theirs:
        return
    draft.carried.pop("template", None)
    draft.left_out.pop("template", None)
    unset_key(draft.job, "dataset.template")
    if theirs["template"] == "llama3":
        draft.leave("template", '"llama3": ends a text with <|end_of_text|>, loractl with the tokenizer\'s own end')
    elif "template" not in draft.not_needed:
        draft.skip("template")


def _evaluations(draft: Draft, theirs: dict[str, Any]) -> None:
    """How often the held-out loss is measured during training: never, unless the file says so."""
    key = "eval_strategy" if "eval_strategy" in theirs else "evaluation_strategy"
    strategy = theirs.get(key, "no")
    if strategy != "steps" and "eval_steps" in draft.carried:
        unset_key(draft.job, "training.eval_steps")
        del draft.carried["eval_steps"]
        draft.skip("eval_steps")
    if strategy == "steps" and "eval_steps" not in theirs:
        draft.put(key, "training.eval_steps", get_key(draft.job, "training.logging_steps") or 500)
    elif strategy == "epoch":
        evaluate_each(draft, key, 1)
    elif key in theirs:
        draft.skip(key)


def _trackers(draft: Draft, key: str, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    if names in (["none"], [[]]):
        draft.skip(key)
    else:
        draft.put(key, "training.report_to", names)


_SAME = {
    "model_revision": "revision",
    "cutoff_len": "dataset.max_length",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
    "packing": "training.packing",
    "neat_packing": "training.packing",
    "neftune_noise_alpha": "training.neftune_noise_alpha",
    "per_device_eval_batch_size": "evaluation.per_device_eval_batch_size",
    "max_new_tokens": "evaluation.max_new_tokens",
    "warmup_ratio": "training.warmup_steps",
    "warmup_steps": "training.warmup_steps",
    **{
        key: f"training.{key}"
        for key in (
            "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs",
            "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "adam_beta1",
            "adam_beta2", "adam_epsilon", "label_smoothing_factor", "logging_steps", "save_steps", "eval_steps",
            "load_best_model_at_end", "torch_compile", "seed",
        )
    },
}  # fmt: skip


_NOT_NEEDED = {
    "do_train", "do_eval", "do_predict", "output_dir", "overwrite_output_dir", "overwrite_cache", "plot_loss",
    "save_only_model", "save_total_limit", "save_strategy", "cache_dir", "tokenized_path", "logging_dir",
    "report_to_project", "use_fast_tokenizer", "include_num_input_tokens_seen", "val_on_each_dataset",
    "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_reentrant_gc", "predict_with_generate", "data_seed",
    "compute_accuracy", "pissa_iter", "pissa_convert", "push_to_hub", "print_param_status", "save_safetensors",
    "disable_tqdm", "eval_accumulation_steps", "offload_folder", "use_cache", "infer_dtype", "create_new_adapter",
    "low_cpu_mem_usage",
}  # fmt: skip


_KERNELS = re.compile("(ddp|hub|dataloader|preprocessing|swanlab)_.*|ray_(?!num_workers).*")
"""Settings that say where a run takes place and is logged."""


_NO_TRAINING = {
    "export_dir": "loractl adapters merge makes a full model from an adapter",
    "infer_backend": "loractl generate, chat and serve answer with an adapter",
    "do_predict": "loractl predict answers a file's rows",
    "do_eval": "loractl report has the evaluation of every job",
}
"""What a file without training does, and the command for it here."""


_REASONS = {
    "loraplus_lr_ratio": "A and B have the same learning rate",
    "upcast_layernorm": "layer norms are not kept in fp32",
    "use_swanlab": "loractl reports to tensorboard, wandb, mlflow and trackio",
    "shift_attn": "loractl uses transformers' attention",
    "rope_scaling": "loractl uses the base model's own position embeddings",
    "use_kt": "experts stay on the card; the processor does not compute them",
    "streaming": "the data set is read as a whole",
}
"""Why there is no counterpart."""


_PICTURES = {"image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "video_fps", "media_dir",
             "freeze_vision_tower", "audio_sampling_rate"}  # fmt: skip
"""Keys of training on more than text."""


_RULES: dict[str, Callable[[Draft, str, Any], None]] = {
    "val_size": held_out,
    "lora_target": names_of("lora.target_modules"),
    "additional_target": names_of("lora.modules_to_save"),
    "optim": OPTIMIZER,
    "bf16": BF16,
    "pure_bf16": BF16,
    "fp16": FP16,
    "gradient_checkpointing": truth("training.gradient_checkpointing"),
    "disable_gradient_checkpointing": lambda draft, key, value: draft.put(
        key, "training.gradient_checkpointing", not value
    ),
    "flash_attn": choice(
        "training.attn_implementation",
        {"auto": None, "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"},
        "loractl uses transformers' attention",
    ),
    "group_by_length": BY_LENGTH,
    "disable_shuffling": IN_ORDER,
    "report_to": _trackers,
    "template": choice(
        "dataset.template", {"alpaca": "alpaca", "tokenizer_default": None}, "the tokenizer's own chat template is used"
    ),
    "train_on_prompt": ANSWERS,
    "mask_history": only(False, "every answer of a conversation is learned"),
    "pissa_init": only(False, "the adapter starts with peft's default weights"),
    "adapter_name_or_path": FRESH,
    "resume_from_checkpoint": FRESH,
    "quantization_method": only_of(("bnb", "bitsandbytes"), "NF4 of bitsandbytes is used"),
    "quantization_type": only("nf4", "NF4 is used"),
    "double_quantization": only(True, "false: NF4 with double quantization is used"),
    "deepspeed": ONE_CARD,
    "fsdp": ONE_CARD,
    "ray_num_workers": CARDS,
    "trust_remote_code": REMOTE,
    "add_tokens": TOKENS,
    "add_special_tokens": TOKENS,
    "resize_vocab": only(False, "the tokenizer is used as it is"),
}


_DEFAULTS: dict[str, Any] = {
    "dataset.max_length": 2048,
    "lora.r": 8,
    "lora.lora_dropout": 0.0,
    "training.learning_rate": 5e-5,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
}
