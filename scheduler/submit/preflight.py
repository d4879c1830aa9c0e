"""What is checked before anything of a job is stored or queued: its base model, as far as this machine can see it
(config, tokenizer, headers of its weights). The rest, only a worker's box can know.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from loractl.common.adapter_config import tensor_file_fault
from loractl.common.errors import UsageError
from loractl.common.fingerprint import has_tokenizer, unfit_template
from loractl.common.job.names import is_hub_id
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import find_config, hub_is_off
from loractl.common.settings import Settings, checked_url, load_settings
from loractl.common.text import slip_of


def check_base(folder: Path) -> tuple[str, ...]:
    """Refuse a folder that no worker could load. Returns its parts that are not on this machine.

    A folder may hold only the config, for the plan: then the box has the rest at the same path. Raises UsageError.
    """
    if not folder.is_dir():
        raise UsageError(f"base_model {folder} is a file", f"name the folder that holds it: {folder.parent}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and any(folder.glob("*.gguf")):
        return ()
    if (folder / "config.json").exists():
        _read_object(folder / "config.json")
    elif (folder / "adapter_config.json").exists():
        raise UsageError(f"base_model {folder} holds an adapter", "name the base model itself")
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


HUB_TIMEOUT_S = 3.0
"""Seconds that a submit waits for the hub's answer about a name."""


def check_addresses() -> Settings:
    """Refuse settings and URLs that a later step would refuse. No service is asked. Raises UsageError."""
    from loractl.common.queue.valkey import broker_url

    settings = load_settings()
    broker_url(settings, start=False)
    return settings


def check_model(spec: JobSpec, settings: Settings) -> list[str]:
    """Refuse a base that no worker can load. Returns lines about what is doubtful and what is not checked here.

    Raises UsageError.
    """
    base, unchecked, doubts = Path(spec.base_model), [], []
    if base.is_absolute() and (closed := _closed(base)) is not None:
        doubts.append(_no_model(f"{base} can't be read: {closed}", right_to_read(base), settings))
    elif base.is_absolute() and not base.exists():
        doubts.append(_not_here(base, settings))
    elif base.is_absolute():
        if base.is_dir() and not holds_model(base):
            needed = "a model's folder has config.json and *.safetensors, or a *.gguf"
            doubts.append(_no_model(f"base_model {base} holds no model", needed, settings))
        elif missing := check_base(base):
            unchecked.append(f"{' and '.join(missing)} of {base}, not on this machine")
    elif not is_hub_id(spec.base_model):
        what = f"base_model {spec.base_model} is neither a folder here nor a name on the hub"
        raise UsageError(what, "name a folder, relative to the job file, or a hub id like owner/name")
    elif find_config(spec.base_model, spec.revision) is None:
        told = _ask_the_hub(f"models/{spec.base_model}")
        if told is None:
            unchecked.append(
                f"base_model {spec.base_model}: there is no folder of this name next to the job file, and the hub "
                "can't be reached"
            )
        elif not told:
            doubts.append(
                f"Warning: the hub shows no base_model {spec.base_model} to this machine: it is mistyped, or private "
                "(then the workers need HF_TOKEN)."
            )
    return [*doubts, *(f"Not checked: {what}. The worker will check it." for what in unchecked)]


def _not_here(base: Path, settings: Settings) -> str:
    """A warning: another machine may have it. An error if the workers are on this machine."""
    beside = [path.name for path in base.parent.iterdir() if path.is_dir()] if base.parent.is_dir() else []
    close = slip_of(base.name, beside)
    meant = f"did you mean {base.parent / close}?" if close else ""
    if settings.embedded_database:
        otherwise = "name an existing folder, relative to the job file, or a hub id like owner/name"
        raise UsageError(f"there is no base_model {base}", meant or otherwise)
    return f"Warning: there is no {base} on this machine; every worker needs it at that path{meant and f': {meant}'}."


def _closed(base: Path) -> str | None:
    """Why this person can't look into an existing folder; None: they can."""
    try:
        if base.is_dir():
            next(base.iterdir(), None)
    except PermissionError as error:
        return error.strerror
    return None


def _no_model(what: str, needed: str, settings: Settings) -> str:
    """As _not_here, for an existing folder that is empty, something else's, or closed."""
    if settings.embedded_database:
        raise UsageError(what, needed)
    return f"Warning: {what} on this machine; every worker needs one at that path: {needed}."


def _ask_the_hub(name: str) -> bool | None:
    """Whether the hub shows it to this machine; None if it does not answer, or must not be asked. Raises UsageError."""
    if hub_is_off():
        return None
    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    where = checked_url("HF_ENDPOINT", "endpoint_url", where).rstrip("/")
    request = urllib.request.Request(f"{where}/api/{quote(name)}", method="HEAD")  # noqa: S310  the scheme is checked
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        absent = error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND)
        return False if absent else None
    except (OSError, ValueError):
        return None
