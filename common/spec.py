"""The job file: its keys, their types and limits, and how a file becomes a JobSpec or a list of problems.

Keys are the libraries' own names (peft's LoraConfig, transformers' TrainingArguments), so that nothing is translated.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import SpecError, SpecProblem
from .method import Method as Method
from .units import parse_duration, parse_size

MAX_FILE_BYTES = 256 * 1024
"""A job file is settings, not data."""

MAX_NODES = 20_000
"""Keys and values of a job file once YAML's aliases are written out: nested aliases double with every line."""


AS_WRITTEN = "as written"
"""Validation context of a person's file: keys that contradict each other are refused. A stored spec has every key."""


class DataFormat(enum.StrEnum):
    """The shape of a data set's rows."""

    AUTO = "auto"
    MESSAGES = "messages"  # {"messages": [{"role": ..., "content": ...}, ...]}
    ALPACA = "alpaca"  # {"instruction": ..., "input": ..., "output": ...}
    PROMPT_COMPLETION = "prompt_completion"  # {"prompt": ..., "completion": ...}
    TEXT = "text"  # {"text": ...}


class Overflow(enum.StrEnum):
    """What happens to a row that is longer than max_length."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class BadRow(enum.StrEnum):
    """What happens to a row that can't be learned from: an empty answer, a wrong role, a missing column."""

    ERROR = "error"
    DROP = "drop"


class Metric(enum.StrEnum):
    """What the report measures on held-out rows, for the base and the tuned model."""

    LOSS = "loss"
    PERPLEXITY = "perplexity"
    ROUGE = "rouge"
    EXACT_MATCH = "exact_match"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


Printable = Annotated[str, AfterValidator(_printable)]
Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DatasetSpec(_Section):
    """The rows to train on and the rows held out."""

    path: Printable = Field(min_length=1)
    """A file (jsonl, json, csv, parquet; relative to the job file) or a hub id (its split train)."""
    format: DataFormat = DataFormat.AUTO
    """The rows' shape; auto looks at the columns and says why."""
    eval_path: Printable | None = None
    """A file or hub id (its split test) with the held-out rows; without it test_size rows are split off."""
    test_size: float | None = Field(0.1, gt=0, lt=1)
    """Share of rows held out before training."""
    max_length: int = Field(1024, ge=8)
    """Longest row in tokens."""
    on_overflow: Overflow = Overflow.TRUNCATE
    """What happens to longer rows; they are always counted."""
    on_bad_row: BadRow = BadRow.ERROR
    """What happens to a row that can't be learned from; dropped rows are counted in the report."""


class LoraSpec(_Section):
    """The adapter: W + (lora_alpha / r) B A (LoRA, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=1024)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("is empty; write all-linear or name at least one module")
        return value


class TrainingSpec(_Section):
    """The optimisation; names and meaning are those of transformers.TrainingArguments."""

    num_train_epochs: float | None = Field(3, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides num_train_epochs."""
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    per_device_train_batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(4, ge=1)
    gradient_checkpointing: bool | None = None
    """null: on a GPU yes, on a CPU no (it costs 1.5 to 2 times the time there)."""
    warmup_steps: float = Field(0.03, ge=0)
    """A number of steps, or below 1 a share of all steps."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "cosine"
    weight_decay: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd", "adafactor"] = (
        "auto"
    )
    """auto: paged 8-bit AdamW for QLoRA on a GPU, AdamW of torch elsewhere."""
    logging_steps: int = Field(5, ge=1)
    save_steps: int = Field(50, ge=1)
    """A checkpoint every so many steps."""
    eval_steps: int | None = Field(None, ge=1)
    """Held-out loss every so many steps; null: only before and after."""
    seed: int = Field(0, ge=0, lt=2**32)


class EvaluationSpec(_Section):
    """What the report measures on the held-out rows."""

    metrics: list[Metric] = Field(default_factory=lambda: list(Metric), min_length=1)
    samples: int = Field(16, ge=0, le=10_000)
    """Held-out rows to generate answers for, base and tuned side by side; 0: none."""
    max_new_tokens: int = Field(128, ge=1, le=8192)
    max_rows: int | None = Field(None, ge=1)
    """At most so many held-out rows are scored; null: all."""
    per_device_eval_batch_size: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _generation_needs_samples(self, info: ValidationInfo) -> EvaluationSpec:
        generated = {Metric.ROUGE, Metric.EXACT_MATCH} & set(self.metrics)
        if info.context == AS_WRITTEN and self.samples == 0 and generated and "metrics" in self.model_fields_set:
            names = ", ".join(sorted(generated))
            raise ValueError(f"samples is 0, so {names} can't be measured; set samples or drop them from metrics")
        return self


class ResourcesSpec(_Section):
    """Limits on what the job may take."""

    max_vram: Size | None = None
    """At most this much device memory, like 20GiB: auto then prefers QLoRA where LoRA would need more."""
    time_limit: Duration | None = None
    """At most this long, like 2h, for an attempt."""


class JobSpec(_Section):
    """One fine-tune, complete and checked."""

    name: Name
    base_model: Printable = Field(min_length=1)
    """A hub id, or a folder (relative to the job file) with safetensors or one GGUF file."""
    method: Method = Method.AUTO
    dataset: DatasetSpec
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourcesSpec = ResourcesSpec()
    max_retries: int = Field(2, ge=0, le=100)
    priority: int = Field(0, ge=-1000, le=1000)
    labels: dict[Annotated[Printable, Field(max_length=64)], Annotated[Printable, Field(max_length=256)]] = Field(
        default_factory=dict, max_length=32
    )

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> JobSpec:
        if info.context != AS_WRITTEN:
            return self
        wrong = []  # "key: sentence", so that _problems can name the line
        if self.dataset.eval_path and _is_set(self.dataset, "test_size"):
            wrong.append("dataset.test_size: dataset.eval_path says what is held out already; keep one of them")
        if self.training.max_steps is None and self.training.num_train_epochs is None:
            wrong.append("training.num_train_epochs: is null, and so is training.max_steps; one must say when to stop")
        if self.dataset.eval_path is None and self.dataset.test_size is None:
            wrong.append("dataset.test_size: is null, and there is no dataset.eval_path; one must say what is held out")
        if self.training.max_steps and _is_set(self.training, "num_train_epochs"):
            wrong.append("training.num_train_epochs: training.max_steps says when to stop already; keep one of them")
        if self.training.optim.startswith("paged") and self.method is Method.LORA:
            wrong.append("training.optim: paged optimizers are for method qlora or auto; use adamw_torch or adamw_8bit")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def spec_hash(self) -> str:
        """sha256 over what decides the training's result: everything but name, labels, priority, limits, retries."""
        deciding = self.model_dump(mode="json", exclude={"name", "labels", "priority", "resources", "max_retries"})
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


