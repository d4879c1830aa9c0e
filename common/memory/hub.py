"""The hub as this machine knows it: where its models are, and whether to ask it, by the rules of its own library."""

from __future__ import annotations

import os
from pathlib import Path

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
