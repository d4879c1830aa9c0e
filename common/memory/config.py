"""A model's config.json on this machine: in a folder, or in the hub's cache by the rules of the hub's own library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .families import shape_of
from .shape import Shape

_YES = ("1", "ON", "YES", "TRUE")


def hub_cache() -> Path:
    """Where the hub's library keeps what it has downloaded."""
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return _folder(chosen) if chosen else _home() / "hub"


def hub_is_off() -> bool:
    """Whether the environment forbids asking the hub."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in _YES


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _folder(os.environ.get("HF_HOME") or f"{cache}/huggingface")


def _folder(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def read_shape(model: str | Path, revision: str | None = None) -> Shape | None:
    """The shape of a model in a folder, or of a hub id whose config.json the local cache holds; None if unknown."""
    return shape_of(_read_config(model, revision))


def foreign_format(model: str | Path, revision: str | None = None) -> str | None:
    """How others quantised the weights of a model, like gptq; see format_of. None if no config is here."""
    return format_of(_read_config(model, revision))


def _read_config(model: str | Path, revision: str | None) -> Any:
    """A model's config.json as it is written; None without one that can be read."""
    path = find_config(model, revision)
    try:
        return None if path is None else json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def format_of(config: Any) -> str | None:
    """The format of weights that config.json names and that no adapter is trained on here; None for 16 bits and NF4."""
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return None if method in (None, "bitsandbytes") else str(method)[:40]


HOW_TO_NAME_IT = "name the model that it was made from: method: qlora brings its 16-bit weights to NF4 by itself"
"""What to do about a base in a foreign format."""


def find_config(model: str | Path, revision: str | None = None) -> Path | None:
    """config.json of a folder, or of a hub id at a revision (None: main, else the newest) in the local cache."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if folder.is_absolute() or folder.exists():
        return None
    repository = hub_cache() / f"models--{str(model).replace('/', '--')}"
    try:
        if (pinned := repository / "snapshots" / _commit_of(repository, revision or "main") / "config.json").is_file():
            return pinned
        if revision is not None:
            return None  # the cache has another revision
        configs = list(repository.glob("snapshots/*/config.json"))
        return max(configs, key=lambda path: path.stat().st_mtime, default=None)
    except (OSError, ValueError):
        return None


def _commit_of(repository: Path, revision: str) -> str:
    """What a branch or tag meant when it was last asked for; a commit is its own name."""
    ref = repository / "refs" / revision
    return ref.read_text("utf-8").strip() if ".." not in revision and ref.is_file() else revision
