"""A job file: its YAML becomes a JobSpec, or a list of problems, each with its line and a "did you mean"."""

from __future__ import annotations

import copy
import datetime as dt
import difflib
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml import MarkedYAMLError, YAMLError

from loractl.common.errors import SpecError, SpecProblem
from loractl.common.text import slip_of

from .document import Document, load_yaml, read_documents, read_yaml, slip_in
from .names import from_address
from .sections import AS_WRITTEN, DATA_SUFFIXES, GENERATED, AncestorJob, OwnMetric, RowFields, SourceSpec
from .spec import JobSpec, spec_keys

_KNOWN_AS = {
    "model": "base_model",
    "model_name_or_path": "base_model",
    "base": "base_model",
    "task": "task_type",
    "rl": "task_type",
    "rl_beta": "preference.beta",
    "dpo_beta": "preference.beta",
    "orpo_alpha": "preference.beta",
    "pref_beta": "preference.beta",
    "pref_loss": "preference.loss_type",
    "dpo_loss_type": "preference.loss_type",
    "dpo_label_smoothing": "preference.label_smoothing",
    "pref_ftx": "preference.loss_weights",
    "rpo_alpha": "preference.loss_weights",
    "data": "dataset",
    "datasets": "dataset",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "alpha": "lora.lora_alpha",
    "lora_alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_dropout": "lora.lora_dropout",
    "target_modules": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "epoch": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps",
    "scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "sequence_len": "dataset.max_length",
    "cutoff_len": "dataset.max_length",
    "max_seq_length": "dataset.max_length",
    "val_set_size": "dataset.test_size",
    "vram": "resources.max_vram",
    "timeout": "resources.time_limit",
    "retries": "max_retries",
    "group_by_length": "training.train_sampling_strategy",
    "sample_packing": "training.packing",
    "neftune_alpha": "training.neftune_noise_alpha",
    "flash_attention": "training.attn_implementation",
    "mixed_precision": "training.dtype",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "dora": "lora.use_dora",
    "early_stopping": "training.early_stopping_patience",
    "max_tokens": "evaluation.max_new_tokens",
    "lm_eval_tasks": "evaluation.lm_eval",
    "tags": "labels",
}
"""What other tools call our keys, for "did you mean"."""


_NOT_HERE = {
    "gpus": "write resources.cards, the number of one box's cards; the workers choose them",
    "num_gpus": "write resources.cards, the number of one box's cards; the workers choose them",
    "deepspeed": "write resources.cards and resources.parallel: sharded, which divides the base among the cards",
    "fsdp": "write resources.cards and resources.parallel: sharded, which divides the base among the cards",
    "device_map": "leave it out: the workers choose the card",
    "output_dir": "leave it out: the result is stored; loractl adapters pull copies it into a folder",
    "gptq": "name the model that the GPTQ weights were made from as base_model, with method: qlora",
    "load_in_4bit": "write method: qlora, which holds the base in 4 bits (NF4)",
    "load_in_8bit": "write method: qlora, which holds the base in 4 bits (NF4); 8 bits are not offered",
    "quantization": "write method: qlora, which holds the base in 4 bits (NF4)",
    "quantization_bit": "write method: qlora, which holds the base in 4 bits (NF4)",
}
"""Keys of other tools that no key of ours matches, with what to write instead."""

_VALUES_KNOWN_AS = {
    "adam": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "flash": "flash_attention_2",
    "fa2": "flash_attention_2",
    "cosine_with_warmup": "cosine",
    "wsd": "warmup_stable_decay",
    "shuffle": "random",
    "openai": "messages",
    "chat": "messages",
    "skip": "drop",
    "rougel": "rouge",
    "f1": "labels",
    "classification": "SEQ_CLS",
    "dpo": "preference",
    "ranking": "preference",
}
"""Our values, by what other tools call them, in lower case."""