_KNOWN_AS = {
    "model": "base_model",
    "model_name_or_path": "base_model",
    "base": "base_model",
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
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
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
    "max_tokens": "evaluation.max_new_tokens",
    "tags": "labels",
}
"""What other tools call our keys, for "did you mean"."""


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job file, apply `a.b=value` overrides, and resolve its local paths against its folder.

    Raises SpecError with every problem found, each with its line.
    """
    tree, lines = _parse_yaml(path)
    for override in overrides:
        _apply_override(tree, override, overrides)
    try:
        spec = JobSpec.model_validate(tree, context=AS_WRITTEN)
    except ValidationError as error:
        found = [p for e in error.errors() for p in _problems(e, str(path), lines, overrides)]
        # a key that may be of two kinds fails as each of them: the last, more general one is told
        raise SpecError(list({(p.file, p.key): p for p in found}.values())) from None
    return _resolve_paths(_resolve_defaults(spec), path.absolute().parent)


def spec_keys() -> list[str]:
    """Every key of the job file as a dotted path, sections left out."""
    return [key for key in _all_keys(JobSpec) if not key.endswith(".")]


def _is_set(section: BaseModel, key: str) -> bool:
    return key in section.model_fields_set and getattr(section, key) is not None


def _resolve_defaults(spec: JobSpec) -> JobSpec:
    """A default that another key overrules becomes null, so that the resolved job says what will be done."""
    dataset, training, evaluation = spec.dataset, spec.training, spec.evaluation
    if dataset.eval_path:
        dataset = dataset.model_copy(update={"test_size": None})
    if training.max_steps:
        training = training.model_copy(update={"num_train_epochs": None})
    if evaluation.samples == 0:
        measured = [m for m in evaluation.metrics if m not in (Metric.ROUGE, Metric.EXACT_MATCH)]
        evaluation = evaluation.model_copy(update={"metrics": measured})
    return spec.model_copy(update={"dataset": dataset, "training": training, "evaluation": evaluation})


def _parse_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in the file, and the line (from 1) of each key path."""
    file = str(path)

    def wrong(what: str, hint: str | None = None, line: int | None = None) -> SpecError:
        return SpecError([SpecProblem(file=file, line=line, key="", what=what, hint=hint)])

    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise wrong(
            "no such file", "loractl submit takes the path of a job file, like examples/helpdesk-lora.yaml"
        ) from None
    except IsADirectoryError:
        raise wrong("is a folder, not a job file") from None
    except UnicodeDecodeError:
        raise wrong("is not UTF-8 text") from None
    except OSError as error:
        raise wrong(f"can't be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise wrong(
            f"has {len(raw)} bytes, a job file at most {MAX_FILE_BYTES}",
            "the data belong into a file of their own: dataset.path",
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _expanded(node, {}) > MAX_NODES:
            raise wrong(f"has more than {MAX_NODES} keys and values, its aliases written out")
        lines = dict(_lines(node, ()))
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise wrong(f"is not valid YAML: {what}", line=mark.line + 1 if mark else None) from None
    if not isinstance(tree, dict):
        raise wrong("is empty or not a mapping of keys", "start from examples/helpdesk-lora.yaml")
    return tree, lines


def _expanded(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Nodes below `node` with every alias written out; a few lines of nested aliases make billions."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        parts = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_expanded(part, sizes) for part in parts)
    return sizes[id(node)]


def _lines(node: yaml.Node | None, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    found: list[tuple[tuple[str, ...], int]] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in seen:
                raise yaml.MarkedYAMLError(problem=f"key {'.'.join(here)} stands twice", problem_mark=key.start_mark)
            seen.add(here)
            found.append((here, key.start_mark.line + 1))
            found += _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            found.append(((*path, str(index)), item.start_mark.line + 1))
    return found


_RIVALS = {
    "training.max_steps": "training.num_train_epochs",
    "training.num_train_epochs": "training.max_steps",
    "dataset.eval_path": "dataset.test_size",
    "dataset.test_size": "dataset.eval_path",
}
"""Keys that say the same thing in two ways: an override of one takes the place of the other."""


def _apply_override(tree: dict[str, Any], override: str, overrides: Sequence[str]) -> None:
    key, equals, text = override.partition("=")
    problem = SpecProblem(
        file="--set",
        line=None,
        key=override,
        what="is not of the form key=value",
        hint="like --set training.max_steps=20",
    )
    if not equals or not key:
        raise SpecError([problem])
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError([problem]) from None
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        inner = place.get(section)
        if not isinstance(inner, dict):
            inner = place[section] = {}
        place = inner
    place[last] = value
    if (rival := _RIVALS.get(key)) and value is not None and not any(o.startswith(f"{rival}=") for o in overrides):
        place.pop(rival.rpartition(".")[2], None)  # the override wins over what the file says


def _problems(error: Any, file: str, lines: dict[tuple[str, ...], int], overrides: Sequence[str]) -> list[SpecProblem]:
    """One pydantic error as problems with the file's line and a hint; all contradictions of keys are one error."""
    path = tuple(str(part) for part in error["loc"] if not str(part).startswith(("literal[", "list[", "function-")))
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
    if key in overridden or (path not in lines and any(o.startswith(f"{key}.") for o in overridden)):
        return SpecProblem(file="--set", line=None, key=key, what=what, hint=hint)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return SpecProblem(file=file, line=line, key=key, what=what, hint=hint)


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
        close = difflib.get_close_matches(str(given), allowed.split(", "), n=1)
        return f"{shown} is not one of {allowed}", f"did you mean {close[0]}?" if close else None
    if kind == "value_error":
        sentence = str(context["error"])
        return (f"{shown} {sentence}" if sentence.startswith(("is ", "holds ")) else sentence), None
    if kind == "string_pattern_mismatch":
        return f"{shown} is not a name: letters, digits, '.', '_' and '-' only, at most 63", None
    if kind.startswith(("greater_than", "less_than")):
        limit = {
            "greater_than": "above",
            "greater_than_equal": "at least",
            "less_than": "below",
            "less_than_equal": "at most",
        }
        bound = next(iter(context.values()))
        return f"{shown} must be {limit[kind]} {bound}", None
    wanted = {
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "list_type": "a list; write it like [q_proj, v_proj]" if key.endswith("target_modules") else "a list",
        "model_type": "a mapping of keys",
        "dict_type": "a mapping",
    }.get(kind)
    if wanted:
        quoted = "; write it in quotes" if wanted == "text" and isinstance(given, (int, float, bool)) else ""
        return f"{shown} is not {wanted}{quoted}", None
    return f"{shown}: {error['msg'][0].lower()}{error['msg'][1:]}", None


def _did_you_mean(key: str) -> str | None:
    *section, last = key.split(".")
    near = ".".join(section)
    keys = spec_keys() + sorted({k.split(".")[0] for k in spec_keys() if "." in k})
    if (known := _KNOWN_AS.get(last)) and known != key:
        return f"did you mean {known}?"
    siblings = [k for k in keys if k.rpartition(".")[0] == near]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == last and k != key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    candidates = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.6)
    if candidates:
        return f"did you mean {'.'.join([*section, candidates[0]])}?"
    return f"known keys here: {', '.join(k.rpartition('.')[2] for k in siblings)}" if siblings else None


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        inner = next((t for t in (kind, *get_args(kind)) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        keys += _all_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def _resolve_paths(spec: JobSpec, folder: Path) -> JobSpec:
    """Local paths become absolute; what does not exist beside the job file stays as it is (a hub id)."""

    def local(text: str | None) -> str | None:
        if text is None:
            return None
        looks_local = text.startswith((".", "/", "~")) or Path(text).suffix.lower() in DATA_SUFFIXES
        try:
            path = (folder / Path(text).expanduser()).resolve()
            return str(path) if looks_local or path.exists() else text
        except (OSError, ValueError, RuntimeError):
            # no path that this system can hold: a name too long, the home of nobody
            return text

    dataset = spec.dataset.model_copy(
        update={"path": local(spec.dataset.path), "eval_path": local(spec.dataset.eval_path)}
    )
    return spec.model_copy(update={"base_model": local(spec.base_model), "dataset": dataset})


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Endings of the data files that loractl reads."""
