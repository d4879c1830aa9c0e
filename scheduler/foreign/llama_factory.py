"""LLaMA-Factory's configuration as a job."""

from __future__ import annotations

import json
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


def from_llama_factory(theirs: dict[str, Any], file: Path, folder: Path) -> Draft:
    """The job of a LLaMA-Factory file. Raises UsageError unless it trains LoRA on rows with answers."""
    draft = Draft("LLaMA-Factory")
    stage, kind = theirs.get("stage", "sft"), theirs.get("finetuning_type", "lora")
    if stage not in ("sft", "pt"):
        raise UsageError(f"{file} has stage: {stage}: {NOT_SUPERVISED}, by no other objective")
    if kind != "lora":
        raise UsageError(
            f"{file} has finetuning_type: {kind}: loractl trains LoRA and QLoRA", "set finetuning_type: lora"
        )
    refuse_pictures(theirs, _PICTURES, file)
    draft.put("model_name_or_path", "base_model", theirs["model_name_or_path"])
    bits = theirs.get("quantization_bit")
    draft.put("quantization_bit" if bits == 4 else "finetuning_type", "method", "qlora" if bits == 4 else "lora")
    for key in ("stage", "finetuning_type"):
        if key in theirs and key not in draft.carried:
            draft.skip(key)
    if bits not in (None, 4):
        draft.leave("quantization_bit", f"{short(bits)}: the base is in 16 bit (lora) or NF4 (qlora)")
    carry_same(draft, theirs, _SAME)
    skip_all(draft, theirs, _NOT_NEEDED)
    carry_by_rules(draft, theirs, _RULES)
    place = file.parent / str(theirs.get("dataset_dir", "data"))
    place = place if place.is_dir() else Path(str(theirs.get("dataset_dir", "data")))
    if "dataset_dir" in theirs:
        draft.skip("dataset_dir")
    if "dataset" not in theirs:
        raise UsageError(f"{file} names no data set", "dataset is a name from dataset_info.json")
    entry = _data(draft, "dataset", theirs["dataset"], place, folder)
    _columns(draft, entry, texts=stage == "pt")
    if "eval_dataset" in theirs:
        _data(draft, "eval_dataset", theirs["eval_dataset"], place, folder)
        unset_key(draft.job, "dataset.test_size")
    tell_held_out(draft, theirs, "val_size")
    _rows(draft, theirs)
    _evaluations(draft, theirs)
    if not any(theirs.get(key) for key in ("bf16", "pure_bf16", "fp16")):
        draft.differ(
            "bf16", "off, and fp16 too: LLaMA-Factory takes the base's own number format, loractl the device's"
        )
    rank = get_key(draft.job, "lora.r")
    fill_in(draft, {**_DEFAULTS, "lora.lora_alpha": 2 * (rank if isinstance(rank, int) else _DEFAULTS["lora.r"])})
    return draft


def _rows(draft: Draft, theirs: dict[str, Any]) -> None:
    """How rows become tokens there, where it is otherwise here."""
    packs = theirs.get("packing", theirs.get("stage") == "pt")
    if theirs.get("stage") == "pt":
        draft.put("stage", "dataset.format", "text")
        draft.not_needed.remove("stage")
        if packs:
            if "packing" not in theirs:
                set_key(draft.job, "training.packing", True)
                draft.filled_in["training.packing"] = True
            what = "LLaMA-Factory cuts the row of all texts at each cutoff_len, so that none is lost and they see each "
            draft.differ("packing", f"{what}other; here a longer text loses its end, and texts can't see each other")
        return
    if packs and not theirs.get("neat_packing"):
        draft.differ("packing", "examples that share a row see each other there, as with neat_packing they don't here")
    what = "LLaMA-Factory cuts question and answer of a longer row in proportion, loractl cuts the row's end"
    draft.differ("cutoff_len", what)
    if "template" in theirs:
        what = "LLaMA-Factory also learns what its template writes after an answer's end, often a newline"
        draft.differ("template", f"{what}; loractl does not")


def _evaluations(draft: Draft, theirs: dict[str, Any]) -> None:
    """How often the held-out loss is measured on the way: not at all, unless the file says so."""
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