_FULL_TRAINING = ("full", "full_finetune", "fft", "freeze", "sft")
"""What other tools call training all weights."""


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read the job of a job file, apply `a.b=value` overrides, and resolve its local paths against its folder.

    Raises SpecError with every problem found, each with its line; also for a file of several jobs.
    """
    return _spec_of(read_yaml(path), path, overrides)


def load_specs(path: Path, overrides: Sequence[str] = ()) -> list[JobSpec]:
    """Read a file of one or more jobs, separated by ---, each as load_spec. The overrides apply to all of them."""
    specs, problems = [], []
    for document in read_documents(path):
        try:
            specs.append(_spec_of(document, path, overrides))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return specs


def spec_of(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> JobSpec:
    """A job given as a mapping with a job file's keys; local paths are relative to this process's folder.

    Raises SpecError.
    """
    return _spec_of((copy.deepcopy(dict(tree)), {}), Path("job"), overrides)


def _spec_of(document: Document, path: Path, overrides: Sequence[str]) -> JobSpec:
    tree, lines = document
    for override in overrides:
        _apply_override(tree, override, overrides)
    _read_all_fields(tree)
    try:
        spec = JobSpec.model_validate(tree, context=AS_WRITTEN)
    except ValidationError as error:
        raise _refusal(error, str(path), lines, overrides) from None
    spec = _resolve_paths(_resolve_defaults(spec), path.absolute().parent)
    if spec.revision is not None and Path(spec.base_model).is_absolute():
        what = "is for a base_model on the hub; a folder has none"
        raise SpecError([_problem(("revision",), what, None, str(path), lines, overrides)])
    return spec


def _read_all_fields(tree: dict[str, Any]) -> None:
    """What a person writes means all fields of a row. A stored spec without the key means the other value."""
    if isinstance(dataset := tree.get("dataset"), dict):
        tree["dataset"] = {"fields": RowFields.ALL.value, **dataset}


def amended_spec(tree: dict[str, Any], overrides: Sequence[str], name: str, folder: Path) -> JobSpec:
    """A stored spec with overrides that are checked as a job file's are; paths in them are relative to `folder`.

    Raises SpecError, which calls the spec `name`.
    """
    stored = override_spec(tree, (), name)
    whole = stored.model_dump(mode="json")
    changed = stored.model_dump(mode="json", exclude_defaults=True)  # only what was asked for can contradict it
    for section, keys in stored.kind.defaults({}).items():  # other kinds' defaults may have been asked for
        if isinstance(keys, dict):
            changed[section] = {key: whole[section][key] for key in keys} | changed.get(section, {})
    if isinstance(stored.lora.init_from, AncestorJob) and is_set_by(overrides, "lora.init_from"):
        changed.pop("after", None)  # it names that sweep's members, for the sake of the best of them
        changed.pop("after_any", None)
    for override in overrides:
        _apply_override(changed, override, overrides)
    if is_set_by(overrides, "dataset.fields"):
        _read_all_fields(changed)  # the section was written anew, as in a job file
    try:
        spec = JobSpec.model_validate(changed, context=AS_WRITTEN)
    except ValidationError as error:
        raise _refusal(error, name, {}, overrides) from None
    known = {stored.base_model, *stored.data_sets().values()}  # as they were found when it was submitted
    return _resolve_paths(_resolve_defaults(spec), folder, known)


def is_set_by(overrides: Sequence[str], key: str) -> bool:
    """Whether one of the `KEY=VALUE` overrides sets this key, a key within it, or a section that holds it."""
    names = [override.partition("=")[0] for override in overrides]
    return any(f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in names)


def override_spec(tree: dict[str, Any], overrides: Sequence[str], name: str) -> JobSpec:
    """A stored spec with `a.b=value` overrides. Raises SpecError, which calls it `name`."""
    changed = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(changed, override, overrides)
    try:
        return JobSpec.model_validate(changed)
    except ValidationError as error:
        raise _refusal(error, name, {}, overrides) from None


def _resolve_defaults(spec: JobSpec) -> JobSpec:
    """A default that another key overrules becomes null, so that the resolved job says what will be done."""
    dataset, training, evaluation = spec.dataset, spec.training, spec.evaluation
    if dataset.eval_path:
        dataset = dataset.model_copy(update={"test_size": None})
    if training.max_steps:
        training = training.model_copy(update={"num_train_epochs": None})
    if evaluation.samples == 0:
        measured = [m for m in evaluation.metrics if m not in GENERATED]
        evaluation = evaluation.model_copy(update={"metrics": measured})
    return spec.model_copy(update={"dataset": dataset, "training": training, "evaluation": evaluation})


_RIVALS = {
    "training.max_steps": "training.num_train_epochs",
    "training.num_train_epochs": "training.max_steps",
    "dataset.eval_path": "dataset.test_size",
    "dataset.test_size": "dataset.eval_path",
    "dataset.final_path": "dataset.final_size",
    "dataset.final_size": "dataset.final_path",
}
"""Keys that say the same thing in two ways: an override of one takes the place of the other."""


def _apply_override(tree: dict[str, Any], override: str, overrides: Sequence[str]) -> None:
    key, equals, text = override.partition("=")
    problem = SpecProblem(
        file="--set",
        line=None,
        key=override,
        what="is not of the form key=value",
        hint="like --set training.max_steps=20, without spaces",
    )
    if not equals or not key:
        raise SpecError([problem])
    try:
        _, value = load_yaml(text)
    except MarkedYAMLError as error:
        wrong = replace(problem, key=key, what=f"is not valid YAML: {error.problem}", hint=slip_in(error))
        raise SpecError([wrong]) from None
    except YAMLError:
        raise SpecError([problem]) from None
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        inner = place.get(section)
        if not isinstance(inner, dict):
            inner = place[section] = {}
        place = inner
    place[last] = value
    if key == "after" and not value and not is_set_by(overrides, "after_any"):
        place.pop("after_any", None)  # it says which end of those jobs will do
    if (rival := _RIVALS.get(key)) and value is not None and not is_set_by(overrides, rival):
        place.pop(rival.rpartition(".")[2], None)  # the override wins over what the file says


def _refusal(
    error: ValidationError, file: str, lines: dict[tuple[str, ...], int], overrides: Sequence[str]
) -> SpecError:
    """All that pydantic refuses. A key of two possible kinds fails for each: the last, more general failure counts."""
    told = [problem for each in error.errors() for problem in _problems(each, file, lines, overrides)]
    return SpecError(list({(problem.file, problem.key): problem for problem in told}.values()))


def _problems(error: Any, file: str, lines: dict[tuple[str, ...], int], overrides: Sequence[str]) -> list[SpecProblem]:
    """One pydantic error as problems with the file's line and a hint; all contradictions of keys are one error."""
    path = tuple(
        str(part) for part in error["loc"] if not str(part).startswith(("literal[", "list[", "function-", "[key]"))
    )
    if not path and error["type"] == "value_error":
        pairs = [text.split(": ", 1) for text in str(error["ctx"]["error"]).splitlines()]
        return [_problem(tuple(key.split(".")), what, None, file, lines, overrides) for key, what in pairs]
    return [_problem(path, *_explain(error, ".".join(path)), file, lines, overrides)]


