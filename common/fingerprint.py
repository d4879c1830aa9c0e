"""What a base model is: the files that it is loaded from, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .artifacts import sha256_of

SUFFIXES = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"})
"""Endings of the files that decide a model's weights, shape, tokens and chat template."""

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "*.tiktoken", "tokenization_*.py",
)  # fmt: skip
"""Files of which transformers makes a tokenizer: a folder with weights has one of them."""

Fingerprint = dict[str, str]
"""File name -> sha256 of its content."""


def fingerprint(folder: Path, cache: Path) -> Fingerprint:
    """Hash a model's files, directly in `folder`. Raises OSError.

    Hashes are remembered below `cache`. A file is hashed again when it has changed.
    """
    note = cache / "bases" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.json"
    known: dict[str, list[Any]] = json.loads(note.read_text("utf-8")) if note.exists() else {}
    hashes: dict[str, list[Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            facts = path.stat()
            # a copy of another model's weights may keep size and date; it can't choose the time of the inode's change
            seen = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
            *before, hashed = known.get(path.name, [""])
            hashes[path.name] = [*seen, hashed if before == seen else sha256_of(path)]
    if hashes != known:
        note.parent.mkdir(parents=True, exist_ok=True)
        aside = note.with_suffix(f".part-{os.getpid()}")  # two trainers may hash the same base at once
        aside.write_text(json.dumps(hashes), "utf-8")
        aside.replace(note)
    return {name: hashed for name, (*_, hashed) in hashes.items()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return any(any(folder.glob(name)) for name in TOKENIZERS)


def digest(files: Fingerprint) -> str:
    """One sha256 for all files of a model."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def changed_files(then: Fingerprint, now: Fingerprint) -> list[str]:
    """Files that differ; of those that only one side has, the weights.

    A box of the hub's cache has only the files that somebody asked for there.
    """
    weights = {name for name in then.keys() ^ now.keys() if Path(name).suffix in (".safetensors", ".gguf")}
    return sorted(weights | {name for name in then.keys() & now.keys() if then[name] != now[name]})
