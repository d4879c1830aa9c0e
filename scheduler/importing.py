"""loractl import: an Axolotl or LLaMA-Factory configuration as a job file, and a list of what could not be carried."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from loractl.common.errors import UsageError

from .render import plain

_FREE = {"columns", "lr_scheduler_kwargs"}  # mappings whose keys are a person's
_AS_HERE = {"split": "train", "roles_to_train": ["assistant"], "train_on_eos": "turn"}  # what loractl does anyway
NOT_SUPERVISED = "loractl fine-tunes adapters on rows with answers"


@dataclass
class Imported:
    """A job file's keys and values, and what became of each key of the other tool's file."""

    tool: str
    job: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)  # their key -> our key
    left_out: dict[str, str] = field(default_factory=dict)  # their key -> why; without it the training is another
    not_needed: list[str] = field(default_factory=list)  # folders, caches, processes: nothing that is learned
    filled_in: dict[str, Any] = field(default_factory=dict)  # our key -> the tool's default, which differs from ours

    def put(self, theirs: str, ours: str, value: Any) -> None:
        """Carry a value under our name."""
        _set(self.job, ours, value)
        self.carried[theirs] = ours

    def leave(self, theirs: str, why: str) -> None:
        """Name a key that is not carried although it changes what is trained."""
        self.left_out[theirs] = why

    def skip(self, theirs: str) -> None:
        """Name a key that loractl has no need of."""
        self.not_needed.append(theirs)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the job file here.")
@click.option("--json", "as_json", is_flag=True, help="Print the job and what was left out as JSON.")
def import_config(file: Path, output: Path | None, as_json: bool) -> None:
    """Turn an Axolotl or LLaMA-Factory YAML into a job file.

    It goes to standard output unless -o names a file; what could not be carried, and why, goes to standard error.
    """
    if output is not None and output.exists():
        raise UsageError(f"{output} exists already", "name a new file")
    imported = import_file(file, output.parent if output is not None else Path())
    if as_json:
        click.echo(json.dumps(vars(imported)))
    left = plain(", ".join(sorted(imported.left_out))) or "nothing"
    text = f"# From {imported.tool}'s {plain(file.name)}, by loractl import. Left out: {left}.\n"
    text += yaml.safe_dump(imported.job, sort_keys=False, allow_unicode=True)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{output} can't be written: {error.strerror}") from error
    elif not as_json:
        click.echo(text, nl=False)
    if not as_json:
        click.echo(_account(imported, file, output), err=True)


def import_file(file: Path, folder: Path) -> Imported:
    """Read another tool's file for a job file in `folder`: local paths are written as seen from there.

    Raises SpecError for what is no YAML mapping, UsageError for another tool's file and for what is no LoRA on rows.
    """
    from loractl.common.jobfile import read_yaml

    theirs = {str(key): value for key, value in read_yaml(file)[0].items() if value is not None}
    if "model_name_or_path" in theirs:
        imported = _from_llama_factory(theirs, file, folder)
    elif "base_model" in theirs and ("datasets" in theirs or "micro_batch_size" in theirs):
        imported = _from_axolotl(theirs, file, folder)
    else:
        hint = "Axolotl's files have base_model and datasets, LLaMA-Factory's model_name_or_path and dataset"
        raise UsageError(f"{file} is neither Axolotl's nor LLaMA-Factory's", hint)
    for key in theirs.keys() - imported.carried.keys() - imported.left_out.keys() - set(imported.not_needed):
        imported.leave(key, "loractl has no such setting")
    imported.job = {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-")[:63] or "imported", **imported.job}
    _drop_what_is_refused(imported)
    return imported


def _from_axolotl(theirs: dict[str, Any], file: Path, folder: Path) -> Imported:
    found = Imported("Axolotl")
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
    found.put("base_model", "base_model", theirs["base_model"])
    four_bit = adapter == "qlora" or theirs.get("load_in_4bit") is True
    found.put("adapter", "method", "qlora" if four_bit else "lora")
    _same(found, theirs, _AXOLOTL_SAME)
    _skip(found, theirs, _AXOLOTL_NOT_NEEDED)
    _special(found, theirs, _AXOLOTL_SPECIAL)
    datasets = theirs.get("datasets") or []
    _axolotl_data(found, datasets if isinstance(datasets, list) else [datasets], file, folder)
    tests = theirs.get("test_datasets")
    if isinstance(tests, list) and tests and isinstance(tests[0], dict) and "path" in tests[0]:
        found.put("test_datasets", "dataset.eval_path", _from_here(tests[0]["path"], file.parent, folder))
        found.job["dataset"].pop("test_size", None)
    _fill(found, _AXOLOTL_DEFAULTS)
    return found


def _axolotl_data(found: Imported, datasets: list[Any], file: Path, folder: Path) -> None:
    first = datasets[0] if datasets and isinstance(datasets[0], dict) else {}
    if "path" not in first:
        raise UsageError(f"{file} names no data set", "datasets needs an entry with a path")
    files = first.get("data_files")
    path = files[0] if isinstance(files, list) and files else files or first["path"]
    found.put("datasets", "dataset.path", _from_here(path, file.parent, folder))
    if len(datasets) > 1 or (isinstance(files, list) and len(files) > 1):
        found.leave("datasets[1:]", "a job trains on one data set: put the rows into one file")
    kind = first.get("type", "chat_template")
    formats = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}
    if isinstance(kind, dict):
        columns = {
            ours: kind[theirs]
            for theirs, ours in (
                ("field_instruction", "instruction"),
                ("field_input", "input"),
                ("field_output", "output"),
                ("field_system", "system"),
            )
            if kind.get(theirs)
        }
        found.put("datasets[0].type", "dataset.columns", columns)
        rest = sorted(key for key, value in kind.items() if not key.startswith("field_") and value)
        if rest:
            found.leave("datasets[0].type", f"{', '.join(rest)}: prompts are made by the model's own chat template")
    elif kind in formats:
        if formats[kind]:
            found.put("datasets[0].type", "dataset.format", formats[kind])
    else:
        found.leave("datasets[0].type", f"{_short(kind)}: rows are recognised by their columns instead")
    renamed = {"field_messages": "messages", "message_field_role": "role", "message_field_content": "content"}
    for theirs, ours in renamed.items():
        if first.get(theirs):
            found.put(f"datasets[0].{theirs}", f"dataset.columns.{ours}", first[theirs])
    if kind == "completion" and first.get("field"):
        found.put("datasets[0].field", "dataset.columns.text", first["field"])
    known = {"path", "type", "data_files", "ds_type", "field", *renamed}
    mappings = first.get("message_property_mappings")
    if isinstance(mappings, dict):
        known.add("message_property_mappings")
        for ours in ("role", "content"):
            if mappings.get(ours, ours) != ours:
                found.put(f"datasets[0].message_property_mappings.{ours}", f"dataset.columns.{ours}", mappings[ours])
    for key in sorted(first.keys() - known):
        if first[key] == _AS_HERE.get(key):
            continue
        found.leave(f"datasets[0].{key}", f"{_short(first[key])}: loractl has no such setting")


def _from_llama_factory(theirs: dict[str, Any], file: Path, folder: Path) -> Imported:
    found = Imported("LLaMA-Factory")
    stage, kind = theirs.get("stage", "sft"), theirs.get("finetuning_type", "lora")
    if stage not in ("sft", "pt"):
        raise UsageError(f"{file} has stage: {stage}: {NOT_SUPERVISED}, by no other objective")
    if kind != "lora":
        raise UsageError(
            f"{file} has finetuning_type: {kind}: loractl trains LoRA and QLoRA", "set finetuning_type: lora"
        )
    found.put("model_name_or_path", "base_model", theirs["model_name_or_path"])
    bits = theirs.get("quantization_bit")
    found.put("quantization_bit" if bits == 4 else "finetuning_type", "method", "qlora" if bits == 4 else "lora")
    for key in ("stage", "finetuning_type"):
        if key in theirs and key not in found.carried:
            found.skip(key)
    if bits not in (None, 4):
        found.leave("quantization_bit", f"{_short(bits)}: the base is in 16 bit (lora) or NF4 (qlora)")
    _same(found, theirs, _FACTORY_SAME)
    _skip(found, theirs, _FACTORY_NOT_NEEDED)
    _special(found, theirs, _FACTORY_SPECIAL)
    place = file.parent / str(theirs.get("dataset_dir", "data"))
    place = place if place.is_dir() else Path(str(theirs.get("dataset_dir", "data")))
    if "dataset_dir" in theirs:
        found.skip("dataset_dir")
    if "dataset" not in theirs:
        raise UsageError(f"{file} names no data set", "dataset is a name from dataset_info.json")
    _factory_data(found, "dataset", theirs["dataset"], place, folder)
    if "eval_dataset" in theirs:
        _factory_data(found, "eval_dataset", theirs["eval_dataset"], place, folder)
        found.job["dataset"].pop("test_size", None)
    _fill(found, {**_FACTORY_DEFAULTS, "lora.lora_alpha": 2 * int(_get(found.job, "lora.r") or 8)})
    return found


def _factory_data(found: Imported, key: str, named: Any, place: Path, folder: Path) -> None:
    """Look the data set up in dataset_info.json, as LLaMA-Factory does."""
    names = [str(name).strip() for name in (named if isinstance(named, list) else str(named).split(","))]
    if len(names) > 1:
        found.leave(f"{key}: {', '.join(names[1:])}", "a job trains on one data set: put the rows into one file")
    ours = "dataset.path" if key == "dataset" else "dataset.eval_path"
    listing = place / "dataset_info.json"
    try:
        entry = json.loads(listing.read_text(encoding="utf-8")).get(names[0], {})
    except FileNotFoundError:
        entry = {}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{listing} can't be read: {error}") from error
    if not isinstance(entry, dict) or not entry.keys() & {"file_name", "hf_hub_url"}:
        found.put(key, ours, names[0])
        found.leave(f"{key}: {names[0]}", f"{listing} does not say which file that is: write its path into {ours}")
        return
    path = entry.get("file_name")
    found.put(key, ours, _from_here(path, place, folder) if path else entry["hf_hub_url"])
    if key != "dataset":
        return
    formatting = entry.get("formatting", "alpaca")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if formatting == "sharegpt":
        wanted = {
            "messages": "messages" if tags.get("content_tag") == "content" else "conversations",
            "system": "system",
        }
        pairs = (("role_tag", "from"), ("content_tag", "value"))
        renamed = {
            ours: tags[theirs] for theirs, ours in pairs if tags.get(theirs) not in (None, "role", "content", ours)
        }
    else:
        wanted, renamed = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}, {}
    renamed |= {wanted[k]: v for k, v in columns.items() if k in wanted and v and wanted[k] != v}
    if renamed:
        found.put(f"{listing.name}: columns", "dataset.columns", renamed)
    for column in sorted(columns.keys() - wanted.keys()):
        found.leave(f"{listing.name}: columns.{column}", "loractl's rows have no such column")


def _same(found: Imported, theirs: Mapping[str, Any], names: Mapping[str, str]) -> None:
    steps = theirs.get("max_steps")
    stops = isinstance(steps, int) and steps > 0
    for key in (name for name in names if name in theirs):
        # max_steps overrules the epochs where it is positive
        if (stops and names[key] == "training.num_train_epochs") or (not stops and key == "max_steps"):
            found.skip(key)
        else:
            found.put(key, names[key], theirs[key])


def _skip(found: Imported, theirs: Mapping[str, Any], names: set[str]) -> None:
    for key in sorted(names & theirs.keys()):
        found.skip(key)


def _special(
    found: Imported, theirs: dict[str, Any], rules: Mapping[str, Callable[[Imported, str, Any], None]]
) -> None:
    for key in rules:  # in the order of the rules: a later one may overrule an earlier one
        if key in theirs:
            rules[key](found, key, theirs[key])


def _fill(found: Imported, defaults: Mapping[str, Any]) -> None:
    for key, value in defaults.items():
        if _get(found.job, key) is None and not (
            key == "training.num_train_epochs" and _get(found.job, "training.max_steps")
        ):
            _set(found.job, key, value)
            found.filled_in[key] = value


def _drop_what_is_refused(found: Imported) -> None:
    """Leave out each value that a job file does not take, with its reason. Raises SpecError where it needs one."""
    from pydantic import ValidationError

    from loractl.common.errors import SpecError, SpecProblem
    from loractl.common.spec import AS_WRITTEN, JobSpec

    while True:
        try:
            spec = JobSpec.model_validate(found.job, context=AS_WRITTEN)
        except ValidationError as error:
            told = error.errors()[0]
            key, what = ".".join(str(part) for part in told["loc"] if not isinstance(part, int)), told["msg"]
            if told["type"] == "literal_error":
                what = "is none of those that loractl has"
            if not key:  # what two keys together do not do: "key: sentence", a line each
                key, _, what = what.removeprefix("Value error, ").partition("\n")[0].partition(": ")
            names = [theirs for theirs, ours in found.carried.items() if key == ours or key.startswith(f"{ours}.")]
            if not names or key in ("base_model", "dataset.path"):
                problem = SpecProblem(file=f"the job from {found.tool}", line=None, key=key, what=what)
                raise SpecError([problem]) from None
            for name in names:
                ours = found.carried.pop(name)
                found.leave(name, f"{_short(_get(found.job, ours))}: {what[0].lower()}{what[1:]}")
                _unset(found.job, ours)
            continue
        break
    resolved = spec.model_dump(mode="json")
    found.job = _in_order(resolved, found.job)


def _in_order(resolved: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The values that are written, as the spec reads them and in its order."""
    return {
        key: _in_order(value, written[key]) if isinstance(value, dict) and key not in _FREE else value
        for key, value in resolved.items()
        if key in written
    }