def _problem(
    path: tuple[str, ...], what: str, hint: str | None, file: str, lines: dict[tuple[str, ...], int],
    overrides: Sequence[str],
) -> SpecProblem:  # fmt: skip
    key = ".".join(path)
    overridden = {o.split("=")[0] for o in overrides}
    if any(f"{key}.".startswith(f"{o}.") for o in overridden) or (
        path not in lines and any(o.startswith(f"{key}.") for o in overridden)
    ):
        return SpecProblem(file="--set", line=None, key=key, what=what, hint=hint)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return SpecProblem(file=file, line=line, key=key, what=what, hint=hint)


_LIMITS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}
_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "model_type": "a mapping of keys",
    "dict_type": "a mapping",
}
"""What a value should be, in words, by pydantic's kind of error."""


def _explain(error: Any, key: str) -> tuple[str, str | None]:
    kind, context = error["type"], error.get("ctx", {})
    given = error.get("input")
    shown = json.dumps(given, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind == "extra_forbidden":
        return "unknown key", _did_you_mean(key)
    if kind == "missing":
        return "is missing", f"add a line {key.split('.')[-1]}: ..."
    if kind in ("enum", "literal_error"):
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        if ".columns." in key:
            return (
                f"{shown} is not one of {allowed}",
                "loractl's name comes first, then the data's, like {prompt: question}",
            )
        if key.split(".")[0] == "method" and str(given).lower() in _FULL_TRAINING:
            return f"{shown} is not one of {allowed}", "loractl trains only adapters, never all weights: lora or qlora"
        return f"{shown} is not one of {allowed}", _value_meant(str(given), allowed.split(", "))
    if kind == "split":
        return f"{shown} {context['what']}", context["hint"]
    if kind == "value_error":
        sentence = str(context["error"])
        return (f"{shown} {sentence}" if sentence.startswith(("is ", "holds ")) else sentence), None
    if kind == "string_pattern_mismatch":
        return f"{shown} is not a name: letters, digits, '.', '_' and '-' only, at most 63", None
    if kind in _LIMITS:
        return f"{shown} must be {_LIMITS[kind]} {next(iter(context.values()))}", None
    if wanted := _WANTED.get(kind):
        if kind == "list_type" and isinstance(given, str):
            return f"{shown} is not {wanted}", f"write [{given}]"
        if given is None and kind == "model_type":
            return "is empty", "indent its keys below it, or leave it out"
        if kind == "dict_type":
            return f"{shown} is not {wanted}", "write {key: value}"
        if kind == "string_type" and isinstance(given, list) and key == "dataset.path":
            return f"{shown} is not {wanted}", "name one file here; dataset.more takes the others"
        whole = kind == "int_parsing"
        if (whole or kind == "float_parsing") and (number := _number_meant(str(given), whole=whole)):
            return f"{shown} is not {wanted}", f"write {number}"
        wanted += "; write it like [q_proj, v_proj]" if kind == "list_type" and key.endswith("target_modules") else ""
        quoted = "; write it in quotes" if wanted == "text" and isinstance(given, (int, float, bool, dt.date)) else ""
        whole = f"write {{path: {given}}}" if key == "dataset" and isinstance(given, str) else None
        return f"{shown} is not {wanted}{quoted}", whole
    return f"{shown}: {error['msg'][0].lower()}{error['msg'][1:]}", None


def _number_meant(given: str, *, whole: bool) -> str | None:
    """What a number with a decimal comma or in percent means, or one with an exponent where a whole one is asked for;
    None for 1,000, which may be either."""
    if re.fullmatch(r"0,\d+|\d+,\d{1,2}", given) and not whole:
        return given.replace(",", ".")
    if re.fullmatch(r"\d{1,2}%", given) and not whole:
        return f"{int(given[:-1]) / 100:g}"
    if whole and re.fullmatch(r"[1-9]\d?[eE]\d", given):
        return str(int(float(given)))
    return None


def _value_meant(given: str, allowed: Sequence[str]) -> str | None:
    """What another tool's name means, else the first name that begins with it (adamw: adamw_torch), else the likest."""
    written = given.lower()
    names = {value.lower(): value for value in allowed}
    begun = [name for name in names if name == written or name.startswith(f"{written}_")]
    close = begun or difflib.get_close_matches(written, names, n=1)
    known = _VALUES_KNOWN_AS.get(written)
    meant = known if known in allowed else names[close[0]] if close else None
    return f"did you mean {meant}?" if meant else None


def _did_you_mean(key: str) -> str | None:
    *section, last = key.split(".")
    near = ".".join(part for part in section if not part.isdigit())
    keys = [*spec_keys(), *(f"dataset.more.{name}" for name in SourceSpec.model_fields)]
    keys += [f"evaluation.metrics.{name}" for name in OwnMetric.model_fields]
    keys += sorted({k.split(".")[0] for k in spec_keys() if "." in k})
    if last in _NOT_HERE:
        return _NOT_HERE[last]
    if (known := _KNOWN_AS.get(last)) and known != key:
        return f"did you mean {known}?"
    siblings = [k for k in keys if k.rpartition(".")[0] == near]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == last and k != key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    for some in (siblings, [] if section else keys):
        names = {k.rpartition(".")[2]: k for k in some}
        if close := slip_of(last, names):
            return f"did you mean {'.'.join([*section, close]) if section else names[close]}?"
    return f"known keys here: {', '.join(k.rpartition('.')[2] for k in siblings)}" if siblings else None


def _resolve_paths(spec: JobSpec, folder: Path, known: Container[str] = ()) -> JobSpec:
    """Local paths become absolute; a name without a file next to the job file stays as it is (a hub id)."""

    def local(text: str) -> str:
        if text in known or "://" in text:
            return text
        looks_local = text.startswith((".", "/", "~")) or Path(text).suffix.lower() in DATA_SUFFIXES
        try:
            path = (folder / Path(text).expanduser()).resolve()
            return str(path) if looks_local or path.exists() else text
        except (OSError, ValueError, RuntimeError):
            # not a path of this system: the name is too long, or ~name is not a user
            return text

    data = {key: local(from_address(text, "datasets/")) for key, text in spec.data_sets().items()}
    placed = spec.with_data_sets(data)
    return placed.model_copy(update={"base_model": local(from_address(spec.base_model))})
