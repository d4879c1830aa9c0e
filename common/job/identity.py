"""Digests of what decides a training's result. They show whether a stored checkpoint or result belongs to a job.

A key that the job file had from the start is hashed with its value. A key that came later is hashed only where it
differs from its default, and its default means what happened before the key existed. So a new key refuses
nothing that is stored, and a value that changes the arithmetic does, be it from the user or a changed default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from .method import Method
from .spec import JobSpec

FROM_THE_START = {
    "": ("base_model", "revision", "method"),
    "dataset": (
        "path", "format", "columns", "eval_path", "test_size", "max_length", "on_overflow", "on_bad_row",
    ),
    "lora": (
        "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora",
        "init_lora_weights",
    ),
    "training": (
        "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
        "gradient_checkpointing", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay",
        "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha",
        "packing", "train_sampling_strategy", "optim", "logging_steps", "dtype", "attn_implementation", "torch_compile",
        "save_steps", "eval_steps", "early_stopping_patience", "load_best_model_at_end", "seed",
    ),
    "evaluation": (
        "metrics", "samples", "max_new_tokens", "max_rows", "per_device_eval_batch_size", "regression", "lm_eval_limit",
    ),
}  # fmt: skip
"""Keys that are hashed even at their default, by section. Add none: what is stored was hashed without it."""

UNDECIDING = frozenset(
    {
        "name",
        "labels",
        "priority",
        "preemptible",
        "resources",
        "max_retries",
        "lora_patience",
        "after",
        "after_any",
        "notify",
        "publish",
        "training.report_to",
        "training.tracker.project",
        "training.tracker.run_name",
    }
)
"""Keys and sections that say when and where a job runs and who is notified, not what comes out."""

RECOMPUTED = frozenset({"gradient_checkpointing", "torch_compile"})
"""Keys of `training` that change how a step is computed, not what it learns: a resume may change them."""

BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
"""Keys of `training` that count for a resume by their product: the pieces in which a step is computed do not."""


def spec_digest(spec: JobSpec) -> str:
    """sha256 of what decides the result. A finished result with the same digest, method and data is taken over."""
    return _digest(_deciding(spec))


def training_digests(spec: JobSpec, method: Method, data: str) -> dict[str, str]:
    """What a checkpoint belongs to, by name. With another batch, method or data a resume would run but be wrong.

    `data`: the digest of what is read of the data in training. It shows how rows became tokens, and a classifier's
    labels, so `dataset` and `task_type` are not parts of their own.
    """
    said = _deciding(spec)
    training = {key: value for key, value in said.pop("training").items() if key not in RECOMPUTED | BATCH}
    parts = {
        "base_model": [said.pop("base_model"), said.pop("revision")],
        "lora": said.pop("lora"),
        "training": training | {"batch": spec.training.effective_batch},
        "method": method.value,
        "data": data,
    }
    told_otherwise = {"method", "dataset", "task_type", "evaluation"}
    if later := {key: value for key, value in said.items() if key not in told_otherwise}:
        parts["job"] = later
    return {name: _digest(part) for name, part in parts.items()}


def data_digest(read: Iterable[Any]) -> str:
    """sha256 of what is read of a job's data, as JSON has the list of it. It takes one item at a time, so that other
    threads run in between."""
    hashed = hashlib.sha256(b"[")
    for number, one in enumerate(read):
        hashed.update(f"{', ' if number else ''}{json.dumps(one, sort_keys=True)}".encode())
    hashed.update(b"]")
    return hashed.hexdigest()


def changed_parts(before: JobSpec, after: JobSpec, method: Method) -> set[str]:
    """The parts of the job file whose change makes a checkpoint of `before` useless for `after`: sections, or keys.

    Rows are not read here: every key that says how rows are read counts as a change of them.
    """
    old, new = (training_digests(spec, method, data_digest(())) for spec in (before, after))
    parts = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    return parts | {key for key in ("dataset", "task_type") if getattr(before, key) != getattr(after, key)}


def _deciding(section: BaseModel, name: str = "") -> dict[str, Any]:
    """The values of a section (of the whole job: "") that count, in their JSON form."""
    written = section.model_dump(mode="json")
    kept: dict[str, Any] = {}
    for key, field in type(section).model_fields.items():
        value, path = getattr(section, key), f"{name}.{key}".lstrip(".")
        if path in UNDECIDING:
            continue
        if isinstance(value, BaseModel):
            kept |= {key: inner} if (inner := _deciding(value, path)) else {}
        elif value and isinstance(value, list) and all(isinstance(one, BaseModel) for one in value):
            kept[key] = [_deciding(one, path) for one in value]
        elif key in FROM_THE_START.get(name, ()) or value != field.get_default(call_default_factory=True):
            kept[key] = written[key]
    if name == "evaluation" and "lm_eval" not in kept:
        kept.pop("lm_eval_limit", None)  # it limits nothing
    return kept


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
