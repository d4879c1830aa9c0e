"""What a job may make this box read and run: its base model's folder, its data, a model's own code.

Anyone who can write rows can write any spec into one, so the worker does not rely on a client's checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loractl.common.artifacts import names_dataset
from loractl.common.errors import LoractlError
from loractl.common.job.names import is_hub_data, is_hub_id
from loractl.common.job.spec import JobSpec
from loractl.common.settings import Settings
from loractl.common.store.records import StoredCheckpoint

_KERNEL_KEY = "attn_implementation"
"""Part of every key that names the attention in a model's config; some of these keys are internal."""


class Refused(LoractlError):
    """The job asks for something that this box's owner, or loractl itself, does not allow."""


def check_claim(spec: JobSpec, data: dict[str, Any], settings: Settings, *, marked: bool = False) -> None:
    """Raises Refused unless a job may name this base model and this data here.

    `data` says which of the spec's data sets are in the artifact store; the others must be on the hub. `marked`:
    the store was found by its mark, and may have moved since the data was stored.
    """
    check_base(spec.base_model, settings.model_roots)
    named = spec.data_sets()
    for key in sorted(named.keys() | data.keys()):
        entry, section = data.get(key), "evaluation" if key == "regression" else "dataset"
        if entry is None:
            # a path, even of something that exists here, is neither stored nor on the hub
            name = named[key]
            what = f"{section}.{key} {name}"
            if not is_hub_data(name):
                raise Refused(f"{what} is not in the artifact store, and no hub id of the form owner/name")
            if Path(name).exists():
                raise Refused(f"{what} is a file or folder in this worker's folder, not a hub id")
        elif not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("uri", "sha256")):
            raise Refused(f"the row says of {section}.{key} no address and hash of a stored data set")
        elif not names_dataset(None if marked else settings.artifacts_url, entry["uri"], entry["sha256"]):
            # no failure of the store: such rows must not make it look broken, and so close cards
            raise Refused(f"{section}.{key}: {entry['uri']!r} is not a data set of this store")


def check_checkpoint(job_id: int, checkpoint: StoredCheckpoint) -> None:
    """Raises Refused for a checkpoint that this job can't have stored, since its name becomes a folder here."""
    made = re.fullmatch(rf"jobs/{job_id}/checkpoints/[1-9]\d{{0,8}}-(\d{{1,12}})", str(checkpoint.prefix), re.ASCII)
    if not isinstance(checkpoint.step, int) or made is None or made[1] != str(checkpoint.step):
        raise Refused("the row names a checkpoint of another job")


def may_run_code(spec: JobSpec, settings: Settings) -> bool:
    """Whether this box's owner trusts the code of this exact model at this exact commit."""
    return is_hub_id(spec.base_model) and f"{spec.base_model}@{spec.revision}" in settings.trusted_code


def check_model_settings(base_model: str, *settings: Any) -> None:
    """Raises Refused if a model's own JSON would make transformers read a file outside the model, or fetch an attention
    kernel, which is code, from the hub.

    A tokenizer whose `vocab` is a path takes that file as its vocabulary, which is stored with the adapter.
    """
    for key, text in _strings(settings, ""):
        if _KERNEL_KEY in key and "/" in text:
            raise Refused(f"base_model {base_model} asks for a kernel from the hub: {key} is {text!r}")
        if key != "chat_template" and _is_file(text) and not _lies_in(Path(text), Path(base_model)):
            raise Refused(f"base_model {base_model} names a file of this box that is not its own: {key} is {text!r}")


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in JSON values, with the nearest meaningful key above it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            # {"attn_implementation": {"": ..., "text_config": ...}}: values below it are of its kind
            yield from _strings(inner, key if _KERNEL_KEY in key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner, key)


def _is_file(text: str) -> bool:
    try:
        return Path(text).exists() and not Path(text).is_dir()
    except (OSError, ValueError):
        return False  # too long for a path, or with a zero byte


def _lies_in(path: Path, folder: Path) -> bool:
    return folder.is_absolute() and path.resolve().is_relative_to(folder.resolve())


def check_base(base_model: str, roots: tuple[Path, ...]) -> None:
    folder = Path(base_model)
    if not folder.is_absolute():
        if not is_hub_id(base_model):
            raise Refused(f"base_model {base_model} is neither an absolute path nor a hub id")
        if folder.exists():
            raise Refused(f"base_model {base_model} is a file or folder in this worker's folder, not a hub id")
        return
    if ".." in folder.parts:
        raise Refused(f"base_model {base_model} is not a plain path")
    if roots:
        _check_inside(folder, [root.resolve() for root in roots])


def _check_inside(folder: Path, roots: list[Path]) -> None:
    """Whether the folder and all that can be loaded from it, following links, are below one of the roots."""
    where = f"outside of what this worker allows (LORACTL_MODEL_ROOTS: {', '.join(map(str, roots))})"
    try:
        targets = {path: path.resolve() for path in (folder, *sorted(folder.rglob("*")))}
    except (OSError, RuntimeError) as error:  # a name too long; circular links, before Python 3.13
        raise Refused(f"base_model {folder} can't be followed: {error}") from error
    for path, target in targets.items():
        if not any(target.is_relative_to(root) for root in roots):
            leads = "" if path == folder else f": {path.relative_to(folder)} leads there"
            raise Refused(f"base_model {folder} is {where}{leads}")
    for index in folder.glob("*.index.json"):
        for name in _shards(index):
            if Path(name).name != name:
                raise Refused(f"base_model {folder} is {where}: {index.name} names {name}")


def _shards(index: Path) -> set[str]:
    """The files that an index of weights names; transformers joins them to the folder unchanged."""
    try:
        return {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # not an index: loading it fails and says why
