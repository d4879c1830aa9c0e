"""A set of tokenised rows of at most max_length tokens, kept in this box's cache.

The key of the cache is what decides the tokens: content, tokenizer, template, format, length.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.data.example import Example
from loractl.common.data.split import no_row_fits
from loractl.common.errors import DataError
from loractl.common.job.sections import DataFormat, DatasetSpec, Overflow

from .tokens import IGNORED, TokenRow, encode

_CACHE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Tokenised rows, and what became of those that were too long."""

    rows: list[TokenRow]
    truncated: int
    too_long: int  # rows over max_length that were dropped

    @property
    def tokens(self) -> int:
        return sum(len(r.input_ids) for r in self.rows)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for r in self.rows for label in r.labels)


@dataclass(frozen=True, kw_only=True)
class Tokeniser:
    """Makes the token sets of one job's data, those to train on and those held out."""

    dataset: DatasetSpec
    tokenizer: Any
    format: DataFormat
    cache: Path | None  # None: nothing is kept

    def tokenise(self, examples: Sequence[Example], file: str) -> TokenSet:
        """The examples' token set, from the cache where it is there. Raises DataError."""
        folder = self._folder(examples)
        if folder and (folder / "set.json").exists():
            raw = json.loads((folder / "set.json").read_text())
            return TokenSet(rows=[TokenRow(**row) for row in raw.pop("rows")], **raw)
        tokens = fit_examples(examples, file, self.dataset, self.tokenizer, self.format)
        if folder:
            rows = [{"number": r.number, "input_ids": r.input_ids, "labels": r.labels} for r in tokens.rows]
            _write_cache(folder, {**vars(tokens), "rows": rows})
        return tokens

    def _folder(self, examples: Sequence[Example]) -> Path | None:
        if self.cache is None:
            return None
        content = hashlib.sha256("".join(f"{e.number}:{e.content_hash()} " for e in examples).encode()).hexdigest()
        return self.cache / "tokenised" / f"{content[:32]}-{self._key[:32]}"

    @functools.cached_property
    def _key(self) -> str:
        """A key that changes with everything that changes the tokens of the same content."""
        tokenizer, dataset = self.tokenizer, self.dataset
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        parts = [
            _CACHE_VERSION,
            vocabulary,
            tokenizer.chat_template,
            tokenizer.eos_token,
            self.format.value,
            dataset.max_length,
            dataset.on_overflow.value,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fit_examples(
    examples: Sequence[Example], file: str, dataset: DatasetSpec, tokenizer: Any, format: DataFormat
) -> TokenSet:
    """Tokenise each example and apply on_overflow to those over max_length."""
    rows, truncated, too_long = [], 0, 0
    for example in examples:
        try:
            ids, labels = encode(example, tokenizer, format)
        except ValueError as error:
            raise DataError(file, str(error), row=example.number) from error
        if len(ids) > dataset.max_length:
            if dataset.on_overflow is Overflow.ERROR:
                raise DataError(
                    file,
                    f"has {len(ids)} tokens, dataset.max_length is {dataset.max_length}",
                    row=example.number,
                    hint="raise dataset.max_length, or set dataset.on_overflow to truncate or drop",
                )
            if dataset.on_overflow is Overflow.DROP:
                too_long += 1
                continue
            ids, labels, truncated = ids[: dataset.max_length], labels[: dataset.max_length], truncated + 1
            if format is DataFormat.CLASSIFICATION:  # cut as its users will cut it: some tokenizers close every text
                ids = list(tokenizer(example.text, truncation=True, max_length=dataset.max_length).input_ids)
        if format is not DataFormat.CLASSIFICATION and all(
            label == IGNORED for label in labels[1:]
        ):  # the first token has no context to be predicted from
            raise DataError(
                file,
                f"has no token to learn within dataset.max_length ({dataset.max_length})",
                row=example.number,
                hint="raise dataset.max_length, or set dataset.on_overflow: drop",
            )
        rows.append(TokenRow(number=example.number, input_ids=ids, labels=labels))
    if not rows:
        raise no_row_fits(file, dataset.max_length)
    return TokenSet(rows=rows, truncated=truncated, too_long=too_long)


def _write_cache(folder: Path, value: dict[str, Any]) -> None:
    """Written aside and renamed: two trainers may prepare the same data at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    (aside / "set.json").write_text(json.dumps(value))
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)  # the other one was first; its content is the same
        if not folder.exists():
            raise