def _account(found: Imported, file: Path, output: Path | None) -> str:
    total = len(found.carried) + len(found.left_out) + len(found.not_needed)
    lines = [f"{len(found.carried)} of {total} settings of {file} ({found.tool}) are carried."]
    if found.left_out:
        wide = min(36, max(map(len, found.left_out)))
        lines += ["Left out, so the training is not quite the same:"]
        lines += [f"  {key:{wide}}  {why}" for key, why in sorted(found.left_out.items())]
    if found.filled_in:
        said = ", ".join(f"{key} {value}" for key, value in found.filled_in.items())
        lines.append(f"Written out, since {found.tool} takes other defaults: {said}.")
    if found.not_needed:
        lines.append(f"Not needed here: {', '.join(sorted(found.not_needed))}.")
    lines.append(f"Check it with its data: loractl data check {output or 'job.yaml'}")
    return "\n".join(map(plain, lines))


def _from_here(path: Any, source: Path, folder: Path) -> str:
    """A local path of the other tool, which takes it from where it is started, as seen from the job file's folder."""
    text = str(path)
    for place in (source / text, Path(text)):
        if place.is_file():
            return text if Path(text).is_absolute() else os.path.relpath(place, folder)
    return text


def _choice(ours: str, values: Mapping[Any, Any], why: str) -> Callable[[Imported, str, Any], None]:
    """A setting whose values have other names here; None: the value needs nothing."""

    def rule(found: Imported, key: str, value: Any) -> None:
        known = value.lower() if isinstance(value, str) else value
        if not isinstance(known, (str, bool, int)) or known not in values:
            found.leave(key, f"{_short(value)}: {why}")
        elif values[known] is None:
            found.skip(key)
        else:
            found.put(key, ours, values[known])

    return rule


