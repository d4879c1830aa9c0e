"""What a base model is: the files that it is loaded from, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .artifacts import is_file_name, sha256_of

SUFFIXES = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"})
"""Endings of the files that decide a model's weights, shape, tokens and chat template."""

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "*.tiktoken", "tokenization_*.py",
)  # fmt: skip
"""Files from which transformers makes a tokenizer: a folder with weights has one of them."""

MERGED = "merge.json"
"""What `adapters merge` writes next to a model: the base and the adapter that it was made of."""

Fingerprint = dict[str, str]
"""File name -> sha256 of its content."""


def fingerprint(folder: Path, cache: Path) -> Fingerprint:
    """Hash a model's files, directly in `folder`. Raises OSError.

    Hashes are remembered below `cache`, where that can be written. A file is hashed again when it has changed.
    """
    note = cache / "bases" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.json"
    known, hashes = _read(note), dict[str, list[Any]]()
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            facts = path.stat()
            # a copy of another model's weights may keep size and date; it can't choose the time of the inode's change
            seen = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
            *before, hashed = known.get(path.name, [""])
            hashes[path.name] = [*seen, hashed if before == seen else sha256_of(path)]
    if hashes != known:
        with contextlib.suppress(OSError):  # a full disk: they are hashed again
            _write(note, hashes)
    return {name: hashed for name, (*_, hashed) in hashes.items()}


def _read(note: Path) -> dict[str, list[Any]]:
    """The remembered hashes; none where a power loss has damaged the file."""
    try:
        known = json.loads(note.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(facts, list) and facts for facts in known.values())
    return known if whole else {}


def _write(note: Path, hashes: dict[str, list[Any]]) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    # a unique name: several trainers, or several jobs of one trainer, may hash the same base at once
    aside = note.with_suffix(f".part-{secrets.token_hex(8)}")
    try:
        aside.write_text(json.dumps(hashes), "utf-8")
        aside.replace(note)
    finally:
        aside.unlink(missing_ok=True)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return any(any(folder.glob(name)) for name in TOKENIZERS)


def unfit_template(names: Iterable[str]) -> str | None:
    """What is wrong with the first template name that can't be a file name, in words; None if all can.

    transformers saves each chat template next to the adapter, in a file of that name.
    """
    wrong = next((name for name in names if not is_file_name(f"{name}.jinja")), None)
    return None if wrong is None else f"has a chat template of the name {wrong!r}, which no stored file can have"


def may_be_published(base_model: str) -> bool:
    """Whether an adapter for this base may be: not for a folder with a merged adapter that may not be published."""
    if not Path(base_model).is_absolute():
        return True  # a hub id
    try:
        about = json.loads(Path(base_model, MERGED).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # not merged by loractl
    return not (isinstance(about, dict) and about.get("publish") is False)


def digest(files: Fingerprint) -> str:
    """One sha256 for all files of a model."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def changed_files(then: Fingerprint, now: Fingerprint) -> list[str]:
    """Files that differ; of files that only one side has, the weights.

    A box's hub cache has only the files that somebody asked for there.
    """
    weights = {name for name in then.keys() ^ now.keys() if Path(name).suffix in (".safetensors", ".gguf")}
    return sorted(weights | {name for name in then.keys() & now.keys() if then[name] != now[name]})
