"""An adapter's files, which others may have written: peft's adapter_config.json, checked against a list of keys and
forms, and the weights' header.

peft takes many values for regular expressions, or for code to import: a text in target_modules can keep a loader busy
for hours. Here modules go by their plain names, and nothing else reaches peft.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ArtifactError

CONFIG = "adapter_config.json"

LABELS = "labels.json"
"""A classifier's labels as a list, in the order of its head: peft has no place for them."""

LINEAGE = "lineage.json"
"""The adapter that this one was begun from: its job, name and weights."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})
"""Files allowed in an adapter's folder; a tokenizer with its own code would leave Python files there."""

MOST_BYTES = 4 * 2**20
MOST_NAMES = 20_000
"""A mixture of experts has a linear layer for each expert of each layer."""

MOST_PATTERNS = 64
MOST_LETTERS = 256

_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*", re.ASCII)
_PATTERN = re.compile(r"(?:\.\*\\\.)?[\w-]+(?:\\?\.[\w-]+)*", re.ASCII)
"""peft itself writes ".*\\.name" for experts that it has joined into one tensor."""


def is_module_name(value: object) -> bool:
    """Whether this is a module's name, or the end of its path, and nothing that peft takes for an expression."""
    return isinstance(value, str) and len(value) <= MOST_LETTERS and _NAME.fullmatch(value) is not None


def allowed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to store: without auto_mapping, which names code to import, and without keys of a later peft."""
    return {key: value for key, value in settings.items() if key in _FORMS}


def portable_name(base_model: str) -> str:
    """A base's name in files that people pass on: a hub id as it is, of a folder the last part. The folder's path means
    nothing on another box, and reveals details of this one."""
    return base_model.rstrip("/").rpartition("/")[2] if base_model.startswith("/") else base_model


def check_adapter_config(content: bytes | Path) -> None:
    """Raises ArtifactError, which names the first key that loractl would have written differently."""
    try:
        raw = content if isinstance(content, bytes) else _start_of(content)
        if len(raw) > MOST_BYTES:
            raise _refused(f"it has more than {MOST_BYTES} bytes")
        settings = json.loads(raw)
    except (OSError, ValueError, RecursionError):
        raise _refused("it can't be read as JSON") from None
    if not isinstance(settings, dict):
        raise _refused("it is not an object")
    for key, value in settings.items():
        if key not in _FORMS:
            raise _refused(f"{key[:MOST_LETTERS]!r} is a key that loractl does not store")
        form, what = _FORMS[key]
        if not form(value):
            raise _refused(f"{key} is not {what}")


def check_adapter_weights(file: Path, job_id: int) -> None:
    """Refuse weights that nothing can load, and remove their file. Raises ArtifactError."""
    fault = tensor_file_fault(file) if file.is_file() else "is not there"
    if fault is not None:
        file.unlink(missing_ok=True)
        what = f"the stored adapter of job {job_id} is refused: {file.name} {fault}"
        raise ArtifactError(what, "loractl reproduce JOB makes the adapter again")


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(MOST_BYTES + 1)


def _refused(why: str) -> ArtifactError:
    return ArtifactError(f"the adapter's {CONFIG} is refused: {why}", "loractl reproduce JOB makes the adapter again")


Form = tuple[Callable[[Any], bool], str]


def _number(least: float, most: float) -> Form:
    def form(value: Any) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 2**53
        return known and math.isfinite(value) and least <= value <= most

    return form, f"a number from {least:g} to {most:g}"


def _whole(least: int, most: int) -> Form:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"


def _one_of(*values: Any) -> Form:
    return lambda value: type(value) in (str, bool) and value in values, f"one of {', '.join(map(str, values))}"


def _text(letters: int) -> Form:
    return (
        lambda value: value is None or (isinstance(value, str) and len(value) <= letters and value.isprintable()),
        f"a text of at most {letters} letters",
    )


def _list_of(each: Callable[[Any], bool], most: int, what: str) -> Form:
    return (
        lambda value: value is None or (isinstance(value, list) and len(value) <= most and all(map(each, value))),
        f"a list of at most {most} {what}",
    )


def _by_pattern(form: Form) -> Form:
    """A value for each ending of a module's path."""

    def forms(value: Any) -> bool:
        if value is None or value == {}:
            return True
        if not isinstance(value, dict) or len(value) > MOST_PATTERNS:
            return False
        return all(len(key) <= MOST_LETTERS and _PATTERN.fullmatch(key) and form[0](one) for key, one in value.items())

    return forms, f"at most {MOST_PATTERNS} names of modules, each with {form[1]}"


_BOOLEAN = _one_of(True, False)
_NAMES = _list_of(is_module_name, MOST_NAMES, "names of modules")
_RANK = _whole(1, 2**16)
_ALPHA = _number(0, 2**53)

_FORMS: dict[str, Form] = {
    "peft_type": _one_of("LORA"),
    "task_type": _one_of("CAUSAL_LM", "SEQ_CLS"),
    "peft_version": _text(64),
    "base_model_name_or_path": _text(4096),
    "revision": _text(255),
    "inference_mode": _BOOLEAN,
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": _number(0, 1),
    "bias": _one_of("none", "all", "lora_only"),
    "fan_in_fan_out": _BOOLEAN,
    "use_rslora": _BOOLEAN,
    "use_dora": _BOOLEAN,
    "lora_bias": _BOOLEAN,
    "target_modules": _NAMES,
    "target_parameters": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _NAMES,
    "layers_pattern": _list_of(is_module_name, MOST_PATTERNS, "names of modules"),
    "layers_to_transform": _list_of(_whole(0, 2**16)[0], MOST_NAMES, "whole numbers"),
    "rank_pattern": _by_pattern(_RANK),
    "alpha_pattern": _by_pattern(_ALPHA),
}
"""The keys of peft's configuration that are stored, each with its form and the form's name."""


LARGEST_HEADER = 100_000_000
"""Bytes that safetensors allows for a header."""


def tensor_file_fault(file: Path) -> str | None:
    """Why nothing can load it, after its name: "is not a safetensors file: ..."; None where its header and size fit.

    Raises OSError.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        try:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("it does not begin as one; is it a pointer of Git LFS?")
            header = json.loads(opened.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            told = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, RecursionError, struct.error, AttributeError, KeyError, TypeError, IndexError) as error:
            return f"is not a safetensors file: {error}"
    return None if size == told else f"has {size} bytes, and {told} by its header: it was cut off"