def _only(accepted: Any, why: str) -> Callable[[Imported, str, Any], None]:
    """A setting of which loractl does one value only."""

    def rule(found: Imported, key: str, value: Any) -> None:
        if value == accepted:
            found.skip(key)
        else:
            found.leave(key, why)

    return rule


def _held_out(found: Imported, key: str, value: Any) -> None:
    if isinstance(value, (int, float)) and 0 < value < 1:
        found.put(key, "dataset.test_size", value)
    elif value:
        found.leave(key, f"{_short(value)} rows: dataset.test_size is a share")
    else:
        found.leave(key, "0: rows are always held out, a tenth, to compare base and tuned on")


def _names(ours: str) -> Callable[[Imported, str, Any], None]:
    """A list of modules, also written with commas."""

    def rule(found: Imported, key: str, value: Any) -> None:
        names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
        found.put(key, ours, "all-linear" if names in (["all"], ["all-linear"]) else names)

    return rule


def _all_linear(found: Imported, key: str, value: Any) -> None:
    if value is True:
        found.put(key, "lora.target_modules", "all-linear")
    else:
        found.skip(key)


def _tracker(name: str) -> Callable[[Imported, str, Any], None]:
    def rule(found: Imported, key: str, value: Any) -> None:
        if not value:
            found.skip(key)
            return
        _set(found.job, "training.report_to", [*(_get(found.job, "training.report_to") or []), name])
        found.carried[key] = "training.report_to"

    return rule


