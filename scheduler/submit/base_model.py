"""A job's base model, as far as this machine can see it: its config, its tokenizer, the headers of its weights."""

from __future__ import annotations

import json
from pathlib import Path

from loractl.common.adapter_config import tensor_file_fault
from loractl.common.errors import UsageError
from loractl.common.fingerprint import has_tokenizer, unfit_template


def check_base(folder: Path) -> tuple[str, ...]:
    """Refuse a folder that no worker could load. Returns its parts that are not on this machine.

    A folder may hold only the config, for the plan: then the box has the rest at the same path. Raises UsageError.
    """
    if not folder.is_dir():
        raise UsageError(f"base_model {folder} is a file", f"name the folder that holds it: {folder.parent}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and any(folder.glob("*.gguf")):
        return ()
    _check_config(folder)
    index = _shards(folder)
    if missing := sorted(index - {file.name for file in weights}) if weights else []:
        raise UsageError(
            f"base_model {folder} lacks {', '.join(missing[:3])}, which model.safetensors.index.json names",
            "copy the whole model again",
        )
    for file in weights:
        _check_weights(file)
    if wrong := unfit_template(_templates(folder)):
        raise UsageError(
            f"base_model {folder} {wrong}", "rename it in additional_chat_templates or the tokenizer's config"
        )
    readable = has_tokenizer(folder)
    if weights and not readable:
        raise UsageError(
            f"base_model {folder} has weights and no tokenizer",
            "copy tokenizer.json and tokenizer_config.json next to it",
        )
    has_config = (folder / "config.json").exists()
    here = {"config.json": has_config, "weights": bool(weights), "tokenizer": readable}
    return tuple(what for what, is_here in here.items() if not is_here)


def holds_model(folder: Path) -> bool:
    """Whether it has any part of a model, or of an adapter, which is a separate mistake."""
    parts = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.bin")
    return has_tokenizer(folder) or any(path for part in parts for path in folder.glob(part))


def _check_config(folder: Path) -> None:
    """Raises UsageError."""
    if (folder / "config.json").exists():
        _read_object(folder / "config.json")
    elif (folder / "adapter_config.json").exists():
        raise UsageError(f"base_model {folder} holds an adapter", "name the base model itself")


def _shards(folder: Path) -> set[str]:
    path = folder / "model.safetensors.index.json"
    names = _read_object(path).get("weight_map", {}) if path.exists() else {}
    return {str(name) for name in names.values()} if isinstance(names, dict) else set()


def _templates(folder: Path) -> list[str]:
    """The names of its chat templates: files, or in the older form a list in the tokenizer's config."""
    names, config = [path.stem for path in folder.glob("additional_chat_templates/*.jinja")], {}
    if (settings := folder / "tokenizer_config.json").exists():
        config = _read_object(settings)
    listed = config.get("chat_template")
    named = [entry.get("name") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return [*names, *(name for name in named if isinstance(name, str))]


def _read_object(path: Path) -> dict[str, object]:
    """Raises UsageError."""
    _check_regular(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except PermissionError as error:
        raise _not_permitted(path, error) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}", "copy the model again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object", "copy the model again")
    return value


def right_to_read(folder: Path) -> str:
    """What to do about a folder that this person may not read."""
    return f"ask its owner for the right to: chmod -R a+rX {folder}"


def _not_permitted(file: Path, error: PermissionError) -> UsageError:
    return UsageError(f"{file} can't be read: {error.strerror}", right_to_read(file.parent))


def _check_regular(file: Path) -> None:
    """Refuse a pipe, since reading it would block. A missing file is left to its reader. Raises UsageError."""
    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is not a regular file", "copy the model again")


def _check_weights(file: Path) -> None:
    """Read the header: a truncated copy is shorter than the header says. Raises UsageError."""
    _check_regular(file)
    try:
        fault = tensor_file_fault(file)
    except PermissionError as error:
        raise _not_permitted(file, error) from error
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}", "copy it again") from error
    if fault is not None:
        raise UsageError(f"{file} {fault}", "copy it again")