def _data(draft: Draft, key: str, named: Any, place: Path, folder: Path) -> dict[str, Any]:
    """Look the data set up in dataset_info.json, as LLaMA-Factory does. Returns what that says of it."""
    names = [str(name).strip() for name in (named if isinstance(named, list) else str(named).split(","))] or [""]
    if len(names) > 1:
        draft.leave(f"{key}: {', '.join(names[1:])}", "a job trains on one data set: put the rows into one file")
    ours = "dataset.path" if key == "dataset" else "dataset.eval_path"
    listing = place / "dataset_info.json"
    entry = _listed(listing, names[0])
    local, hub = entry.get("file_name"), entry.get("hf_hub_url")
    if isinstance(local, str) and local:
        draft.put(key, ours, from_here(local, place, folder))
    elif isinstance(hub, str) and hub:
        draft.put(key, ours, hub)
    else:
        draft.put(key, ours, names[0])
        draft.leave(f"{key}: {names[0]}", f"{listing} does not say which file that is: write its path into {ours}")
    columns = part if isinstance(part := entry.get("columns"), dict) else {}
    if seen := {"images", "videos", "audios"} & columns.keys():
        what = f"{listing}: {names[0]} has {', '.join(sorted(seen))}"
        raise UsageError(f"{what}, and loractl trains on text alone")
    return entry


def _listed(listing: Path, name: str) -> dict[str, Any]:
    """What dataset_info.json says of a data set; nothing where it does not name it, or is not there."""
    try:
        entry = json.loads(listing.read_text(encoding="utf-8")).get(name, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{listing} can't be read: {error}") from error
    return entry if isinstance(entry, dict) else {}


def _columns(draft: Draft, entry: dict[str, Any], *, texts: bool) -> None:
    """The listing's names of columns, where they differ from loractl's. `texts`: rows are plain text, in one column."""
    listing = "dataset_info.json"
    columns, tags = ({} if not isinstance(part := entry.get(key), dict) else part for key in ("columns", "tags"))
    if texts:
        theirs = {"text": columns.get("prompt", "instruction" if entry else "text")}
        known = {"prompt"}
    elif entry.get("formatting") == "sharegpt":
        openai = tags.get("content_tag") == "content"
        role, content = ("role", "content") if openai else ("from", "value")
        theirs = {
            "messages" if openai else "conversations": columns.get("messages", "conversations"),
            role: tags.get("role_tag", "from"),
            content: tags.get("content_tag", "value"),
            "system": columns.get("system", "system"),
        }
        known = {"messages", "system"}
    else:
        ours_of = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
        theirs = {ours: columns.get(name, ours) for name, ours in ours_of.items()}
        known = set(ours_of)
        if entry and columns.get("query", "input"):
            draft.differ(
                f"{listing}: columns.query", "a row's input follows on the next line there, after an empty line here"
            )
    renamed = {ours: name for ours, name in theirs.items() if name and name != ours}
    if renamed:
        draft.put(f"{listing}: columns", "dataset.columns", renamed)
    for column in sorted(columns.keys() - known):
        draft.leave(f"{listing}: columns.{column}", "loractl's rows have no such column")


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
    "do_train", "do_eval", "output_dir", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers",
    "dataloader_num_workers", "plot_loss", "save_only_model", "save_total_limit", "ddp_timeout", "save_strategy",
    "resume_from_checkpoint", "run_name", "cache_dir", "tokenized_path",
    "quantization_method", "double_quantization", "quantization_type", "report_to_project", "use_fast_tokenizer",
    "include_num_input_tokens_seen", "ddp_find_unused_parameters", "val_on_each_dataset", "upcast_layernorm",
}  # fmt: skip


_PICTURES = {"image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "video_fps", "media_dir",
             "freeze_vision_tower", "audio_sampling_rate"}  # fmt: skip
"""Keys of files that train on more than text."""


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
        "attention is transformers' own",
    ),
    "group_by_length": BY_LENGTH,
    "disable_shuffling": IN_ORDER,
    "report_to": _trackers,
    "template": choice(
        "dataset.template", {"alpaca": "alpaca", "tokenizer_default": None}, "the tokenizer's own chat template is used"
    ),
    "max_samples": only(None, "every row is trained on"),
    "train_on_prompt": ANSWERS,
    "mask_history": only(False, "every answer of a conversation is learned"),
    "pissa_init": only(False, "the adapter begins as peft's default"),
    "adapter_name_or_path": FRESH,
    "deepspeed": ONE_CARD,
    "fsdp": ONE_CARD,
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