def _trackers(found: Imported, key: str, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    if names in (["none"], [[]]):
        found.skip(key)
    else:
        found.put(key, "training.report_to", names)


def _truth(ours: str) -> Callable[[Imported, str, Any], None]:
    """A switch that may also name a way of doing it."""
    return lambda found, key, value: found.put(key, ours, bool(value))


def _least_rate(found: Imported, key: str, value: Any) -> None:
    found.put(key, "training.lr_scheduler_kwargs", {"min_lr_rate": value})
    _set(found.job, "training.lr_scheduler_type", "cosine_with_min_lr")


_OPTIMIZERS = {
    name: name
    for name in (
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit",
        "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit", "adafactor", "adagrad",
        "rmsprop", "sgd",
    )
} | {"adamw_bnb_8bit": "adamw_8bit", "adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}  # fmt: skip
_OPTIMIZER = _choice("training.optim", _OPTIMIZERS, "loractl has no such optimizer")
_BF16 = _choice(
    "training.dtype", {True: "bfloat16", "full": "bfloat16", "auto": None, False: None}, "no such number format"
)
_FP16 = _choice("training.dtype", {True: "float16", False: None}, "no such number format")
_FRESH = _only(None, "training begins with a fresh adapter")
_ONE_CARD = _only(None, "a job trains on one card")
_ANSWERS = _only(False, "the loss is on answers alone")
_TEMPLATE = _only("tokenizer_default", "the tokenizer's own chat template is used")
_TOKENS = _only(None, "the tokenizer is used as it is")
_REMOTE = _only(False, "a model's own code runs only where the worker's owner allows it: LORACTL_TRUSTED_CODE")

_AXOLOTL_SAME = {
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
_AXOLOTL_NOT_NEEDED = {
    "output_dir", "dataset_prepared_path", "strict", "debug", "model_type", "tokenizer_type", "tokenizer_config",
    "is_llama_derived_model", "is_mistral_derived_model", "load_in_4bit", "pad_to_sequence_len", "eval_sample_packing",
    "gradient_checkpointing_kwargs", "local_rank", "saves_per_epoch", "save_total_limit", "save_safetensors",
    "eval_table_size", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model", "wandb_mode",
    "dataset_processes", "dataloader_num_workers", "dataloader_pin_memory", "hub_model_id", "val_set_seed",
    "lora_fan_in_fan_out", "resume_from_checkpoint", "auto_resume_from_checkpoints", "plugins",
    "include_tokens_per_second", "shuffle_merged_datasets", "do_eval", "eval_strategy", "save_strategy",
}  # fmt: skip
_AXOLOTL_SPECIAL: dict[str, Callable[[Imported, str, Any], None]] = {
    "val_set_size": _held_out,
    "lora_target_modules": _names("lora.target_modules"),
    "lora_target_linear": _all_linear,
    "optimizer": _OPTIMIZER,
    "cosine_min_lr_ratio": _least_rate,
    "bf16": _BF16,
    "bfloat16": _BF16,
    "fp16": _FP16,
    "float16": _FP16,
    "tf32": _only(False, "matrix products keep torch's default precision"),
    "gradient_checkpointing": _truth("training.gradient_checkpointing"),
    "flash_attention": _choice("training.attn_implementation", {True: "flash_attention_2", False: None}, "unknown"),
    "sdp_attention": _choice("training.attn_implementation", {True: "sdpa", False: None}, "unknown"),
    "eager_attention": _choice("training.attn_implementation", {True: "eager", False: None}, "unknown"),
    "xformers_attention": _only(False, "attention is transformers' own"),
    "group_by_length": _choice(
        "training.train_sampling_strategy", {True: "group_by_length", False: None}, "rows come at random"
    ),
    "curriculum_sampling": _choice(
        "training.train_sampling_strategy", {True: "sequential", False: None}, "rows come at random"
    ),
    "peft_init_lora_weights": _choice(
        "lora.init_lora_weights",
        {True: None, "gaussian": "gaussian", "orthogonal": "orthogonal", "loftq": "loftq"},
        "the adapter begins as peft's default",
    ),
    "wandb_project": _tracker("wandb"),
    "use_wandb": _tracker("wandb"),
    "use_tensorboard": _tracker("tensorboard"),
    "use_mlflow": _tracker("mlflow"),
    "load_in_8bit": _only(False, "true: the base is in 16 bit (lora) or NF4 (qlora)"),
    "train_on_inputs": _ANSWERS,
    "chat_template": _TEMPLATE,
    "special_tokens": _TOKENS,
    "tokens": _TOKENS,
    "lora_model_dir": _FRESH,
    "deepspeed": _ONE_CARD,
    "fsdp": _ONE_CARD,
    "fsdp_config": _ONE_CARD,
    "trust_remote_code": _REMOTE,
    "evals_per_epoch": _only(0, "the held-out loss is measured at the end, and every training.eval_steps"),
}
_AXOLOTL_DEFAULTS = {
    "dataset.max_length": 512,
    "lora.lora_dropout": 0.0,
    "training.num_train_epochs": 1,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
}

_FACTORY_SAME = {
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
_FACTORY_NOT_NEEDED = {
    "do_train", "do_eval", "output_dir", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers",
    "dataloader_num_workers", "plot_loss", "save_only_model", "save_total_limit", "ddp_timeout", "save_strategy",
    "resume_from_checkpoint", "eval_strategy", "evaluation_strategy", "run_name", "cache_dir", "tokenized_path",
    "quantization_method", "double_quantization", "quantization_type", "report_to_project", "use_fast_tokenizer",
    "include_num_input_tokens_seen", "ddp_find_unused_parameters", "val_on_each_dataset", "upcast_layernorm",
}  # fmt: skip
_FACTORY_SPECIAL: dict[str, Callable[[Imported, str, Any], None]] = {
    "val_size": _held_out,
    "lora_target": _names("lora.target_modules"),
    "additional_target": _names("lora.modules_to_save"),
    "optim": _OPTIMIZER,
    "bf16": _BF16,
    "pure_bf16": _BF16,
    "fp16": _FP16,
    "gradient_checkpointing": _truth("training.gradient_checkpointing"),
    "disable_gradient_checkpointing": lambda found, key, value: found.put(
        key, "training.gradient_checkpointing", not value
    ),
    "flash_attn": _choice(
        "training.attn_implementation",
        {"auto": None, "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"},
        "attention is transformers' own",
    ),
    "group_by_length": _AXOLOTL_SPECIAL["group_by_length"],
    "disable_shuffling": _AXOLOTL_SPECIAL["curriculum_sampling"],
    "report_to": _trackers,
    "template": _TEMPLATE,
    "max_samples": _only(None, "every row is trained on"),
    "train_on_prompt": _ANSWERS,
    "mask_history": _only(False, "every answer of a conversation is learned"),
    "pissa_init": _only(False, "the adapter begins as peft's default"),
    "adapter_name_or_path": _FRESH,
    "deepspeed": _ONE_CARD,
    "fsdp": _ONE_CARD,
    "trust_remote_code": _REMOTE,
    "add_tokens": _TOKENS,
    "add_special_tokens": _TOKENS,
    "resize_vocab": _only(False, "the tokenizer is used as it is"),
}
_FACTORY_DEFAULTS = {
    "dataset.max_length": 2048,
    "lora.r": 8,
    "lora.lora_dropout": 0.0,
    "training.learning_rate": 5e-5,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
}


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _get(tree: Mapping[str, Any], key: str) -> Any:
    here: Any = tree
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _unset(tree: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree[part]
    tree.pop(last, None)
